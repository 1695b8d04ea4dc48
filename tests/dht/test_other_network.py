"""Two networks on one host: peers of the other one are answered, and nothing is asked of them or stored there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from kwaainet_bridge.hivemind.dht import DhtNode, Item
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


def peer(number: int) -> PeerId:
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


def clock() -> float:
    return 1e9 + trio.current_time()


class Nodes:
    def __init__(self, network: MemoryNetwork, stack: AsyncExitStack) -> None:
        self._network, self._stack = network, stack

    async def add(self, number: int, **options: Any) -> DhtNode:
        host = self._network.host(peer(number))
        node = DhtNode(host, RpcServer(host), RpcClient(host), clock=clock, **options)
        return await self._stack.enter_async_context(node.running())


@asynccontextmanager
async def some_nodes() -> AsyncIterator[Nodes]:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        yield Nodes(MemoryNetwork(nursery), stack)
        nursery.cancel_scope.cancel()


async def test_records_do_not_leak_to_peers_of_another_network(autojump_clock: object) -> None:
    async with some_nodes() as nodes:
        theirs = await nodes.add(3)
        ours = await nodes.add(1, admits=lambda candidate: candidate != theirs.peer_id)
        friend = await nodes.add(2, admits=lambda candidate: candidate != theirs.peer_id)
        await friend.bootstrap([ours.peer_id])
        await theirs.bootstrap([ours.peer_id])  # it is answered
        await trio.sleep(60)
        assert {contact.peer for contact in ours.neighbours()} == {friend.peer_id}
        for number in range(20):
            result = await ours.store(f"key {number}", number, clock() + 600)
            assert theirs.peer_id not in result.accepted
            assert friend.peer_id in result.accepted
        await trio.sleep(60)
        assert len(theirs._storage) == 0  # nor handed over
        assert len(friend._storage) == 20


async def test_store_at_goes_to_these_peers_and_nowhere_else(autojump_clock: object) -> None:
    async with some_nodes() as nodes:
        first, second, third = [await nodes.add(number) for number in (1, 2, 3)]
        visitor = await nodes.add(4, client_mode=True)
        expiration = clock() + 600
        await third.store("taken", 1, expiration + 60)
        results = await visitor.store_at(
            [first.peer_id, third.peer_id, peer(9)],
            [Item("key", "value", expiration), Item("taken", 2, expiration, None)],
        )
        assert set(results[0].accepted) == {first.peer_id, third.peer_id}
        assert results[1].accepted == (first.peer_id,)
        assert results[1].refused == (third.peer_id,)
        assert all(set(result.failed) == {peer(9)} for result in results)
        found = await first.get("key")
        assert found is not None
        assert found.value == "value"
        assert await second.get("key") is None
