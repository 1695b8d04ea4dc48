"""Peers that come across a host and want nothing from it; hosts on loopback sockets, time by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.kademlia import KAD
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.ping import ping
from kwaainet_bridge.wire.circuit import HOP

SWARM = {"swarm": ["Echo."]}


@asynccontextmanager
async def node(**limits) -> AsyncIterator[Libp2pHost]:
    """The host under test, of a swarm whose members serve or use ``Echo.*``."""
    config = HostConfig(Identity.generate("ed25519"), networks=SWARM, limits=Limits(**limits))
    async with open_host(config) as opened:
        opened.serve("Echo.run", echo)
        yield opened


class Neighbours:
    """Hosts that connect to ``node``."""

    def __init__(self, node: Libp2pHost, stack: AsyncExitStack) -> None:
        self.node = node
        self._stack = stack

    async def come(self, number: int = 1, *, serving: str | None = None) -> list[Libp2pHost]:
        new = []
        for _ in range(number):
            host = await self._stack.enter_async_context(
                open_host(HostConfig(Identity.generate("ed25519"), listen=()))
            )
            if serving is not None:
                host.serve(serving, echo)
            await host.connect(self.node.addresses()[0])
            new.append(host)
        await self.node.wait_identified()
        return new

    def left(self, hosts: list[Libp2pHost]) -> int:
        """How many of ``hosts`` are connected still."""
        connected = set(self.node.connected_peers())
        return sum(host.peer_id in connected for host in hosts)


@asynccontextmanager
async def gathering(**limits) -> AsyncIterator[Neighbours]:
    async with AsyncExitStack() as stack:
        yield Neighbours(await stack.enter_async_context(node(**limits)), stack)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.02)


async def pass_time(clock: trio.testing.MockClock, seconds: float) -> None:
    for _ in range(round(seconds)):
        clock.jump(1)
        await settle()


GRACE = defaults.CONNECTION_GRACE_SECONDS + 5  # and what closing takes


async def test_strangers_beyond_their_number_are_closed(mock_clock) -> None:
    async with gathering(connections=100, strangers=2) as neighbours:
        members = await neighbours.come(3, serving="Echo.run")
        strangers = await neighbours.come(5)
        assert all(KAD in neighbours.node.description(s.peer_id).protocols for s in strangers)
        await pass_time(mock_clock, GRACE - 10)
        assert neighbours.left(strangers) == 5  # a client may have been slow to begin
        await pass_time(mock_clock, 10)
        assert [neighbours.left([s]) for s in strangers] == [0, 0, 0, 1, 1]
        assert neighbours.left(members) == 3


async def test_a_client_is_known_by_what_it_uses(mock_clock) -> None:
    """A stock client lists no protocol of its swarm."""
    async with gathering(connections=100, strangers=0) as neighbours:
        [client, other] = await neighbours.come(2)
        stream = await client.open_stream(neighbours.node.peer_id, "Echo.run")
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        await stream.close()
        await ping(other, neighbours.node.peer_id)  # which everybody does
        await pass_time(mock_clock, GRACE)
        assert neighbours.left([client]) == 1
        assert neighbours.left([other]) == 0


async def test_who_only_looks_for_a_relay_is_a_stranger(mock_clock) -> None:
    async with gathering(connections=100, strangers=0) as neighbours:
        neighbours.node.traversal.offer(True)
        [host] = await neighbours.come()
        stream = await host.open_stream(neighbours.node.peer_id, HOP)
        await stream.write(b"\x02\x08\x01")  # CONNECT, to nobody
        assert await stream.read(100)
        await stream.close()
        await pass_time(mock_clock, GRACE)
        assert neighbours.left([host]) == 0


async def test_a_member_that_says_so_late(mock_clock) -> None:
    async with gathering(connections=100, strangers=0) as neighbours:
        [host] = await neighbours.come()
        await pass_time(mock_clock, 10)
        host.serve("Echo.late", echo)
        await pass_time(mock_clock, GRACE)
        assert neighbours.left([host]) == 1


async def test_nothing_is_kept_of_peers_that_have_left() -> None:
    async with gathering() as neighbours:
        for _ in range(10):
            [member] = await neighbours.come(serving="Echo.run")
            [connection] = member.connections
            stream = await connection.open_stream()
            stream.propose("Echo.run")
            await stream.write(b"x")
            await connection.close()
            await neighbours.node.wait_disconnected(member.peer_id)
        await settle()
        assert neighbours.node.connections.count == 0
        assert not neighbours.node._membership._spoken


async def test_a_protected_peer_is_no_stranger(mock_clock) -> None:
    async with gathering(connections=100, strangers=0) as neighbours:
        [bootstrap, other] = await neighbours.come(2)
        neighbours.node.protect(bootstrap.peer_id, "bootstrap")
        await pass_time(mock_clock, GRACE)
        assert neighbours.left([bootstrap]) == 1
        assert neighbours.left([other]) == 0


async def test_a_swarm_peer_gets_in_while_strangers_fill_the_host(mock_clock) -> None:
    async with gathering(connections=10, connections_high=10, strangers=10) as neighbours:
        strangers = await neighbours.come(8)
        await pass_time(mock_clock, GRACE)
        strangers += await neighbours.come(2)  # young ones
        members = await neighbours.come(6, serving="Echo.run")
        assert neighbours.left(members) == 6
        assert neighbours.left(strangers) == 4
        strangers += await neighbours.come(20)
        assert neighbours.left(members) == 6  # however long they are idle, and however new the others are
        assert neighbours.left(strangers) == 4


@pytest.mark.slow
async def test_500_strangers_do_not_displace_swarm_peers(mock_clock) -> None:
    async with gathering(connections=100) as neighbours:
        members = await neighbours.come(50, serving="Echo.run")
        await pass_time(mock_clock, GRACE)
        strangers = []
        for _ in range(5):
            strangers += await neighbours.come(100)  # more than there is room for
            assert neighbours.left(members) == 50
            await pass_time(mock_clock, GRACE)
            assert neighbours.left(members) == 50
            assert neighbours.left(strangers) <= 10
        [late] = await neighbours.come(serving="Echo.run")
        assert neighbours.left([late]) == 1
