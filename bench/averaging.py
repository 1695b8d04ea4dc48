"""Our averagers beside stock Hivemind's: how long a step and its all-reduce take, and what memory they need.

``python -m bench.averaging`` starts a group of our peers and one of stock peers for each number of peers, number of
float32 parameters and compression, and has them average in turn. Every peer is a process of its own (a stock one
with its DHT, its averager and its daemon in processes besides); all sit on this machine's loopback. Both kinds have the
same settings, stock peers with the patience of Hivemind's optimizers (without it a cut stream stops a group for good).
They look for groups of exactly that many, so nobody waits for more. Printed are medians, their ratios, and those of the
best values (``best``), which other work on the machine touches least:

* ``reduce``: seconds of the all-reduce, from the assembled group to the averaged tensors, of the slowest peer
* ``step``: seconds from asking all peers for a step to the last result, the search for the group included
* ``CPU``: seconds of all processes in that time
* ``memory``: the most that a peer had during its first step, the tensors included, in multiples of the tensors. The
  tensors and what the peer has beyond what it had with them before the step count; libraries do not. Ours by the
  kernel's high-water mark; stock: proportional set sizes of all its processes, looked at every 20 ms
* ``wrong stock``: stock steps after which somebody lacked part of the average, or that some peer did not get through
* ``MB/s``: one encrypted stream of ours without any averaging, both ends on this machine
* ``limit``: the time that all bytes of the group would take on that stream over the time that our all-reduce took
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from child_processes import Driver, PeerError
from stock_swarm import START_SECONDS, StockEnvironment

WITHIN = 300.0
KINDS = ("stock", "ours")
COMPRESSIONS = {"NONE": 4.0, "FLOAT16": 2.0, "BLOCKWISE_8BIT": 1.0}
"""Bytes of one value on the wire."""
TOLERANCE = {"NONE": 1e-4, "FLOAT16": 0.01, "BLOCKWISE_8BIT": 0.3}
"""Of an average: the largest value of a normal distribution is about 5, and eight bits hold it to 2 %, twice."""
TARGETS = {"reduce": 0.7, "step": 0.5}
MEMORY_TARGET = 3.0
SAMPLE_SECONDS = 0.02
SETTLE_SECONDS = 10.0
"""After a step that failed for some: others may still be in it."""
STREAM_BYTES = 64 * 1024 * 1024
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "bench" / "averaging.json"


@dataclass(frozen=True)
class Sample:
    """One step of a group, in seconds."""

    reduce: float
    step: float
    cpu: float
    right: bool
    """Whether everybody then had the mean of all. Stock peers miss a part now and then: their daemon cuts a stream."""


class Swarm:
    """The peers of one kind."""

    def __init__(self, kind: str, drivers: list[Driver], compression: str, elements: int) -> None:
        self.kind = kind
        self.drivers = drivers
        self._compression = compression
        self._elements = elements
        self._processes = [driver.members() for driver in drivers]

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """Send a command to all, and wait for all."""
        answers = [driver.begin(do, **arguments)[1] for driver in self.drivers]
        return [answer.result(WITHIN) for answer in answers]

    def _cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for of in self._processes for process in of)

    def step(self, seed: int) -> tuple[Sample, list[Any]]:
        """One step from new random numbers. ValueError if not all of our peers then have the mean of all."""
        for number, driver in enumerate(self.drivers):
            driver.ask("fill", seed=1000 * seed + number, within=WITHIN)
        before = self.ask("sample")
        cpu = self._cpu_seconds()
        answers = self.ask("step")
        cpu = self._cpu_seconds() - cpu
        means = [statistics.fmean(column) for column in zip(*before, strict=True)]
        wrong = max(abs(a - b) for sample in self.ask("sample") for a, b in zip(sample, means, strict=True))
        right = wrong <= TOLERANCE[self._compression]
        if self.kind == "ours" and not right:
            raise ValueError(f"an average is wrong by {wrong:g}")
        reduce, whole = (max(answer[name] for answer in answers) for name in ("reduce", "step"))
        return Sample(reduce, whole, cpu, right), answers

    def some_step(self, seed: int) -> Sample:
        """A step that succeeds: stock peers fail to find a group at times. That counts as a wrong one."""
        try:
            return self.step(seed)[0]
        except PeerError as e:
            if self.kind == "ours":
                raise
            print(f"stock: {e}", file=sys.stderr)
            time.sleep(SETTLE_SECONDS)
            return replace(self.step(seed)[0], right=False)

    def first_step(self, seed: int) -> float:
        """A step that warms up; returns the most memory of one peer during it, in multiples of the tensors."""
        if self.kind == "ours":
            peak = max(answer["peak"] for answer in self.step(seed)[1])
        else:
            with watched(self._processes[0]) as memory:
                self.step(seed)
            peak = max(memory) - memory[0]
        return 1 + peak / (4 * self._elements)


@contextmanager
def watched(processes: list[psutil.Process]) -> Iterator[list[int]]:
    """Memory of the processes together, shared pages counted once: before the block and again and again in it."""
    found = [_memory(processes)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            found.append(_memory(processes))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _memory(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@contextmanager
def swarm(kind: str, stock: StockEnvironment, peers: int, elements: int, compression: str) -> Iterator[Swarm]:
    with ExitStack() as stack:
        drivers = [stack.enter_context(_driver(kind, stock, number)) for number in range(peers)]
        for driver in drivers:
            driver.event("ready", within=START_SECONDS)
        about = {"elements": elements, "prefix": "bench", "compression": compression, "group": peers}
        first = drivers[0].ask("open", initial_peers=[], within=START_SECONDS, **about)
        others = [driver.begin("open", initial_peers=first[:1], **about)[1] for driver in drivers[1:]]
        for other in others:
            other.result(START_SECONDS)
        yield Swarm(kind, drivers, compression, elements)


def _driver(kind: str, stock: StockEnvironment, number: int) -> Driver:
    if kind == "stock":
        argv, env = [stock.python, Path(__file__).with_name("averaging_stock.py")], stock.variables
    else:
        argv, env = _ours("averaging_ours")
    log = stock.work / f"averaging-{kind}-{number}.log"
    log.unlink(missing_ok=True)
    return Driver(f"averaging-{kind}-{number}", argv, env=env, log=log)


def _ours(module: str) -> tuple[list[Any], dict[str, str]]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-W", "ignore", "-m", f"bench.{module}"], env


@contextmanager
def stream(stock: StockEnvironment) -> Iterator[Any]:
    """A function that measures bytes per second of one encrypted stream between two of our processes."""
    with ExitStack() as stack:
        ends = []
        for name in ("client", "server"):
            argv, env = _ours("net_ours")
            log = stock.work / f"averaging-{name}.log"
            ends.append(stack.enter_context(Driver(f"averaging-{name}", argv, env=env, log=log)))
        client, server = ends
        address = server.ask("open", name="near", within=START_SECONDS)
        client.ask("open", name="near", within=START_SECONDS)
        peer = client.ask("connect", name="near", address=address)

        def measure() -> float:
            answer = client.ask("bulk", name="near", peer=peer, size=STREAM_BYTES, count=3, within=WITHIN)
            return STREAM_BYTES / statistics.median(answer["seconds"])

        yield measure


def compare(
    stock: StockEnvironment, peers: int, elements: int, compression: str, pairs: int
) -> dict[str, Any]:
    samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    speeds = []
    with ExitStack() as stack:
        measure_stream = stack.enter_context(stream(stock))
        with ThreadPoolExecutor() as starting:
            make = [
                starting.submit(
                    lambda kind=kind: stack.enter_context(swarm(kind, stock, peers, elements, compression))
                )
                for kind in KINDS
            ]
            swarms = {kind: made.result() for kind, made in zip(KINDS, make, strict=True)}
        memory = {kind: of.first_step(0) for kind, of in swarms.items()}
        speeds.append(measure_stream())
        for pair in range(1, pairs + 1):
            for kind in KINDS if pair % 2 else KINDS[::-1]:
                sample = swarms[kind].some_step(pair)
                samples[kind].append(sample)
                print(f"{peers} x {elements} {compression} {pair} {kind}: {sample}", file=sys.stderr)
            speeds.append(measure_stream())
    row: dict[str, Any] = {"peers": peers, "parameters": elements, "compression": compression, "pairs": pairs}
    for name in ("reduce", "step", "cpu"):
        medians = {kind: statistics.median(getattr(s, name) for s in of) for kind, of in samples.items()}
        ratios = [
            getattr(ours, name) / getattr(theirs, name)
            for theirs, ours in zip(samples["stock"], samples["ours"], strict=True)
        ]
        row |= {f"{name} {kind}": median for kind, median in medians.items()}
        row |= {f"{name} ratio": medians["ours"] / medians["stock"]}
        best = {kind: min(getattr(s, name) for s in of) for kind, of in samples.items()}
        row |= {f"{name} best": best["ours"] / best["stock"]}
        row |= {f"{name} lowest": min(ratios), f"{name} highest": max(ratios)}
    row["wrong stock"] = sum(not sample.right for sample in samples["stock"])
    moved = 2 * (peers - 1) * elements * COMPRESSIONS[compression]
    speed = statistics.median(speeds)
    row |= {f"memory {kind}": of for kind, of in memory.items()}
    row |= {"MB/s": speed / 1e6, "limit": moved / speed / row["reduce ours"]}
    row["samples"] = {kind: [asdict(sample) for sample in of] for kind, of in samples.items()}
    return row


def report(rows: list[dict[str, Any]]) -> str:
    columns = ["peers", "parameters", "compression"]
    columns += [f"{name} {of}" for name in ("reduce", "step", "cpu") for of in (*KINDS, "ratio", "best")]
    columns += [*(f"memory {kind}" for kind in KINDS), "wrong stock", "MB/s", "limit"]
    lines = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def profile(stock: StockEnvironment, peers: int, elements: int, compression: str) -> str:
    """Where the CPU time of one of our peers goes in a step, on its event loop: its threads are not in it."""
    with swarm("ours", stock, peers, elements, compression) as ours:
        ours.first_step(0)
        ours.drivers[0].ask("profile", on=True)
        sample = ours.step(1)[0]
        return f"{sample}\n{ours.drivers[0].ask('profile', on=False)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.averaging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="steps of each kind (default: %(default)s)")
    add("--peers", type=int, nargs="+", default=[4, 8])
    add("--parameters", type=float, nargs="+", default=[1, 25], help="in millions")
    add("--compression", choices=COMPRESSIONS, nargs="+", default=list(COMPRESSIONS))
    add("--profile", action="store_true", help="only say where the time of one of our peers goes")
    add("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    work = options.output.parent.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work)
    rows = []
    for peers in options.peers:
        for millions in options.parameters:
            for compression in options.compression:
                elements = int(millions * 1e6)
                if options.profile:
                    print(profile(stock, peers, elements, compression))
                    continue
                began = time.perf_counter()
                rows.append(compare(stock, peers, elements, compression, options.pairs))
                print(f"{report(rows[-1:])}\n{time.perf_counter() - began:.0f} s", flush=True)
                options.output.write_text(json.dumps(rows, indent=1))
    if rows:
        print(report(rows))
        met = {name: [row[f"{name} ratio"] <= bound for row in rows] for name, bound in TARGETS.items()}
        met["memory"] = [row["memory ours"] <= MEMORY_TARGET for row in rows]
        for name, of in met.items():
            bound = TARGETS.get(name, MEMORY_TARGET)
            print(f"{name} <= {bound:g}{' of stock' if name in TARGETS else ''}: {sum(of)} of {len(of)} rows")


if __name__ == "__main__":
    main()
