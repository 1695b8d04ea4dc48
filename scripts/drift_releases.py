"""What is pinned, and what the package index has."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PINS = {
    "hivemind": "tests/interop/releases.txt",
    "petals": "tests/interop/releases.txt",
    "libp2p": "pyproject.toml",
    "transformers": "constraints.txt",
}
# in the environment of the stock peers; the others are in that of this package
STOCK = ("hivemind", "petals")


class CannotTell(Exception):
    """An environment could not be made, or a step in it ended without a result."""


@dataclass(frozen=True)
class Release:
    """A package's pinned version and the one to compare with it."""

    name: str
    pinned: str
    found: str
    chosen: bool = False  # by --try: compared even where it is older

    @property
    def differs(self) -> bool:
        pinned, found = Version(self.pinned), Version(self.found)
        return found != pinned if self.chosen else found > pinned


def pin_in(text: str, name: str) -> str:
    """The version after ``name==`` in a requirements file or pyproject.toml. ValueError if there is none."""
    found = re.search(rf'^\s*"?{re.escape(name)}==([^\s"#;,]+)', text, re.MULTILINE)
    if not found:
        raise ValueError(f"no pin of {name}")
    return found[1]


def pins() -> dict[str, str]:
    return {name: pin_in((ROOT / file).read_text(), name) for name, file in PINS.items()}


def newest_in(answer: str, name: str) -> str:
    """The version in the first line of what ``pip index versions`` prints. ValueError if there is none."""
    found = re.search(rf"^{re.escape(name)} \(([^)]+)\)$", answer, re.MULTILINE)
    if not found:
        raise ValueError(f"the package index names no version of {name}")
    return found[1]


def newest(name: str, python: Path) -> str:
    """The newest final release that this interpreter could install. CannotTell."""
    argv = [python, "-m", "pip", "index", "versions", name]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        return newest_in(answer.stdout, name)
    except ValueError as e:
        raise CannotTell(f"{e}: {answer.stderr.strip()[-300:]}") from e


def chosen_releases(requirements: list[str]) -> list[Release]:
    """From NAME==VERSION. ValueError."""
    known, releases = pins(), []
    for text in requirements:
        requirement = Requirement(text)
        version = re.fullmatch(r"==([^,*]+)", str(requirement.specifier))
        if requirement.name not in known or not version:
            raise ValueError(f"{text!r}: expected NAME==VERSION with one of {', '.join(known)}")
        releases.append(Release(requirement.name, known[requirement.name], version[1], chosen=True))
    return releases


def version_table(releases: Iterable[Release]) -> str:
    rows = [("package", "pinned", "compared", "")]
    rows += [(r.name, r.pinned, r.found, "differs" if r.differs else "same") for r in releases]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )
