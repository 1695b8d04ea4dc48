"""docs/command-line.md tells every command and option with its default, and what ``run`` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.run import ADDRESS_LABEL, JOIN_LABEL, PEER_LABEL, SERVING_LABEL
from kwaainet_bridge.config import EMBEDDED_MODEL

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
ROW = re.compile(r"^\| (`[^|]+`) \| ([^|]+) \|", re.MULTILINE)

# Defaults that the commands themselves put in the place of an option that is left out.
FILLED_IN = {("generate", "model"): f"`{EMBEDDED_MODEL}`", ("generate", "dht_prefix"): "derived"}


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{path}{name} ")
    if not hasattr(command, "commands"):
        yield path.strip(), command


ROOT = typer.main.get_command(app)
COMMANDS = dict(walk(ROOT))
PARAMETERS = [
    pytest.param(path, parameter, id=f"{path} {parameter.name}")
    for path, command in COMMANDS.items()
    for parameter in command.params
]


def label(parameter: Any) -> str:
    """What the first column of a table says: the names of an option, or an argument in capitals."""
    names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
    return ", ".join(f"`{name}`" for name in names)


def default(command: str, parameter: Any) -> str:
    if parameter.required:
        return "required"
    if (command, parameter.name) in FILLED_IN:
        return FILLED_IN[command, parameter.name]
    if getattr(parameter, "is_flag", False):
        return "off"
    return "none" if parameter.default is None else f"`{parameter.default}`"


def test_each_command_has_a_section_and_no_other_is_told():
    told = {name for name in SECTIONS if name in COMMANDS or f"`kwaainet-bridge {name}" in SECTIONS[name]}
    assert told == set(COMMANDS)


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS)
def test_each_option_is_told_with_its_default(command: str, parameter: Any):
    rows = dict(ROW.findall(SECTIONS[command]))
    if command == "config check":  # a single argument needs no table
        assert f"`{parameter.name.upper()}`" in SECTIONS[command]
        return
    assert rows[label(parameter)] == default(command, parameter)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "config check"])
def test_no_option_is_told_that_does_not_exist(command: str):
    options = {
        name for names, _ in ROW.findall(SECTIONS[command]) for name in re.findall(r"`(--[\w-]+)`", names)
    }
    assert options == {name for p in COMMANDS[command].params for name in p.opts if name.startswith("--")}


def test_the_options_of_the_program_are_told():
    for parameter in ROOT.params:
        assert all(f"`{name}`" in PAGE for name in parameter.opts)


@pytest.mark.parametrize("name", [PEER_LABEL, ADDRESS_LABEL, JOIN_LABEL, SERVING_LABEL])
def test_the_labels_are_those_that_are_printed(name: str):
    assert f"| `{name}` |" in SECTIONS["run"]
    assert re.search(rf"^{name}  +\S", SECTIONS["run"], re.MULTILINE)
