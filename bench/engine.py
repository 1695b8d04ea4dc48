"""Our engine beside a stock Petals server: single steps, many sessions, forward and backward, a prompt beside decoding.

``python -m bench.engine`` alternates our node and a stock server, driven by one stock Petals client, and prints medians
and their ratios. Both hold all blocks, of a tiny Llama (hidden size 64, what is not arithmetic) and of a middling one
(1024, 107 million parameters). Other work on the machine touches both: look at the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from child_processes import Driver
from stock_swarm import StockEnvironment, start_bootstrap

from bench.node_metrics import metrics_of, milliseconds
from bench.petals import BLOCKS, TINY, Start, random_llama, start_client, starters

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 600.0
Measure = Callable[[Driver, str], float]
Pass = dict[str, int | bool]


@dataclass(frozen=True)
class Row:
    """One measurement: its model, how it is made (milliseconds), and how many times better than stock it should be."""

    name: str
    model: str
    measure: Measure
    target: float


def ask(do: str, **arguments: object) -> Measure:
    return lambda client, key: float(client.ask(do, key=key, within=WITHIN, **arguments))


FORWARD: Pass = {"batch": 8, "tokens": 128, "repeats": 3, "backward": False}
BOTH_WAYS: Pass = {"batch": 1, "tokens": 128, "repeats": 3, "backward": True}
ROWS = (
    Row("step, tiny", "tiny", ask("steps", count=100), 1.8),
    Row("forward 1x128, tiny", "tiny", ask("passes", batch=1, tokens=128, repeats=15, backward=False), 4.0),
    Row("64 sessions, tiny", "tiny", ask("sessions_at_once", sessions=64, tokens=12), 8.0),
    Row("step, mid", "mid", ask("steps", count=40), 1.25),
    Row("16 sessions, mid", "mid", ask("sessions_at_once", sessions=16, tokens=12), 6.0),
    Row("forward 8x128, mid", "mid", ask("passes", **FORWARD), 1.2),
    Row("forward and backward 1x128, mid", "mid", ask("passes", **BOTH_WAYS), 1.2),
)
LOCAL: dict[str, Pass] = {"forward 8x128, mid": FORWARD, "forward and backward 1x128, mid": BOTH_WAYS}
"""Rows that are compared with transformers in the client's own process, too."""
LOCAL_TARGET = 0.9
"""How fast they should be through our node, as a share of that."""
PROMPT = {"sessions": 8, "tokens": 25, "prompt": 2048}
PROMPT_TARGET = 3.0
"""Most that the p99 of steps beside a prompt may be, in multiples of their p99 alone."""


class Bench:
    """The peers that stay, and the servers that take turns."""

    def __init__(
        self,
        work: Path,
        stock: StockEnvironment,
        client: Driver,
        address: str,
        *,
        options: argparse.Namespace,
    ) -> None:
        self.models = {"tiny": TINY, "mid": random_llama(stock, work / "random-llama")}
        self._work, self._stock, self._client, self._address = work, stock, client, address
        self._options = options
        self._turn = 0
        self.parts: dict[str, dict[str, float]] = {}
        """Of the latest run of our node, by row: milliseconds of each part of a step, as the node counts them."""

    def one(self, model: str, who: str) -> tuple[dict[str, float], dict[str, float]]:
        """All wanted rows of one model, on a fresh server."""
        self._turn += 1
        prefix = f"engine-{who}-{self._turn}"
        folder = self.models[model]
        start: Start = starters(self._stock, folder, self._work)[who]
        socket = self._work / f"{prefix}-{BLOCKS.start}.key.sock"
        with start(prefix, [self._address], BLOCKS):
            self._client.ask(
                "load", key=prefix, model=str(folder), prefix=prefix, peers=[self._address], reference=False
            )
            found = {}
            for row in self._rows(model):
                before = metrics_of(socket) if who == "ours" else ""
                found[row.name] = row.measure(self._client, prefix)
                if who == "ours":
                    self.parts[row.name] = milliseconds(before, metrics_of(socket))
            beside: dict[str, float] = {}
            if model == "mid" and self._options.prompt and (who == "ours" or self._turn <= 4):
                beside = self._client.ask("beside_a_prompt", key=prefix, within=WITHIN, **PROMPT)
            self._client.ask("forget", key=prefix)
        return found, beside

    def local(self) -> dict[str, float]:
        """What transformers take alone for the wanted rows that have it."""
        wanted = {row.name for row in self._rows("mid")} if self._options.model != "tiny" else set()
        threads = self._stock.threads
        common = {"model": str(self.models["mid"]), "threads": threads, "within": WITHIN}
        return {
            name: self._client.ask("local_passes", **common, **what)
            for name, what in LOCAL.items()
            if name in wanted
        }

    def _rows(self, model: str) -> list[Row]:
        return [row for row in ROWS if row.model == model and self._options.row in row.name]


