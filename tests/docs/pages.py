"""The pages, and what is in their fences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page; ``line`` is the number of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(*languages: str) -> list[Fence]:
    return [fence for page in PAGES for fence in fences_of(page) if fence.language in languages]


def fences_of(page: Path) -> Iterator[Fence]:
    opened: int | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        mark = re.match(r" *```(\w*)$", line)
        if mark and opened is None:
            opened, language = number, mark[1]
        elif mark and opened is not None:
            yield Fence(page, opened + 2, language, "\n".join(lines[opened + 1 : number]) + "\n")
            opened = None
    assert opened is None, f"{page}:{opened}: a fence that does not end"


@dataclass(frozen=True)
class Command:
    """A command that a page tells to type: its words, without prompt and comment."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} {' '.join(self.words[:3])}"


def commands(name: str, pages: list[Path] | None = None) -> list[Command]:
    """All commands with ``name`` in them (``nice`` and paths before it are no part of them), in order."""
    shells = ("", "console", "bash", "sh")
    return [
        Command(fence.page, fence.line + offset, words)
        for page in pages or PAGES
        for fence in fences_of(page)
        if fence.language in shells
        for offset, line in enumerate(fence.text.splitlines())
        if (words := command_in(line, name)) is not None
    ]


def inline_commands(name: str) -> list[Command]:
    """Those within sentences, but for the ones that show a form: ``[options]``, ``a|b``, ``…``."""
    return [
        Command(page, number, words)
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        for code in re.findall(r"`([^`]+)`", line)
        if not re.search(r"[\[|…]", code) and (words := command_in(code, name)) is not None
    ]


def command_in(line: str, name: str) -> tuple[str, ...] | None:
    """The command's words from ``name`` on, if ``line`` begins with it."""
    found = re.match(rf" *(?:\$ )?(?:nice )?(?:[\w./~-]+/)?({re.escape(name)}(?: .*)?)$", line)
    return None if found is None else tuple(shlex.split(found[1], comments=True))
