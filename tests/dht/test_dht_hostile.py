"""A fifth of the nodes wants to hurt: honest reads and stores keep their success and, within twice, their cost.

The cost is simulated time and the number of calls, neither of which depends on the machine.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from dht_nodes import START, Swarm, clock, peer_id, swarm
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtId, DhtNode, Item
from kwaainet_bridge.hivemind.dht.messages import FIND, PING, STORE, StoreItem, store_request
from kwaainet_bridge.hivemind.dht.values import dictionary
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import CallContext, RpcServer
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import dht_pb2 as pb

LATER = START + 100_000.0
HONEST, HOSTILE, READS = 28, 7, 30


class Hostile:
    """Joins like any node, answers pings, takes every record and keeps none."""

    def __init__(self, nodes: Swarm, rng: random.Random) -> None:
        self.nodes = nodes
        self.rng = rng
        self.host = nodes.host()
        self.rpc = RpcClient(self.host)
        self.node_id = DhtId.random(rng)
        self.accomplices: list[Hostile] = []
        self.server = RpcServer(self.host)
        self.server.mount(PING, self.on_ping)
        self.server.mount(STORE, self.on_store)
        self.server.mount(FIND, self.on_find)

    @property
    def info(self) -> pb.NodeInfo:
        return pb.NodeInfo(node_id=self.node_id.to_bytes())

    async def on_ping(self, _request: pb.PingRequest, _context: CallContext) -> pb.PingResponse:
        await trio.lowlevel.checkpoint()
        return pb.PingResponse(peer=self.info, dht_time=clock(), available=True)

    async def on_store(self, request: pb.StoreRequest, _context: CallContext) -> pb.StoreResponse:
        await trio.lowlevel.checkpoint()
        return pb.StoreResponse(peer=self.info, store_ok=[True] * len(request.keys))

    async def on_find(self, request: pb.FindRequest, _context: CallContext) -> pb.FindResponse:
        await trio.lowlevel.checkpoint()
        return pb.FindResponse(
            peer=self.info, results=[self.result(DhtId.from_bytes(k, field="k")) for k in request.keys]
        )

    def result(self, _key: DhtId) -> pb.FindResult:
        return pb.FindResult()

    async def meet(self, node: DhtNode) -> None:
        """Have a node take note of us."""
        await self.rpc.call(node.peer_id, PING, pb.PingRequest(peer=self.info), timeout=3.0)

    async def attack(self, _keys: list[DhtId]) -> None:
        """What it does by itself while honest nodes store and read under ``keys``; cancelled at their end."""
        await trio.lowlevel.checkpoint()

    async def send(self, key: DhtId, items: list[StoreItem]) -> None:
        """Store at the nodes where honest ones look for ``key``."""
        for node in sorted(self.nodes.nodes, key=lambda node: node.node_id.distance(key))[:8]:
            await self.rpc.call(node.peer_id, STORE, store_request(items, self.info), timeout=3.0)


class Silent(Hostile):
    """Its answers never come."""

    async def on_find(self, _request: pb.FindRequest, _context: CallContext) -> pb.FindResponse:
        return await self.never()

    async def on_store(self, _request: pb.StoreRequest, _context: CallContext) -> pb.StoreResponse:
        return await self.never()

    async def never(self) -> Any:
        await trio.sleep_forever()


class Slow(Hostile):
    """Answers just before everybody gives up."""

    async def on_find(self, request: pb.FindRequest, context: CallContext) -> pb.FindResponse:
        await trio.sleep(defaults.DHT_CALL_SECONDS - 0.2)
        return await super().on_find(request, context)


class Liar(Hostile):
    """Names neighbours that do not exist, nearer to the key than anybody."""

    def result(self, key: DhtId) -> pb.FindResult:
        invented = [DhtId(key ^ self.rng.getrandbits(100)) for _ in range(defaults.DHT_BUCKET_SIZE)]
        return pb.FindResult(
            nearest_node_ids=[node_id.to_bytes() for node_id in invented],
            nearest_peer_ids=[self.peer() for _ in invented],
        )

    def peer(self) -> bytes:
        return peer_id(self.rng.getrandbits(200)).raw


class Colluder(Liar):
    """Names its accomplices under invented ids."""

    def peer(self) -> bytes:
        return self.rng.choice(self.accomplices).host.peer_id.raw


class Turncoat(Hostile):
    """Has another node id in each answer."""

    @property
    def info(self) -> pb.NodeInfo:
        return pb.NodeInfo(node_id=DhtId.random(self.rng).to_bytes())


class Bloater(Hostile):
    """Answers with dictionaries larger than a reader takes."""

    packed = pack(dictionary([(n, bytes(1000), LATER * 2) for n in range(1200)]))

    def result(self, _key: DhtId) -> pb.FindResult:
        return pb.FindResult(type=pb.FOUND_DICTIONARY, value=self.packed, expiration_time=math.inf)


class Flooder(Hostile):
    """Stores what never expires as fast as it is let, under honest keys and others, as records and into caches."""

    async def attack(self, keys: list[DhtId]) -> None:
        while True:
            key = self.rng.choice(keys)
            junk = [StoreItem.of(DhtId(key ^ n), None, bytes(100), math.inf) for n in range(1, 11)]
            junk += [
                StoreItem(key, pack(self.rng.getrandbits(32)), bytes(100), math.inf, in_cache=bool(n % 2))
                for n in range(10)
            ]
            await self.send(key, junk)


class Stuffer(Hostile):
    """Stores huge dictionaries that never expire under the honest keys, again and again."""

    async def attack(self, keys: list[DhtId]) -> None:
        while True:
            entries = [(self.rng.getrandbits(32), bytes(3000), math.inf) for _ in range(150)]
            for key in keys:
                await self.send(key, [StoreItem.of_record(key, dictionary(entries))])
            await trio.sleep(30)


class Babbler(Hostile):
    """Answers with bytes that mean nothing."""

    def result(self, _key: DhtId) -> pb.FindResult:
        kind = self.rng.choice([pb.FOUND_DICTIONARY, 77])
        return pb.FindResult(
            type=kind, value=self.rng.randbytes(50), expiration_time=math.inf, nearest_peer_ids=[b"x"]
        )


@dataclass
class Measured:
    stored: int = 0
    found: int = 0
    store_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


def keys_of(name: str) -> list[str]:
    return [f"{name} {n}" for n in range(READS)]


async def measure(nodes: Swarm, *, name: str) -> Measured:
    """Honest nodes store a dictionary for each key, and others read it."""
    rng = random.Random(7)
    measured = Measured()
    for n, key in enumerate(keys_of(name)):
        began = trio.current_time()
        result = await rng.choice(nodes.nodes).store(key, n, LATER, subkey="sub")
        measured.store_seconds.append(trio.current_time() - began)
        measured.stored += result.ok
        await trio.sleep(1)
    for n, key in enumerate(keys_of(name)):
        reader = rng.choice(nodes.nodes)
        called = nodes.clients[reader].called
        calls, began = len(called), trio.current_time()
        found = await reader.get(key)
        measured.seconds.append(trio.current_time() - began)
        measured.calls.append(called[calls:].count(FIND.name))
        if found is not None and found.is_dictionary and found.value.get("sub", (None,))[0] == n:
            measured.found += 1
        await trio.sleep(1)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize(
    "hostile", [Hostile, Silent, Slow, Liar, Colluder, Turncoat, Bloater, Flooder, Stuffer, Babbler]
)
async def test_honest_stores_and_reads_go_on_beside(
    autojump_clock: MockClock, hostile: type[Hostile]
) -> None:
    rng = random.Random(1)
    async with swarm(HONEST, far=True) as nodes:
        before = await measure(nodes, name="before")
        others = [hostile(nodes, rng) for _ in range(HOSTILE)]
        for other in others:
            other.accomplices = others
            for node in nodes.nodes:
                await other.meet(node)
        async with trio.open_nursery() as attacks:
            for other in others:
                attacks.start_soon(other.attack, [DhtId.of(key) for key in keys_of("during")])
            during = await measure(nodes, name="during")
            attacks.cancel_scope.cancel()
    assert before.stored == before.found == READS
    assert during.stored == during.found == READS
    assert statistics.mean(during.seconds) <= 2 * statistics.mean(before.seconds)
    assert statistics.mean(during.calls) <= 2 * statistics.mean(before.calls)
    assert statistics.mean(during.store_seconds) <= 2 * statistics.mean(before.store_seconds)
    assert max(during.seconds) <= 1.0


async def test_a_flood_of_stores_leaves_room_for_honest_records(autojump_clock: MockClock) -> None:
    """Seven peers store what never expires, until they are refused, at every node and under the honest keys too."""
    rng = random.Random(2)
    async with swarm(12, storage_bytes=400_000) as nodes:
        early = [Item(f"early {n}", n, LATER, subkey="sub") for n in range(20)]
        late = [Item(f"late {n}", n, LATER, subkey="sub") for n in range(20)]
        assert all(result.ok for result in await nodes.nodes[0].store_many(early))
        keys = [DhtId.of(item.key) for item in (*early, *late)]
        for _ in range(HOSTILE):
            other = Hostile(nodes, rng)
            junk = [StoreItem.of(DhtId.random(rng), None, bytes(500), math.inf) for _ in range(100)]
            junk += [StoreItem.of(key, n, bytes(500), math.inf) for key in keys for n in range(5)]
            junk += [
                StoreItem(key, pack(n), bytes(500), math.inf, in_cache=True) for key in keys for n in range(5)
            ]
            for node in nodes.nodes:
                await other.rpc.call(node.peer_id, STORE, store_request(junk, other.info), timeout=3.0)
        assert all(node._storage.used_bytes > 300_000 for node in nodes.nodes)
        results = await nodes.nodes[1].store_many(late)
        assert all(len(result.accepted) >= 3 for result in results)
        for node in nodes.nodes:
            found = await node.get_many([item.key for item in (*early, *late)])
            for item in (*early, *late):
                assert found[item.key].value["sub"] == (item.value, LATER), item.key


async def test_a_flood_of_node_ids_costs_no_more_than_the_table_holds(autojump_clock: MockClock) -> None:
    rng = random.Random(3)
    async with swarm(12) as nodes:
        for _ in range(300):
            await Turncoat(nodes, rng).meet(nodes.nodes[0])
        table = nodes.nodes[0]._contacts.table
        assert len(table._peers) <= 311
        assert (await nodes.nodes[0].store("key", 1, LATER)).ok
        assert (await nodes.nodes[3].get("key")).value == 1