def quotient(values: dict[str, list[float]]) -> float:
    return statistics.median(values["stock"]) / statistics.median(values["ours"])


def report(
    samples: dict[str, dict[str, list[float]]],
    beside: dict[str, list[dict[str, float]]],
    local: dict[str, list[float]],
) -> dict[str, object]:
    """Print the table; return what goes to the file."""
    result: dict[str, object] = {"samples": samples, "beside_a_prompt": beside, "local": local}
    print(f"{'':34}{'stock ms':>10}{'ours ms':>10}{'ratio':>8}{'target':>8}")
    for row in ROWS:
        if not samples.get(row.name):
            continue
        medians = [statistics.median(samples[row.name][who]) for who in ("stock", "ours")]
        print(
            f"{row.name:34}{medians[0]:10.1f}{medians[1]:10.1f}{quotient(samples[row.name]):8.2f}{row.target:8.2f}"
        )
    for name, durations in local.items():
        alone = statistics.median(durations)
        share = alone / statistics.median(samples[name]["ours"])
        print(
            f"{name}: transformers alone {alone:.1f} ms, ours {share:.2f} of that speed (target: {LOCAL_TARGET:g})"
        )
    for who, runs in beside.items():
        if not runs:
            continue
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        times = middle["prompt_p99"] / middle["idle_p99"]
        print(
            f"{who}: p99 beside a prompt over p99 alone {times:.2f} (target: at most {PROMPT_TARGET:g}); {middle}"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="runs of each server (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads of each server (default: all)")
    add("--work", type=Path, default=ROOT / "build" / "bench", help="folder of model, logs and results")
    add("--row", default="", help="only rows whose name contains this")
    add("--model", choices=("tiny", "mid"), help="only rows of this model")
    add("--only", choices=("stock", "ours"), help="only this server, to watch it")
    add("--no-prompt", dest="prompt", action="store_false", help="leave out the prompt beside decoding")
    options = parser.parse_args()

    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work, threads=options.threads)
    samples: dict[str, dict[str, list[float]]] = {}
    beside: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    local: dict[str, list[float]] = {}
    bootstrap, address = start_bootstrap(stock)
    with bootstrap, start_client(stock, threads=1) as client:
        bench = Bench(work, stock, client, address, options=options)
        for number in range(options.pairs):
            order = ["stock", "ours"] if number % 2 == 0 else ["ours", "stock"]
            for model in [options.model] if options.model else ["tiny", "mid"]:
                for who in [options.only] if options.only else order:
                    found, prompt = bench.one(model, who)
                    print(f"pair {number + 1} {model} {who}: {found} {prompt}", file=sys.stderr, flush=True)
                    if who == "ours":
                        print(f"  of a step, in ms: {bench.parts}", file=sys.stderr, flush=True)
                    for name, value in found.items():
                        samples.setdefault(name, {"stock": [], "ours": []})[who].append(value)
                    if prompt:
                        beside[who].append(prompt)
            if not options.only:
                for name, value in bench.local().items():
                    local.setdefault(name, []).append(value)
    if options.only:
        return
    result = report(samples, beside, local)
    (work / "engine.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
