"""Our DHT nodes for tests with stock ones: on hosts of their own, with ids that can be chosen and calls that are kept."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

from kwaainet_bridge.hivemind.dht import DhtId, DhtNode
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

Answer = TypeVar("Answer")


class KeepingClient(RpcClient):
    """Keeps which peers it called, and for what."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.calls: list[tuple[str, Any]] = []

    async def call(self, peer: PeerId, method: Any, request: Any, *, timeout: float) -> Any:
        self.calls.append((str(peer), method))
        return await super().call(peer, method, request, timeout=timeout)


class _FirstDraw(random.Random):
    """Draws a chosen number first, by which a node gets its id."""

    def __init__(self, first: int) -> None:
        super().__init__(0)
        self._first: int | None = first

    def getrandbits(self, k: int, /) -> int:
        first, self._first = self._first, None
        return super().getrandbits(k) if first is None else first


def beside(key: str, distance: int) -> DhtId:
    """The node id at this distance from a key."""
    return DhtId(DhtId.of(key) ^ distance)


FAR = 1 << 159
"""Distance to the other half of all ids."""


class Node:
    """One of ours, with its host."""

    def __init__(self, host: Host, *, node_id: DhtId | None = None, **options: Any) -> None:
        self.host = host
        self.doomed = trio.Event()
        self.server = RpcServer(host)
        self.client = KeepingClient(host)
        rng = None if node_id is None else _FirstDraw(node_id)
        self.dht = DhtNode(host, self.server, self.client, rng=rng, **options)

    @property
    def peer(self) -> str:
        return str(self.host.peer_id)

    async def join(self, addresses: list[str]) -> None:
        peers = [await self.host.connect(address) for address in addresses]
        results = await self.dht.bootstrap(peers)
        assert all(result.ok for result in results), results


@asynccontextmanager
async def our_node(**options: Any) -> AsyncIterator[Node]:
    async with open_host(HostConfig(identity=Identity.generate("ed25519"))) as host:
        node = Node(host, **options)
        async with node.dht.running():
            yield node


async def live(options: dict[str, Any], task_status: trio.TaskStatus[Node]) -> None:
    """Run a node in a task of its own, until ``doomed``."""
    async with our_node(**options) as node:
        task_status.started(node)
        await node.doomed.wait()


async def until(
    probe: Callable[[], Awaitable[Answer]], wanted: Callable[[Answer], bool], *, within: float = 20.0
) -> Answer:
    """Ask a process that has no event for it until its answer is the wanted one."""
    with trio.fail_after(within):
        while not wanted(answer := await probe()):  # noqa: ASYNC110 - another process changes it
            await trio.sleep(0.05)
    return answer
