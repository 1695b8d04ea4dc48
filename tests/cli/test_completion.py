"""Shells are given what completes commands and options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("kwaainet-bridge"))


def completed(words: str, count: int) -> list[str]:
    asked = {
        "_KWAAINET_BRIDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(count),
    }
    result = subprocess.run(
        [COMMAND], env={**os.environ, **asked}, capture_output=True, text=True, check=False, timeout=60
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "count", "found"),
    [
        ("kwaainet-bridge do", 1, ["doctor"]),
        ("kwaainet-bridge config ch", 2, ["check"]),
        ("kwaainet-bridge run --num", 2, ["--num-blocks"]),
        ("kwaainet-bridge sess", 1, ["sessions"]),
        ("kwaainet-bridge logs --level w", 3, ["warning"]),
        ("kwaainet-bridge peers --w", 2, ["--watch"]),
        ("kwaainet-bridge nothing-like-this", 1, []),
    ],
)
def test_commands_and_options_are_completed(words, count, found):
    assert completed(words, count) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_told_how_to_ask(shell):
    result = subprocess.run(
        [COMMAND, "--show-completion", shell],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},  # there may be no shell above
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0
    assert "_KWAAINET_BRIDGE_COMPLETE" in result.stdout
