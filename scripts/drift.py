"""Drift watch: do newer releases of Hivemind, Petals, libp2p and transformers work, and what do they write differently?

Exit status: 0 nothing is newer, or the newer releases pass and write the same bytes; 1 something changed or failed;
2 it could not be found out. See docs/drift.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from wire_changes import leaves, wire_changes

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"
PINS = {
    "hivemind": "tests/interop/releases.txt",
    "petals": "tests/interop/releases.txt",
    "libp2p": "pyproject.toml",
    "transformers": "constraints.txt",
}
STOCK = (
    "hivemind",
    "petals",
)  # live in the environment of the stock peers; the others in that of this package
TESTS_OF_OURS = ("tests/net", "tests/engine", "tests/interop")
LINES_SHOWN = 40


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


# -- what is pinned, what there is --


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
        raise CannotTell(f"{e}: {last_lines(answer.stderr, 3)}") from e


def version_table(releases: Iterable[Release]) -> str:
    rows = [("package", "pinned", "compared", "")]
    rows += [(r.name, r.pinned, r.found, "differs" if r.differs else "same") for r in releases]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )


# -- environments and tests --


def last_lines(text: str, count: int = LINES_SHOWN) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


def logged(name: str, argv: list[Any], work: Path, **variables: str) -> tuple[int, str]:
    """Run to the end; the output is also kept in ``work``. Exit status and output."""
    done = subprocess.run(
        [str(a) for a in argv],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    work.mkdir(parents=True, exist_ok=True)
    (work / f"{name}.log").write_text(done.stdout)
    return done.returncode, done.stdout


def step(name: str, argv: list[Any], work: Path, **variables: str) -> str:
    """``logged``, which has to succeed. CannotTell with the end of the output."""
    status, output = logged(name, argv, work, **variables)
    if status:
        raise CannotTell(f"{name} ended with {status}; the end of {work / name}.log:\n{last_lines(output)}")
    return output


def compare_wire(peers: Path, work: Path) -> list[str]:
    """Have the Hivemind in ``peers`` write everything anew; prints and returns what changed. CannotTell."""
    work.mkdir(parents=True, exist_ok=True)
    argv = [peers / "bin" / "python", "-W", "ignore", ROOT / "scripts" / "stock_wire.py"]
    step(
        "stock-wire",
        [*argv, VECTORS / "hivemind.json", work],
        work,
        OMP_NUM_THREADS="1",
        USE_LEGACY_BFLOAT16="1",
    )
    made = {
        file: json.loads((work / file).read_text()) for file in ("hivemind.json", "hivemind-messages.json")
    }
    changes: list[str] = []
    for file, values in made.items():
        recorded = json.loads((VECTORS / file).read_text())
        changes += wire_changes(recorded, values, whole=file == "hivemind-messages.json")
    versions = json.loads((work / "versions.json").read_text())
    print("\nMade by " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ":")
    print(
        f"{sum(len(leaves(values)) for values in made.values())} values compared, {len(changes)} changed on the wire"
    )
    print("".join(f"  {line}\n" for line in changes), end="")
    return changes


def make_peers(releases: list[Release], work: Path) -> Path:
    """The stock peers with the compared releases, beside ``.venv-peers``. CannotTell."""
    folder = ROOT / ".venv-drift-peers"
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    wanted = pins() | {r.name: r.found for r in releases}
    file = work / "releases.txt"
    file.write_text("".join(f"{name}=={wanted[name]}\n" for name in STOCK))
    print(f"\nMaking {folder.name} with {', '.join(file.read_text().split())}", flush=True)
    step("make-peers", ["scripts/peers.sh", folder, file], work)
    return folder


def make_ours(releases: list[Release], work: Path) -> Path:
    """This package with the compared releases, whatever its own ranges say, beside ``.venv``. CannotTell."""
    folder = ROOT / ".venv-drift"
    shutil.rmtree(folder, ignore_errors=True)
    wanted = [f"{r.name}=={r.found}" for r in releases]
    print(f"\nMaking {folder.name} with {', '.join(wanted)}", flush=True)
    step(
        "make-ours",
        ["scripts/setup.sh", folder, "dev"],
        work,
        PYTHON=os.environ.get("PYTHON") or sys.executable,
    )
    python = folder / "bin" / "python"
    # pip holds what is installed to nobody's ranges: it only tells of those that are now left
    step("install-ours", [python, "-m", "pip", "install", "-q", *wanted], work)
    _, conflicts = logged("check-ours", [python, "-m", "pip", "check"], work)
    print(f"pip check: {conflicts.strip()}")
    return folder


def failures_in(output: str) -> list[str]:
    """The lines of pytest's summary that name a failure or an error."""
    return [line for line in output.splitlines() if re.match(r"(FAILED|ERROR) \S", line)]


def run_tests(name: str, environment: Path, peers: Path, selection: tuple[str, ...], work: Path) -> list[str]:
    """Prints and returns the failures. CannotTell where pytest could not run the tests."""
    python = environment / "bin" / "python"
    argv = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    status, output = logged(name, argv, work, KWAAINET_BRIDGE_PEERS=str(peers), OMP_NUM_THREADS="1")
    failures = failures_in(output)
    if status not in (0, 1) and not failures:
        raise CannotTell(f"pytest ended with {status}; the end of {work / name}.log:\n{last_lines(output)}")
    print(f"\npytest {' '.join(selection)}: {last_lines(output, 1).strip('= ')}")
    print("".join(f"  {line}\n" for line in failures), end="")
    return failures


# -- the whole --


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


def compare_stock(releases: list[Release], work: Path) -> list[str]:
    peers = make_peers(releases, work)
    changes = compare_wire(peers, work)
    return changes + run_tests("tests-stock", ROOT / ".venv", peers, ("tests", "-m", "interop"), work)


def compare_ours(releases: list[Release], peers: Path, work: Path) -> list[str]:
    return run_tests("tests-ours", make_ours(releases, work), peers, TESTS_OF_OURS, work)


def watch(releases: list[Release], peers: Path, work: Path) -> int:
    """Compare what differs, each side beside the other's pins, so that a failure has one cause. The exit status."""
    print(version_table(releases), flush=True)
    stock = [r for r in releases if r.differs and r.name in STOCK]
    ours = [r for r in releases if r.differs and r.name not in STOCK]
    if not stock and not ours:
        print(
            "\nNothing is newer than what is pinned. (--pinned compares the pinned release with the vectors.)"
        )
        return 0
    changes: list[str] = []
    unknown = False
    for compare in (
        *([lambda: compare_stock(stock, work)] if stock else []),
        *([lambda: compare_ours(ours, peers, work)] if ours else []),
    ):
        try:
            changes += compare()
        except CannotTell as e:
            print(f"\ndrift: {e}", file=sys.stderr)
            unknown = True
    if unknown:
        return 2
    print(f"\n{len(changes)} changes and failures" if changes else "\nNothing changed: the pins can move")
    return 1 if changes else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pinned", action="store_true", help="compare the pinned Hivemind with the golden vectors"
    )
    parser.add_argument(
        "--try",
        dest="chosen",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="compare this release",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "drift", help="for logs and what was made"
    )
    options = parser.parse_args(arguments)
    work = options.work.absolute()
    peers = Path(os.environ.get("KWAAINET_BRIDGE_PEERS") or ROOT / ".venv-peers").absolute()
    try:
        if options.pinned:
            return 1 if compare_wire(peers, work) else 0
        if options.chosen:
            return watch(chosen_releases(options.chosen), peers, work)
        pythons = {True: peers / "bin" / "python", False: Path(sys.executable)}
        found = [Release(n, pinned, newest(n, pythons[n in STOCK])) for n, pinned in pins().items()]
        return watch(found, peers, work)
    except (CannotTell, ValueError, OSError) as e:
        print(f"drift: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
