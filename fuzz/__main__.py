"""Fuzz every decoder: ``python -m fuzz [--seconds N] [--jobs N] [TARGET ...]``. Fails if an input breaks a target.

The corpus under fuzz/corpus/ grows from run to run; what breaks a target is kept under fuzz/crashes/. Neither is
part of the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz import seeds
from fuzz.targets import TARGETS

_HERE: Final = Path(__file__).parent
CORPUS: Final = _HERE / "corpus"
CRASHES: Final = _HERE / "crashes"

MAX_INPUT_BYTES: Final = 16 * 1024
HANG_SECONDS: Final = 20
SLICE_SECONDS: Final = 120
"""A target's process is replaced after this long, so that what the instrumentation leaks does not add up."""

_START_SECONDS: Final = 300
"""For imports and the first pass over a large corpus."""


@dataclass(frozen=True)
class Result:
    """What one target's run came to. ``crash`` is the input that broke it; None too if the fuzzer itself failed."""

    target: str
    executions: int
    edges: int
    log: Path
    crash: Path | None = None
    broken: bool = False


def run(target: str, seconds: int) -> Result:
    """Fuzz ``target`` for ``seconds``, from its seeds and from what earlier runs found."""
    corpus, crashes = CORPUS / target, CRASHES / target
    seeds.write(corpus, target)
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    log = crashes.with_suffix(".log")
    executions = edges = 0
    deadline = time.monotonic() + seconds
    while (left := round(deadline - time.monotonic())) > 0:
        with log.open("wb") as output:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "fuzz.one",
                    target,
                    f"-max_total_time={min(left, SLICE_SECONDS)}",
                    f"-max_len={MAX_INPUT_BYTES}",
                    f"-timeout={HANG_SECONDS}",
                    f"-artifact_prefix={crashes}/",
                    str(corpus),
                ],
                cwd=_HERE.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SLICE_SECONDS + _START_SECONDS,
                check=False,
            )
        text = log.read_text(errors="replace")
        executions += max((int(n) for n in re.findall(r"^(?:#|Done )(\d+)", text, re.MULTILINE)), default=0)
        edges = max([edges, *(int(n) for n in re.findall(r" cov: (\d+)", text))])
        if done.returncode != 0:
            # slow-unit files are reports, not failures
            new = [p for p in set(crashes.iterdir()) - before if not p.name.startswith("slow-unit")]
            return Result(target, executions, edges, log, new[0] if new else None, broken=True)
    return Result(target, executions, edges, log)


def _report(result: Result) -> None:
    state = "BROKEN" if result.broken else "ok"
    print(f"{result.target:24} {result.executions:>10} {result.edges:>7}  {state}", flush=True)
    if result.broken:
        text = result.log.read_text(errors="replace")
        trace = text.partition("=== Uncaught Python exception: ===")[2].partition("==")[0]
        print(trace.strip() or text[-1500:], flush=True)
    if result.crash is not None:
        print(f"input: {result.crash}\n       {result.crash.read_bytes()[:200].hex()}")
        print(f"again: python -m fuzz.one {result.target} {result.crash}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description="Fuzz every decoder of bytes from peers."
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default 1)")
    options = parser.parse_args()
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    print(f"{'target':24} {'executions':>10} {'edges':>7}", flush=True)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda name: run(name, options.seconds), options.targets or TARGETS):
            _report(result)
            results.append(result)
    broken = sum(result.broken for result in results)
    print(f"{len(results)} targets, {sum(r.executions for r in results)} executions, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
