"""A large network of our DHT nodes in one process, in simulated time: hops, messages, churn, growth.

``python -m bench.dht_simulation --nodes 1000 10000`` builds a network of each size (dht_network.py), has records stored
in it, and measures reads by random nodes in three phases: ``quiet``, before anything changes; ``churn``, spread over
an hour in which ``--churn`` of the nodes die without a word and as many join, evenly one after the other; and
``after``, at the end of that hour. Records live 360 s and are renewed every two minutes, as by Petals' servers; each
batch of ten by another node every time.

Printed are, as means of one get: messages (calls that the reader makes, who asks every node himself), hops (the
longest chain of nodes of which each was learned from the one before) and simulated seconds; the share of gets that
found their record, whatever the reason of a failure; the nodes in a routing table, and the calls that all nodes
together made. It ends with the growth of each figure from one size to the next. A seed gives the same figures again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from bench.dht_network import TRACE, Network, Trace, clock, run_reproducibly
from kwaainet_bridge.hivemind.dht import DhtNode, Item

RECORDS, BATCH, READS = 60, 10, 300
RENEWAL_SECONDS, LIFETIME_SECONDS, HOUR = 120.0, 360.0, 3600.0
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench" / "dht_simulation.json"


@dataclass(frozen=True)
class Read:
    messages: int
    hops: int
    seconds: float
    found: bool


@dataclass(frozen=True)
class Figures:
    messages: float
    hops: float
    seconds: float
    slowest: float
    found: float
    table: float
    calls: int

    @classmethod
    def of(cls, reads: list[Read], network: Network, calls: int) -> Figures:
        return cls(
            messages=statistics.mean(read.messages for read in reads),
            hops=statistics.mean(read.hops for read in reads),
            seconds=statistics.mean(read.seconds for read in reads),
            slowest=max(read.seconds for read in reads),
            found=statistics.mean(read.found for read in reads),
            table=statistics.mean(len(node.neighbours()) for node in network.alive),
            calls=calls,
        )

    def __str__(self) -> str:
        return " ".join(f"{name} {value:,.2f}" for name, value in asdict(self).items())


async def read_one(network: Network) -> Read:
    node, number = network.rng.choice(network.alive), network.rng.randrange(RECORDS)
    trace, began = Trace(), trio.current_time()
    token = TRACE.set(trace)
    record = await node.get(f"key {number}")
    TRACE.reset(token)
    found = record is not None and record.value == number
    return Read(trace.calls, trace.hops, trio.current_time() - began, found)


async def renew(network: Network) -> None:
    """Each batch of records by some node, all at once."""

    async def store(node: DhtNode, numbers: range) -> None:
        await node.store_many([Item(f"key {n}", n, clock() + LIFETIME_SECONDS) for n in numbers])

    async with trio.open_nursery() as nursery:
        for first in range(0, RECORDS, BATCH):
            nursery.start_soon(store, network.rng.choice(network.alive), range(first, first + BATCH))


async def quiet(network: Network) -> Figures:
    """Reads one after the other."""
    before = network.calls
    reads = [await read_one(network) for _ in range(READS)]
    return Figures.of(reads, network, network.calls - before)


async def hour(network: Network, changes: int) -> Figures:
    """The hour in which nodes come and go."""
    before = network.calls
    reads: list[Read] = []

    async def read() -> None:
        reads.append(await read_one(network))

    async def change() -> None:
        network.remove_one()
        await network.add()

    events = [(HOUR * (n + 0.5) / changes, change) for n in range(changes)]
    events += [(HOUR * (n + 0.5) / READS, read) for n in range(READS)]
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        renewals = await nursery.start(_renew_for_ever, network)
        async with trio.open_nursery() as running:
            for at, event in sorted(events, key=lambda event: event[0]):
                await trio.sleep_until(began + at)
                running.start_soon(event)
        renewals.cancel()
    return Figures.of(reads, network, network.calls - before)


async def _renew_for_ever(network: Network, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        while True:
            await trio.sleep(RENEWAL_SECONDS)
            await renew(network)


async def simulate(size: int, churn: float, seed: int) -> dict[str, Figures]:
    """One network from its first node to the end of the hour."""
    figures: dict[str, Figures] = {}

    def note(phase: str, result: Figures) -> None:
        figures[phase] = result
        print(f"{size} nodes, {phase}: {result}  [{time.process_time():.0f} s of CPU]", flush=True)

    async with trio.open_nursery() as nursery:
        network = Network(nursery, random.Random(seed))
        await network.grow(size)
        await renew(network)
        note("quiet", await quiet(network))
        if changes := round(churn * size):
            note("churn", await hour(network, changes))
            note("after", await quiet(network))
        nursery.cancel_scope.cancel()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--churn", type=float, default=0.2, help="share of the nodes that changes in an hour")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    gc.set_threshold(100_000, 50, 100)  # next to nothing of a network becomes garbage
    results: list[dict[str, Figures]] = [
        run_reproducibly(simulate, size, options.churn, options.seed, seed=options.seed)
        for size in options.nodes
    ]
    for phase in results[0]:
        for former, latter in itertools.pairwise(results):
            old, new = asdict(former[phase]), asdict(latter[phase])
            growth = " ".join(f"{name} x{new[name] / old[name]:.2f}" for name in old)
            print(f"growth, {phase}: {growth}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    rows = [{phase: asdict(figures) for phase, figures in result.items()} for result in results]
    OUTPUT.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
