"""Streams that peers open, counted and refused; hosts on loopback sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from echo_protocol import echo

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, StreamReset
from kwaainet_bridge.net import Host, HostConfig, Libp2pHost, Stream, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.yamux_frames import INITIAL_WINDOW

MIB = defaults.MIB


@asynccontextmanager
async def serving(**limits) -> AsyncIterator[Libp2pHost]:
    async with open_host(HostConfig(Identity.generate("ed25519"), limits=Limits(**limits))) as host:
        host.serve("Echo.run", echo)
        yield host


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.005)


async def opened(caller: Host, server: Host, protocol: str = "Echo.run") -> Stream | None:
    """A stream that is served, or None if it was refused."""
    stream = await caller.open_stream(server.peer_id, protocol)
    try:
        await stream.write(b"x")
        assert await stream.read(10) == b"x"
    except NetworkError:
        return None
    return stream


async def open_many(caller: Host, server: Host, number: int, protocol: str = "Echo.run") -> list[Stream]:
    streams = []
    for _ in range(number):
        try:
            stream = await opened(caller, server, protocol)
        except NetworkError:
            continue
        if stream is not None:
            streams.append(stream)
    return streams


async def close(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.close()


async def idle(server: Libp2pHost) -> None:
    await until(lambda: server._inbound.running == 0)
    assert server._memory.used == 0


async def test_streams_of_one_peer(client: Host) -> None:
    async with serving(streams_per_peer=3) as server:
        await client.connect(server.addresses()[0])
        await server.wait_identified()
        await until(lambda: server._inbound.running == 0)
        streams = await open_many(client, server, 6)
        assert len(streams) == 3
        await streams.pop().close()
        await until(lambda: server._inbound.running == 2)
        streams += await open_many(client, server, 6)
        assert len(streams) == 3
        await close(streams)
        await idle(server)


async def test_one_peer_leaves_streams_for_others(client: Host) -> None:
    async with serving(streams=8) as server, open_host(HostConfig(Identity.generate("ed25519"))) as other:
        await client.connect(server.addresses()[0])
        await client.wait_identified()
        greedy = await open_many(client, server, 20)
        assert len(greedy) == 4
        await other.connect(server.addresses()[0])
        assert len(await open_many(other, server, 1)) == 1


async def test_streams_of_one_protocol(client: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_STREAMS_PER_PROTOCOL_AND_PEER", 2)
    async with serving() as server:
        server.serve("Other.run", echo)
        await client.connect(server.addresses()[0])
        streams = await open_many(client, server, 5)
        assert len(streams) == 2
        streams += await open_many(client, server, 5, "Other.run")
        assert len(streams) == 4
        await close(streams)
        await idle(server)


async def test_streams_of_one_protocol_by_all_peers(client: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_STREAMS_PER_PROTOCOL", 5)
    async with serving() as server, open_host(HostConfig(Identity.generate("ed25519"))) as other:
        for caller in (client, other):
            await caller.connect(server.addresses()[0])
        assert [len(await open_many(caller, server, 9)) for caller in (client, other)] == [3, 1]


async def test_initial_windows_are_reserved(client: Host) -> None:
    async with serving(buffer_bytes=4 * INITIAL_WINDOW) as server:
        await client.connect(server.addresses()[0])
        await client.wait_identified()
        await server.wait_identified()
        streams = await open_many(client, server, 5)
        assert len(streams) == 2
        assert server._memory.used == 2 * INITIAL_WINDOW
        await close(streams)
        await idle(server)


@pytest.mark.parametrize("buffer", [2 * MIB, 64 * MIB])
async def test_windows_grow_within_the_budget_and_give_it_back(
    client: Host, monkeypatch: pytest.MonkeyPatch, buffer: int
) -> None:
    most = 0

    async def count(stream: Stream) -> None:
        nonlocal most
        total = 0
        while data := await stream.read(1 << 20):
            total += len(data)
            most = max(most, server._memory.used)
        assert total == 16 * MIB

    async with serving(buffer_bytes=buffer) as server:
        server.serve("Count.run", count)
        await client.connect(server.addresses()[0])
        [theirs] = client.connections
        await theirs.ping()
        for connection in server.connections:
            connection.round_trip_seconds = 1.0  # so far away that windows are what limits it
        stream = await client.open_stream(server.peer_id, "Count.run")
        await stream.write(bytes(16 * MIB))
        await stream.close()
        await idle(server)
    assert most <= buffer
    if buffer == 64 * MIB:
        assert most > 8 * MIB
    else:
        assert most > INITIAL_WINDOW


async def test_what_a_reset_leaves_unread_stays_reserved(client: Host) -> None:
    """Until the handler has ended: it may still read it."""
    go_on = trio.Event()

    async def late(stream: Stream) -> None:
        await stream.write(b"on")
        await go_on.wait()
        assert await stream.read(10) == b"early"

    async with serving() as server:
        server.serve("Late.run", late)
        await client.connect(server.addresses()[0])
        await client.wait_identified()
        await server.wait_identified()
        await until(lambda: server._inbound.running == 0)
        stream = await client.open_stream(server.peer_id, "Late.run")
        assert await stream.read(10) == b"on"
        await stream.write(b"early")
        await stream.reset()
        [connection] = server.connections
        await until(lambda: connection.open_streams == 0)
        assert server._inbound.running == 1
        assert server._memory.used == INITIAL_WINDOW
        go_on.set()
        await idle(server)


async def test_handlers_count_until_they_end(client: Host) -> None:
    """A peer that resets its streams at once has no more handlers at work than one that does not."""
    go_on = trio.Event()
    running = most = 0

    async def slow(stream: Stream) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await stream.write(b"on")
        await go_on.wait()
        running -= 1

    async with serving(streams_per_peer=5) as server:
        server.serve("Slow.run", slow)
        await client.connect(server.addresses()[0])
        for _ in range(100):
            try:
                stream = await client.open_stream(server.peer_id, "Slow.run")
                assert await stream.read(10) == b"on"
            except StreamReset:
                continue
            await stream.reset()
        [connection] = client.connections
        await connection.ping()
        assert most == 5
        go_on.set()
        await idle(server)
        assert running == 0
        assert len(await open_many(client, server, 1)) == 1


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])
async def test_connections_leave_nothing_behind(times: int) -> None:
    async with serving() as server:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        before = descriptors()
        for number in range(times):
            config = HostConfig(Identity.generate("ed25519"), listen=())
            async with open_host(config) as caller:
                await caller.connect(server.addresses()[0])
                stream = await opened(caller, server)
                if number % 3 == 0:
                    await stream.close()
                elif number % 3 == 1:
                    await stream.reset()
        await until(lambda: server.connections.count == 0)
        await idle(server)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)
        assert descriptors() == before
        assert len(server._memory) == 0
        assert len(server._inbound._places) == 0
        assert not server.introductions._descriptions
        assert not server.connections._retired | server.connections._shared
