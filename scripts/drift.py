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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drift_releases import (
    PINS,
    ROOT,
    STOCK,
    CannotTell,
    Release,
    chosen_releases,
    newest,
    pins,
    version_table,
)
from wire_changes import leaves, wire_changes

VECTORS = ROOT / "tests" / "vectors"
TESTS_OF_OURS = ["tests/net", "tests/engine", "tests/interop"]
LINES_SHOWN = 40


@dataclass(frozen=True)
class Environments:
    """This package's, which runs the tests, and that of the stock peers that they talk to."""

    ours: Path
    peers: Path


def pinned_environments() -> Environments:
    """Those that ``make setup peers`` makes; KWAAINET_BRIDGE_PEERS names another one for the stock peers."""
    peers = Path(os.environ.get("KWAAINET_BRIDGE_PEERS") or ROOT / ".venv-peers").absolute()
    return Environments(ROOT / ".venv", peers)


def newest_releases() -> list[Release]:
    where = pinned_environments()
    pythons = {name: (where.peers if name in STOCK else where.ours) / "bin" / "python" for name in PINS}
    return [Release(name, pinned, newest(name, pythons[name])) for name, pinned in pins().items()]


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
    script = ROOT / "scripts" / "stock_wire.py"
    argv = [peers / "bin" / "python", "-W", "ignore", script, VECTORS / "hivemind.json", work]
    step("stock-wire", argv, work, OMP_NUM_THREADS="1")
    made = {
        name: json.loads((work / name).read_text()) for name in ("hivemind.json", "hivemind-messages.json")
    }
    changes: list[str] = []
    for name, values in made.items():
        recorded = json.loads((VECTORS / name).read_text())
        changes += wire_changes(recorded, values, whole=name == "hivemind-messages.json")
    versions = json.loads((work / "versions.json").read_text())
    print("\nMade by " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ":")
    compared = sum(len(leaves(values)) for values in made.values())
    print(f"{compared} values compared, {len(changes)} changed on the wire")
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


def failed_in(output: str) -> list[str]:
    """The tests (or files, where they cannot be collected) that pytest's summary says failed."""
    return [
        line.split(" - ")[0].split(" ", 1)[1]
        for line in output.splitlines()
        if re.match(r"(FAILED|ERROR) \S", line)
    ]


def pytest(name: str, where: Environments, selection: list[str], work: Path) -> tuple[list[str], str]:
    """The tests that failed, and pytest's last line. CannotTell where it could not run them."""
    argv = [where.ours / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    status, output = logged(name, argv, work, KWAAINET_BRIDGE_PEERS=str(where.peers), OMP_NUM_THREADS="1")
    failed = failed_in(output)
    if status and not failed:
        raise CannotTell(f"pytest ended with {status}; the end of {work / name}.log:\n{last_lines(output)}")
    return failed, last_lines(output, 1).strip("= ")


def verdict(test: str, again: list[str], with_pins: list[str]) -> str:
    if test not in again:
        return "passes when repeated"
    return "fails with the pins too" if test in with_pins else "fails"


def compare_tests(name: str, newer: Environments, selection: list[str], work: Path) -> list[str]:
    """Prints all that fails; returns what fails twice, and does not with the pinned releases. CannotTell."""
    failed, summary = pytest(name, newer, selection, work)
    print(f"\npytest {' '.join(selection)}: {summary}", flush=True)
    again = pytest(f"{name}-again", newer, failed, work)[0] if failed else []
    with_pins = pytest(f"{name}-pins", pinned_environments(), again, work)[0] if again else []
    verdicts = {test: verdict(test, again, with_pins) for test in failed}
    print("".join(f"  {test}: {said}\n" for test, said in verdicts.items()), end="")
    return [test for test, said in verdicts.items() if said == "fails"]


# -- the whole --


def compare_stock(releases: list[Release], work: Path) -> list[str]:
    newer = replace(pinned_environments(), peers=make_peers(releases, work))
    changes = compare_wire(newer.peers, work)
    return changes + compare_tests("tests-stock", newer, ["tests", "-m", "interop"], work)


def compare_ours(releases: list[Release], work: Path) -> list[str]:
    newer = replace(pinned_environments(), ours=make_ours(releases, work))
    return compare_tests("tests-ours", newer, TESTS_OF_OURS, work)


def watch(releases: list[Release], work: Path) -> int:
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
    for compare, differing in ((compare_stock, stock), (compare_ours, ours)):
        try:
            changes += compare(differing, work) if differing else []
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
    try:
        if options.pinned:
            return 1 if compare_wire(pinned_environments().peers, work) else 0
        return watch(chosen_releases(options.chosen) if options.chosen else newest_releases(), work)
    except (CannotTell, ValueError, OSError) as e:
        print(f"drift: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
