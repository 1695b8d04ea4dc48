"""A large network of our DHT nodes in one process, in simulated time: hops, messages, churn, growth.

``python -m bench.dht_simulation --nodes 100 1000`` builds a network of each size over streams in memory, where a call
takes 20 to 100 ms, and prints for each: the messages of one get (calls made by the reader, who asks every node
himself), its hops (the longest chain of nodes of which each was learned from the one before), its simulated seconds,
and how many of the records are found; then the same after an hour in which ``--churn`` of the nodes left and as many
joined, one at a time, while records are renewed every two minutes as Petals' servers do. It ends with the growth of
each figure from one size to the next. 1,000 nodes take minutes of CPU, most of it for the churn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio
import trio.testing

from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.hivemind.dht.messages import FIND
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

START = 1.7e9
RECORDS, READS = 60, 60
RENEWAL_SECONDS, LIFETIME_SECONDS, HOUR = 120.0, 360.0, 3600.0
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench" / "dht_simulation.json"


def clock() -> float:
    return START + trio.current_time()


class FarHost(MemoryHost):
    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        await trio.sleep(random.uniform(0.02, 0.1))
        return await super().open_stream(peer, protocol)


class CountingClient(RpcClient):
    """Counts calls, and for searches the hops by which their nodes were learned."""

    def __init__(self, host: MemoryHost) -> None:
        super().__init__(host)
        self.begin()

    def begin(self) -> None:
        self.calls = 0
        self.deepest = 0
        self._depth: dict[bytes, int] = {}

    async def call(self, peer: PeerId, method: Any, request: Any, *, timeout: float) -> Any:
        self.calls += 1
        response = await super().call(peer, method, request, timeout=timeout)
        if method is FIND:
            depth = self._depth.get(peer.raw, 1)
            self.deepest = max(self.deepest, depth)
            for result in response.results:
                for other in result.nearest_peer_ids:
                    self._depth.setdefault(other, depth + 1)
        return response


@dataclass(frozen=True)
class Figures:
    nodes: int
    messages: float
    hops: float
    seconds: float
    found: float
    table: float


class Network:
    def __init__(self, nursery: trio.Nursery, rng: random.Random) -> None:
        self.rng = rng
        self.alive: dict[DhtNode, CountingClient] = {}
        self._memory = MemoryNetwork(nursery)
        self._nursery = nursery
        self._hosts = 0
        self._ends: dict[DhtNode, trio.CancelScope] = {}

    async def _live(self, task_status: trio.TaskStatus[DhtNode]) -> None:
        self._hosts += 1
        host = FarHost(self._memory, PeerId(b"\x12\x20" + self._hosts.to_bytes(32, "big")))
        self._memory.hosts[host.peer_id] = host
        client = CountingClient(host)
        node = DhtNode(host, RpcServer(host), client, clock=clock, rng=self.rng)
        with trio.CancelScope() as scope:
            async with node.running():
                if self.alive:
                    known = self.rng.sample(list(self.alive), min(2, len(self.alive)))
                    await node.bootstrap([other.peer_id for other in known])
                self.alive[node] = client
                self._ends[node] = scope
                task_status.started(node)
                await trio.sleep_forever()

    async def add(self) -> DhtNode:
        node: DhtNode = await self._nursery.start(self._live)
        return node

    def remove(self, node: DhtNode) -> None:
        """It dies without a word."""
        self._memory.down.add(node.peer_id)
        del self.alive[node], self._memory.hosts[node.peer_id]
        self._ends.pop(node).cancel()

    async def store_all(self) -> None:
        items = [Item(f"key {n}", n, clock() + LIFETIME_SECONDS) for n in range(RECORDS)]
        await self.rng.choice(list(self.alive)).store_many(items)

    async def figures(self) -> Figures:
        messages, hops, seconds, found = [], [], [], 0
        for _ in range(READS):
            node = self.rng.choice(list(self.alive))
            client = self.alive[node]
            client.begin()
            number, began = self.rng.randrange(RECORDS), trio.current_time()
            record = await node.get(f"key {number}")
            messages.append(client.calls)
            hops.append(client.deepest)
            seconds.append(trio.current_time() - began)
            found += record is not None and record.value == number
        tables = [len(node.neighbours()) for node in self.alive]
        means = (statistics.mean(values) for values in (messages, hops, seconds))
        return Figures(len(self.alive), *means, found / READS, statistics.mean(tables))

    async def churn(self, share: float) -> None:
        """An hour in which nodes leave and join evenly, and records are renewed."""
        changes = round(share * len(self.alive))
        pause = HOUR / max(1, changes)
        renewed = trio.current_time()
        for _ in range(changes):
            await trio.sleep(pause)
            self.remove(self.rng.choice(list(self.alive)))
            await self.add()
            if trio.current_time() - renewed >= RENEWAL_SECONDS:
                renewed = trio.current_time()
                await self.store_all()


async def simulate(size: int, churn: float, seed: int) -> dict[str, Figures]:
    random.seed(seed)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        network = Network(nursery, random.Random(seed))
        for _ in range(size):
            await network.add()
        await network.store_all()
        figures = {"quiet": await network.figures()}
        if churn:
            await network.churn(churn)
            figures["churn"] = await network.figures()
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
    results: list[dict[str, Figures]] = []
    for size in options.nodes:
        began = time.process_time()
        results.append(
            trio.run(
                simulate,
                size,
                options.churn,
                options.seed,
                clock=trio.testing.MockClock(autojump_threshold=0),
            )
        )
        for phase, figures in results[-1].items():
            row = " ".join(
                f"{name} {value:.2f}" for name, value in asdict(figures).items() if name != "nodes"
            )
            print(f"{size} nodes, {phase}: {row}", flush=True)
        print(f"  {time.process_time() - began:.0f} s of CPU", flush=True)
    for former, latter in itertools.pairwise(results):
        old, new = asdict(former["quiet"]), asdict(latter["quiet"])
        growth = " ".join(f"{name} x{new[name] / old[name]:.2f}" for name in old)
        print(f"growth: {growth}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    rows = [{phase: asdict(figures) for phase, figures in result.items()} for result in results]
    OUTPUT.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
