"""What the pages tell to type, to write and to import is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import DOCS, PAGES, ROOT, Command, Fence, command_in, commands, fences, inline_commands

from kwaainet_bridge.cli.app import app
from kwaainet_bridge.config import parse_config

PROGRAM = typer.main.get_command(app)
SOURCE = ROOT / "src" / "kwaainet_bridge"


def parse(command: Any, words: tuple[str, ...], parent: Any = None) -> None:
    """Have the command line parse ``words`` and run nothing; raises what it raises."""
    context = command.make_context(command.name, list(words), parent=parent)
    if hasattr(command, "commands"):
        _, below, rest = command.resolve_command(
            context, [*getattr(context, "_protected_args", ()), *context.args]
        )
        parse(below, tuple(rest), context)


WITHIN_TEXT = inline_commands("kwaainet-bridge")
WHOLE = [*commands("kwaainet-bridge"), *(command for command in WITHIN_TEXT if len(command.words) > 2)]


@pytest.mark.parametrize("command", WHOLE, ids=str)
def test_the_command_line_knows_each_command(command: Command):
    if "--install-completion" in command.words:  # it acts while it is parsed
        return
    parse(PROGRAM, command.words[1:])


def test_the_command_line_knows_each_name_within_text():
    for command in WITHIN_TEXT:
        assert not command.words[1:] or command.words[1] in PROGRAM.commands, str(command)


@pytest.mark.parametrize(
    "words", [("swarm", "--pears", "x"), ("rum",), ("ping",), ("ping", "x", "--count", "0")]
)
def test_the_command_line_refuses_mistakes(words: tuple[str, ...]):
    with pytest.raises(Exception, match=r"(?i)no such|missing|invalid|greater than"):
        parse(PROGRAM, words)


def test_commands_are_found_behind_prompts_and_paths_and_not_in_output():
    assert command_in('$ kwaainet-bridge generate "a b"  # c', "kwaainet-bridge") == (
        "kwaainet-bridge",
        "generate",
        "a b",
    )
    assert command_in("nice .venv/bin/python -m bench.net", "python") == ("python", "-m", "bench.net")
    assert command_in("join with  kwaainet-bridge run", "kwaainet-bridge") is None


@pytest.mark.parametrize("fence", fences("yaml"), ids=str)
def test_each_configuration_can_be_read(fence: Fence):
    parse_config(fence.text, str(fence))


@pytest.mark.parametrize("fence", fences("python"), ids=str)
def test_each_program_can_be_compiled_and_imports_what_there_is(fence: Fence):
    code = compile(fence.text, str(fence), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kwaainet_bridge"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


@pytest.mark.parametrize("command", commands("make"), ids=str)
def test_make_knows_each_target(command: Command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in command.words[1:] if "=" not in word} <= set(targets)


@pytest.mark.parametrize("command", commands("python"), ids=str)
def test_each_script_and_benchmark_has_the_options(command: Command):
    words = command.words[1:]
    if words[0] == "-m" and words[1].partition(".")[0] not in {"bench", "fuzz", "kwaainet_bridge"}:
        return
    path = ROOT / f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else ROOT / words[0]
    source = path.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{path} has no {option}"


def test_each_benchmark_has_its_row():
    rows = re.findall(
        r"^\| \[`python -m bench\.(\w+)`\]", (DOCS / "performance.md").read_text(), re.MULTILINE
    )
    programs = [path.stem for path in (ROOT / "bench").glob("*.py") if "ArgumentParser(" in path.read_text()]
    assert sorted(rows) == sorted(programs)


# Paths that are made by commands, or are on other machines.
MADE = ("build/", "fuzz/crashes/", "fuzz/corpus/", "fuzz/regressions/TARGET", "run/", "mynode/", "node/data")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_file_that_is_named_is_there(page: Path):
    text = page.read_text(encoding="utf-8")
    folders = [path for above in (SOURCE, ROOT / "tests") for path in above.iterdir() if path.is_dir()]
    rooms = [ROOT, SOURCE, page.parent, *folders]
    for name in re.findall(
        r"`((?:[\w.-]+/)+[\w.*-]+\.(?:py|sh|proto|yaml|json|yml|md|txt|service|conf))`", text
    ):
        if not name.startswith(MADE):
            assert any(list(room.glob(name)) for room in rooms), f"there is no {name}"


TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
} | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_test_that_is_named_is_there(page: Path):
    named = set(re.findall(r"`(?:[\w.-]+/)*(test_\w+[a-z\d])(?:\.py)?`", page.read_text(encoding="utf-8")))
    assert not named - TESTS
