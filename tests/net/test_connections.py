"""How many connections a host keeps, and which; hosts on loopback sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable
from kwaainet_bridge.net import Host, HostConfig, Libp2pHost, Stream, connections, multistream, open_host
from kwaainet_bridge.net.addresses import parse_binary_address, split_peer_address
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.ping import PING
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import GO_AWAY, NORMAL_TERMINATION


@asynccontextmanager
async def host(listen: bool = True, **limits) -> AsyncIterator[Libp2pHost]:
    config = HostConfig(
        Identity.generate("ed25519"),
        listen=["/ip4/127.0.0.1/tcp/0"] if listen else [],
        limits=Limits(**limits),
    )
    async with open_host(config) as opened:
        opened.serve("Echo.run", echo)
        yield opened


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.005)


async def stream_to(caller: Host, server: Host) -> Stream:
    stream = await caller.open_stream(server.peer_id, "Echo.run")
    await assert_echoes(stream)
    return stream


async def assert_echoes(stream: Stream) -> None:
    await stream.write(b"x")
    assert await stream.read(10) == b"x"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "CONNECTION_GRACE_SECONDS", 0)
    monkeypatch.setattr(defaults, "TEND_SECONDS", 0.02)
    monkeypatch.setattr(defaults, "RETIREMENT_SECONDS", 0.05)
    monkeypatch.setattr(defaults, "SURPLUS_SECONDS", 0.2)
    monkeypatch.setattr(defaults, "SURPLUS_OF_OTHERS_SECONDS", 0.3)


# --- watermarks


async def test_above_the_high_watermark_idle_ones_are_closed(impatient) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections_high=4, connections_low=2))
        callers = [await stack.enter_async_context(host(listen=False)) for _ in range(5)]
        for caller in callers:
            await caller.connect(server.addresses()[0])
            await until(lambda caller=caller: caller.peer_id in server.connected_peers())
        await until(lambda: server.connections.count == 2)
        assert server.connected_peers() == [c.peer_id for c in callers[3:]]  # the last to come
        await until(lambda: [bool(c.connected_peers()) for c in callers] == [False] * 3 + [True] * 2)


async def test_at_the_high_watermark_nothing_is_closed(impatient) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections_high=3, connections_low=1))
        for _ in range(3):
            caller = await stack.enter_async_context(host(listen=False))
            await caller.connect(server.addresses()[0])
        await until(lambda: server.connections.count == 3)
        await trio.sleep(0.2)
        assert server.connections.count == 3


async def test_what_is_used_protected_or_young_stays(impatient) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections_high=3, connections_low=1))
        callers = [await stack.enter_async_context(host(listen=False)) for _ in range(4)]
        used, protected, pinging, _ = callers
        server.protect(protected.peer_id, "test")
        for caller in callers:
            await caller.connect(server.addresses()[0])
            if caller is used:
                stream = await stream_to(caller, server)
            if caller is pinging:
                await caller.open_stream(server.peer_id, PING)  # costs nothing, so it counts for nothing
        await until(lambda: server.connections.count == 2)
        assert set(server.connected_peers()) == {used.peer_id, protected.peer_id}
        await assert_echoes(stream)


async def test_young_ones_are_left_alone(impatient, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "CONNECTION_GRACE_SECONDS", 3600)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections_high=1, connections_low=1))
        for _ in range(3):
            caller = await stack.enter_async_context(host(listen=False))
            await caller.connect(server.addresses()[0])
        await until(lambda: server.connections.count == 3)
        await trio.sleep(0.2)
        assert server.connections.count == 3
        monkeypatch.setattr(defaults, "CONNECTION_GRACE_SECONDS", 0)
        await until(lambda: server.connections.count == 1)


async def test_a_stream_that_crosses_the_farewell_is_served(impatient, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "RETIREMENT_SECONDS", 0.3)
    async with host() as server, host(listen=False) as caller:
        await caller.connect(server.addresses()[0])
        await until(lambda: bool(server.connected_peers()))
        [theirs] = server.connections
        [ours] = caller.connections
        stream = await ours.open_stream()
        server.connections._retire(theirs)
        server.connections._attention.set()
        await multistream.propose(stream, "Echo.run")
        assert not ours.usable
        await trio.sleep(0.5)
        await assert_echoes(stream)
        await stream.close()
        await until(lambda: not caller.connected_peers() and server.connections.count == 0)


# --- the hard limit


async def test_a_full_host_makes_room_for_a_newcomer() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections=2))
        callers = [await stack.enter_async_context(host(listen=False)) for _ in range(3)]
        for caller in callers:
            await caller.connect(server.addresses()[0])
            await until(lambda caller=caller: caller.peer_id in server.connected_peers())
        await until(lambda: server.connections.count == 2)
        assert server.connected_peers() == [c.peer_id for c in callers[1:]]


async def test_peers_that_ask_for_no_streams_and_stay_count_and_make_room() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections=2))
        for _ in range(4):
            caller = await stack.enter_async_context(host(listen=False))
            await caller.connect(server.addresses()[0])
            await until(lambda caller=caller: caller.peer_id in server.connected_peers())
            [connection] = caller.connections
            connection.send_frame(GO_AWAY, 0, 0, NORMAL_TERMINATION)
            await until(lambda caller=caller: caller.peer_id not in server.connected_peers())
        await until(lambda: server.connections.count == 2)


async def test_many_identities_do_not_fill_a_host_for_ever() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections=4))
        friend = await stack.enter_async_context(host(listen=False))
        friend.add_addresses(server.peer_id, server.addresses())
        kept = await stream_to(friend, server)
        for _ in range(12):
            stranger = await stack.enter_async_context(host(listen=False))
            await stranger.connect(server.addresses()[0])
            assert server.connections.count <= 4 + 1  # one may be on its way out
        late = await stack.enter_async_context(host(listen=False))
        late.add_addresses(server.peer_id, server.addresses())
        await stream_to(late, server)
        await assert_echoes(kept)


async def test_a_full_host_without_an_idle_connection_says_so_and_refuses() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections=2))
        streams = []
        for _ in range(2):
            caller = await stack.enter_async_context(host(listen=False))
            await caller.connect(server.addresses()[0])
            streams.append(await stream_to(caller, server))
        late = await stack.enter_async_context(host(listen=False))
        await late.connect(server.addresses()[0])
        [connection] = late.connections
        await connection.closed.wait()
        assert connection._peer_leaves  # told, not just cut off
        for stream in streams:
            await assert_echoes(stream)
        await streams[0].close()
        [first, _] = server.connections
        await until(lambda: not first.in_use)
        await late.connect(server.addresses()[0])
        await stream_to(late, server)


async def test_a_full_host_does_not_dial_either() -> None:
    async with host() as server, host() as other, host(listen=False, connections=1) as caller:
        await caller.connect(server.addresses()[0])
        stream = await stream_to(caller, server)
        with pytest.raises(PeerUnreachable, match=r"1 connections, all in use: raise limits\.connections"):
            await caller.connect(other.addresses()[0])
        await stream.close()
        await caller.connect(other.addresses()[0])
        await until(lambda: caller.connected_peers() == [other.peer_id])


async def test_unproven_connections_evict_nobody() -> None:
    async with host(connections=1) as server, host(listen=False) as caller:
        await caller.connect(server.addresses()[0])
        await until(lambda: bool(server.connected_peers()))
        _, address = split_peer_address(server.addresses()[0])
        silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(5)]
        await until(lambda: server.connections.count == 6)
        assert server.connected_peers() == [caller.peer_id]
        await stream_to(caller, server)
        for stream in silent:
            await stream.aclose()


async def test_unproven_connections_beyond_a_full_host_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(defaults, "OVERFLOW_HANDSHAKES", 3)
    async with host(connections=1) as server:
        _, address = split_peer_address(server.addresses()[0])
        silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(4)]
        await until(lambda: server.connections.count == 4)
        late = await trio.open_tcp_stream(address.host, address.port)
        with trio.fail_after(5):
            assert await late.receive_some(10) == b""
        for stream in [*silent, late]:
            await stream.aclose()


# --- by address


async def test_one_address_has_a_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = "203.0.114.7"
    monkeypatch.setattr(connections, "origin_of", lambda _: origin)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(host(connections_per_address=2))
        callers = [await stack.enter_async_context(host(listen=False)) for _ in range(3)]
        for caller in callers[:2]:
            await caller.connect(server.addresses()[0])
        await until(lambda: len(server.connected_peers()) == 2)
        with pytest.raises(NetworkError):
            await callers[2].connect(server.addresses()[0])
        origin = "203.0.114.8"
        await callers[2].connect(server.addresses()[0])
        await stream_to(callers[2], server)
        origin = "203.0.114.7"
        [gone] = callers[0].connections
        await gone.close()
        await until(lambda: server.connections.count == 2)
        await callers[0].connect(server.addresses()[0])


async def test_one_address_does_not_take_all_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "origin_of", lambda _: "203.0.114.7")
    monkeypatch.setattr(defaults, "MAX_HANDSHAKES_PER_ADDRESS", 2)
    async with host() as server, host(listen=False) as caller:
        _, address = split_peer_address(server.addresses()[0])
        silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(2)]
        await until(lambda: server.connections.count == 2)
        with pytest.raises(NetworkError):
            await caller.connect(server.addresses()[0])
        monkeypatch.setattr(connections, "origin_of", lambda _: "203.0.114.8")
        await caller.connect(server.addresses()[0])
        for stream in silent:
            await stream.aclose()
        await until(lambda: len(server.connections._origins) == 1)


# --- one connection for each peer


async def dial_each_other(one: Libp2pHost, two: Libp2pHost) -> None:
    """Both dial at once, so that there are two connections."""

    async def dial(caller: Libp2pHost, other: Libp2pHost) -> None:
        _, address = split_peer_address(other.addresses()[0])
        await caller._dialer.dial(other.peer_id, [address])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial, one, two)
        nursery.start_soon(dial, two, one)
    await until(lambda: one.connections.count == two.connections.count == 2)


def same(ours: YamuxConnection, theirs: YamuxConnection) -> bool:
    """Whether these are the two ends of one connection."""
    return parse_binary_address(ours.remote_address).port == theirs.local_port


@pytest.mark.parametrize("attempt", range(3))
async def test_two_that_dial_each_other_agree_on_one_connection(impatient, attempt: int) -> None:
    async with host() as one, host() as two:
        await dial_each_other(one, two)
        ours, theirs = one.connections.find(two.peer_id), two.connections.find(one.peer_id)
        assert same(ours, theirs)
        assert ours.initiator == (one.peer_id < two.peer_id)
        await until(lambda: one.connections.count == two.connections.count == 1)
        assert list(one.connections) == [ours]
        assert list(two.connections) == [theirs]


async def test_streams_on_the_other_connection_are_not_lost(impatient) -> None:
    async with host() as one, host() as two:
        await dial_each_other(one, two)
        kept = one.connections.find(two.peer_id)
        [surplus] = [c for c in one.connections if c is not kept]
        old = await one.open_stream_on(surplus, "Echo.run")
        await assert_echoes(old)
        await trio.sleep(0.6)  # long past the time at which idle ones are closed
        await assert_echoes(old)
        new = await stream_to(one, two)
        assert new.connection is kept
        await old.close()
        await until(lambda: one.connections.count == two.connections.count == 1)
        await assert_echoes(new)


async def test_a_peer_that_comes_back_is_met_on_its_new_connection() -> None:
    """It has lost the old one without our noticing, or it would not have dialled."""
    async with host() as one, host() as two:
        await dial_each_other(one, two)
        old = one.connections.find(two.peer_id)
        [new] = [c for c in one.connections if c is not old]
        new.opened_at = old.opened_at + defaults.DIAL_SECONDS + 1
        siblings = one.connections._live[two.peer_id]
        siblings.sort(key=lambda c: c.opened_at)
        assert one.connections.find(two.peer_id) is new
