"""Many of our DHT nodes in one process and in simulated time, without streams between them.

The nodes are ``DhtNode`` whole, with its chores. Only the way between two of them is replaced: a call waits 20 to
100 ms, then the other node's handler is called with the request as it is, neither encoded nor copied. A call to a node
that has died is not answered, and fails when its caller gives up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing
from trio._core import _run as trio_run

from kwaainet_bridge.errors import DeadlineExceeded
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.dht.messages import FIND
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.rpc import CallContext, RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

START = 1.7e9
NEAREST_SECONDS, FARTHEST_SECONDS = 0.02, 0.1
INTRODUCERS = 2
JOIN_AT_ONCE = 100


def clock() -> float:
    return START + trio.current_time()


def run_reproducibly(function: Callable[..., Any], *arguments: Any, seed: int) -> Any:
    """``trio.run`` in simulated time and with the same order of tasks for the same ``seed``.

    trio has no public switch for the order; this is the one that hypothesis uses.
    """
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # noqa: SLF001
    trio_run._r.seed(seed)  # noqa: SLF001
    return trio.run(function, *arguments, clock=trio.testing.MockClock(autojump_threshold=0))


@dataclass
class Trace:
    """The calls made for one read, and the hops by which searches learned of the nodes that they asked."""

    calls: int = 0
    hops: int = 0
    _depth: dict[bytes, int] = field(default_factory=dict)

    def found(self, peer: PeerId, response: Any) -> None:
        depth = self._depth.get(peer.raw, 1)
        self.hops = max(self.hops, depth)
        for result in response.results:
            for other in result.nearest_peer_ids:
                self._depth.setdefault(other, depth + 1)


TRACE: ContextVar[Trace | None] = ContextVar("TRACE", default=None)
"""Set by a reader: the tasks of its search inherit it, other calls of the same node do not."""


class _Server(RpcServer):
    """Keeps a node's handlers where callers find them."""

    def __init__(self, host: MemoryHost) -> None:
        super().__init__(host)
        self.handlers: dict[str, Any] = {}

    def mount(self, method: Any, handler: Any) -> None:
        self.handlers[method.name] = handler

    def unmount(self, method: Any) -> None:
        del self.handlers[method.name]


class _Client(RpcClient):
    def __init__(self, host: MemoryHost, network: Network) -> None:
        super().__init__(host)
        self._peer = host.peer_id
        self._network = network

    async def call(self, peer: PeerId, method: Any, request: Any, *, timeout: float) -> Any:
        self._network.calls += 1
        trace = TRACE.get()
        if trace is not None:
            trace.calls += 1
        delay = self._network.rng.uniform(NEAREST_SECONDS, FARTHEST_SECONDS)
        await trio.sleep(delay)
        server = self._network.servers.get(peer)
        if server is None:
            await trio.sleep(timeout - delay)
            raise DeadlineExceeded(f"{method.name} at {peer}: no answer within {timeout:g} s")
        response = await server.handlers[method.name](request, CallContext(self._peer, method.name))
        if trace is not None and method is FIND:
            trace.found(peer, response)
        return response


class Network:
    """The nodes that are alive, and what they cost: all calls that any of them made."""

    def __init__(self, nursery: trio.Nursery, rng: random.Random) -> None:
        self.rng = rng
        self.calls = 0
        self.alive: list[DhtNode] = []
        self.servers: dict[PeerId, _Server] = {}
        self._memory = MemoryNetwork(nursery)
        self._nursery = nursery
        self._hosts = 0
        self._ends: dict[DhtNode, trio.CancelScope] = {}

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        self._hosts += 1
        host = MemoryHost(self._memory, PeerId(b"\x12\x20" + self._hosts.to_bytes(32, "big")))
        server = self.servers[host.peer_id] = _Server(host)
        node = DhtNode(host, server, _Client(host, self), clock=clock, rng=self.rng)
        with trio.CancelScope() as self._ends[node]:
            async with node.running():
                if self.alive:
                    known = self.rng.sample(self.alive, min(INTRODUCERS, len(self.alive)))
                    await node.bootstrap([other.peer_id for other in known])
                self.alive.append(node)
                task_status.started()
                await trio.sleep_forever()

    async def grow(self, size: int) -> None:
        """Have nodes join until there are ``size``: never more at a time than are there, nor than JOIN_AT_ONCE."""
        while len(self.alive) < size:
            count = min(max(1, len(self.alive)), JOIN_AT_ONCE, size - len(self.alive))
            async with trio.open_nursery() as joining:
                for _ in range(count):
                    joining.start_soon(self.add)

    async def add(self) -> None:
        """One more node, through nodes that are there at the moment."""
        await self._nursery.start(self._live)

    def remove_one(self) -> None:
        """One node dies without a word."""
        node = self.alive.pop(self.rng.randrange(len(self.alive)))
        del self.servers[node.peer_id]
        self._ends.pop(node).cancel()
