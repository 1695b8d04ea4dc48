"""Nodes of one process on a network in memory, with one clock that runs on trio's."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

START = 1.7e9


def clock() -> float:
    return START + trio.current_time()


def peer_id(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


class CountingClient(RpcClient):
    """Keeps the names of the methods it called, and how many calls it had in flight at most."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.called: list[str] = []
        self.most_in_flight = 0
        self._in_flight = 0

    async def call(self, peer: PeerId, method: Any, request: Any, *, timeout: float) -> Any:
        self.called.append(method.name)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return await super().call(peer, method, request, timeout=timeout)
        finally:
            self._in_flight -= 1


class FarHost(MemoryHost):
    """A host whose calls take a round trip of 20 to 100 ms, whether they reach anybody or not."""

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        assert isinstance(self._network, FarNetwork)
        await trio.sleep(self._network.rng.uniform(0.02, 0.1))
        return await super().open_stream(peer, protocol)


class FarNetwork(MemoryNetwork):
    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.rng = random.Random(0)

    def host(self, peer_id: PeerId) -> MemoryHost:
        self.hosts[peer_id] = host = FarHost(self, peer_id)
        return host


class Swarm:
    """Starts nodes; each joins through one that was started before it."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack, *, far: bool = False) -> None:
        self.network = (FarNetwork if far else MemoryNetwork)(nursery)
        self.nodes: list[DhtNode] = []
        self.clients: dict[DhtNode, CountingClient] = {}
        self._stack = stack
        self._random = random.Random(0)
        self._hosts = 0

    def host(self) -> MemoryHost:
        self._hosts += 1
        return self.network.host(peer_id(self._hosts))

    async def start(self, *, join: bool = True, clock: Any = clock, **options: Any) -> DhtNode:
        host = self.host()
        client = CountingClient(host)
        node = DhtNode(host, RpcServer(host), client, clock=clock, rng=self._random, **options)
        self.clients[node] = client
        await self._stack.enter_async_context(node.running())
        known = [node for node in self.nodes if not node.client_mode]
        if known and join:
            results = await node.bootstrap([self._random.choice(known).peer_id])
            assert all(result.ok for result in results), results
        self.nodes.append(node)
        return node

    def take_down(self, node: DhtNode) -> None:
        self.network.down.add(node.peer_id)


@asynccontextmanager
async def swarm(size: int = 0, *, far: bool = False, **options: Any) -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        async with AsyncExitStack() as stack:
            swarm = Swarm(nursery, stack, far=far)
            for _ in range(size):
                await swarm.start(**options)
            yield swarm
        nursery.cancel_scope.cancel()
