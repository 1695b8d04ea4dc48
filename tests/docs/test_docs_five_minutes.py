"""The first page's private swarm comes about by the commands that it tells, with loopback in the place of a network."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue

import pytest
from pages import DOCS, commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

INDEX = DOCS / "index.md"
COMMANDS = [command.words for command in commands("kwaainet-bridge", [INDEX])]
TOLD_ADDRESS = re.search(r"^join with .* (/ip4/\S+)$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
START = 240  # seconds, on a machine that does other work too


def test_the_page_tells_the_commands_that_run_here():
    assert [words[1] for words in COMMANDS] == ["init", "run", "init", "run", "swarm", "generate", "status"]


def program(words: tuple[str, ...], address: str) -> list[str]:
    """The command as it is told, but that the first node's address is the one that it has here."""
    here = [address if word == TOLD_ADDRESS else word for word in words[1:]]
    return [sys.executable, "-m", "kwaainet_bridge", *here]


def call(words: tuple[str, ...], address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        program(words, address),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


@contextmanager
def node(words: tuple[str, ...], address: str, folder: Path) -> Iterator[dict[str, str]]:
    """A node that serves: what it printed, by label. It must end in order when it is told to."""
    command = [*program(words, address), "--listen", "/ip4/127.0.0.1/tcp/0"]
    log = folder / f"{words[3].replace('/', '-')}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield printed(process, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=90) == 0, log.read_text()
        finally:
            process.kill()


def printed(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    lines: Queue[str] = Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    told: dict[str, str] = {}
    while "serving" not in told:
        line = lines.get(timeout=START)
        assert line, f"the node ended: {log.read_text()}"
        label, _, value = line.strip().partition("  ")
        told[label] = value.strip()
    return told


def test_two_nodes_of_the_first_page_make_text_together(tmp_path: Path):
    init_attic, run_attic, init_cellar, run_cellar, swarm, generate, status = COMMANDS
    attic, cellar = tmp_path / "1", tmp_path / "2"
    for folder in (attic, cellar):
        folder.mkdir()
    with ExitStack() as nodes:
        call(init_attic, "", attic)
        first = nodes.enter_context(node(run_attic, "", attic))
        assert first["serving"] == "austen-hf 0:4 of 8"
        address = first["join with"].split()[-1]
        call(init_cellar, "", cellar)
        second = nodes.enter_context(node(run_cellar, address, cellar))
        assert second["serving"] == "austen-hf 4:8 of 8"

        seen = call(swarm, address, tmp_path).stdout
        assert "0 11111111 8" in seen
        assert "every block is served" in seen
        text = call(generate, address, tmp_path)
        assert text.stdout.startswith("My dear Mr. Bennet, you must be sorry to see you,")  # as on the page
        route = re.search(r"route: 0:4 via …(\w+) => 4:8 via …(\w+)", text.stderr)
        assert route is not None
        assert first["peer id"].endswith(route[1])
        assert second["peer id"].endswith(route[2])
        assert "ready" in call(status, address, attic).stdout
