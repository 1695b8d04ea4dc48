"""Peers that break the rules, on loopback sockets; after each of them the host still serves the next."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from echo_protocol import echo
from hypothesis import example, given
from hypothesis import strategies as st
from raw_sockets import take

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, StreamReset
from kwaainet_bridge.net import Host, HostConfig, Libp2pHost, Stream, multistream, open_host
from kwaainet_bridge.net.addresses import parse_binary_address, split_peer_address
from kwaainet_bridge.net.channel import ConnectionLost, SecureChannel, secure_outbound
from kwaainet_bridge.net.connection import YAMUX
from kwaainet_bridge.net.identify import IDENTIFY, IDENTIFY_PUSH
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.kademlia import KAD
from kwaainet_bridge.net.library import noise_transport
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.multistream import ByteChannel
from kwaainet_bridge.net.ping import PING
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import DATA, INITIAL_WINDOW, SYN, WINDOW_UPDATE, encode_header

HEADER = b"\x13/multistream/1.0.0\n"


_opened: list[trio.SocketStream] = []


def close_sockets() -> None:
    while _opened:
        _opened.pop().socket.close()


@pytest.fixture
async def server(server: Host) -> AsyncIterator[Host]:
    yield server
    close_sockets()


@pytest.fixture
async def client(client: Host) -> AsyncIterator[Host]:
    yield client
    close_sockets()


async def tcp(host: Host) -> trio.SocketStream:
    _, address = split_peer_address(host.addresses()[0])
    _opened.append(await trio.open_tcp_stream(address.host, address.port))
    return _opened[-1]


async def secured(host: Host, identity: Identity) -> SecureChannel:
    """Connect and agree on yamux, and no further."""
    socket = take(await tcp(host), initiator=True)
    channel = await secure_outbound(socket, noise_transport(identity), host.peer_id)
    await multistream.propose(channel, YAMUX)
    return channel


@asynccontextmanager
async def muxed(host: Host) -> AsyncIterator[YamuxConnection]:
    """Connect, with a muxer whose streams the test fills by hand."""
    channel = await secured(host, Identity.generate("ed25519"))
    connection = YamuxConnection(channel, host.peer_id, initiator=True, accept=lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection
        await connection.close()


async def assert_serves(server: Host, client: Host) -> None:
    await client.connect(server.addresses()[0])
    stream = await client.open_stream(server.peer_id, "Echo.run")
    await stream.write(b"still here")
    assert await stream.read(100) == b"still here"
    await stream.close()


async def assert_closes(channel: ByteChannel) -> None:
    """The peer ends the connection, in order or not."""
    with trio.fail_after(5), contextlib.suppress(ConnectionLost):
        while await channel.receive_some(1000):
            pass


# --- D1: connections that have ended must not count


async def connect_and_leave(host: Host, times: int) -> None:
    identity = Identity.generate("ed25519")
    for _ in range(times):
        (await secured(host, identity)).abort()


async def test_ended_connections_leave_their_place(client: Host) -> None:
    config = HostConfig(Identity.generate("ed25519"), limits=Limits(connections=4))
    async with open_host(config) as server:
        server.serve("Echo.run", echo_once)
        await connect_and_leave(server, 20)
        await assert_serves(server, client)


@pytest.mark.slow
async def test_the_1001st_connection_is_served(client: Host) -> None:
    config = HostConfig(Identity.generate("ed25519"), limits=Limits(connections=100))
    async with open_host(config) as server:
        server.serve("Echo.run", echo_once)
        await connect_and_leave(server, 1000)
        await assert_serves(server, client)
        assert server.connections.count <= 2  # the last one to leave may still be on its way out


async def test_one_peer_keeps_a_few_connections(server: Host) -> None:
    identity = Identity.generate("ed25519")
    kept = [await secured(server, identity) for _ in range(defaults.MAX_CONNECTIONS_PER_PEER + 3)]
    while server.connections.count > defaults.MAX_CONNECTIONS_PER_PEER:
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert server.connected_peers() == [identity.peer_id]
    for channel in kept:
        channel.abort()


async def test_a_silent_connection_is_closed(server: Host, client: Host, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "HANDSHAKE_SECONDS", 0.05)
    stream = await tcp(server)
    assert await stream.receive_some(100) == b""
    assert server.connections.count == 0


# --- D2: what a stream carries cannot stop the host


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff" * 100,
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        HEADER + b"\x05no-newline",
        HEADER + b"\x81\x08" + b"x" * 1025,
        HEADER + b"\x05abc\xff\n" * 40,
    ],
    ids=["nothing", "ff", "empty", "http", "length", "newline", "long", "many"],
)
async def test_garbage_instead_of_a_protocol(server: Host, client: Host, sent: bytes) -> None:
    async with muxed(server) as connection:
        stream = await connection.open_stream()
        if sent:
            await stream.write(sent)
        else:
            await stream.close()
        other = await connection.open_stream()  # the connection goes on, too
        await multistream.propose(other, "Echo.run")
        await other.write(b"x")
        assert await other.read(10) == b"x"
    await assert_serves(server, client)


async def test_a_name_that_is_not_utf8_is_not_available(server: Host) -> None:
    async with muxed(server) as connection:
        stream = await connection.open_stream()
        await stream.write(HEADER + b"\x04\xff\xfe\xfd\n" + b"\x09Echo.run\n" + b"payload")
        assert await stream.read(len(HEADER)) == HEADER
        answers = b""
        while not answers.endswith(b"payload"):
            answers += await stream.read(100)
        assert answers == b"\x03na\n" + b"\x09Echo.run\n" + b"payload"


async def test_a_stream_without_a_proposal_is_reset(server: Host, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "NEGOTIATION_SECONDS", 0.05)
    async with muxed(server) as connection:
        stream = await connection.open_stream()
        stream.announce()
        with pytest.raises(StreamReset):
            await stream.read(100)


@pytest.mark.parametrize(
    "protocol", ["/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0"]
)
@pytest.mark.parametrize("sent", [b"\xff" * 12, b"\xff\xff\xff\xff\x7f", b"\x05abcde", b"\x03\x0a\xff\x01"])
async def test_garbage_on_every_protocol(server: Host, client: Host, protocol: str, sent: bytes) -> None:
    async with muxed(server) as connection:
        stream = await connection.open_stream()
        await multistream.propose(stream, protocol)
        await stream.write(sent)
        await stream.close()
    await assert_serves(server, client)


async def test_garbage_instead_of_yamux(server: Host, client: Host) -> None:
    channel = await secured(server, Identity.generate("ed25519"))
    await channel.send_all(b"\xff" * 1000)
    await assert_closes(channel)
    await assert_serves(server, client)


async def test_garbage_instead_of_noise_messages(server: Host, client: Host) -> None:
    channel = await secured(server, Identity.generate("ed25519"))
    await channel.socket.send_all(b"\x00\x20" + bytes(32))
    await assert_closes(channel)
    await assert_serves(server, client)


@pytest.mark.parametrize(
    "sent", [b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", HEADER + b"\x07/noise\n" + b"\x00\x04abcd"]
)
async def test_garbage_on_tcp(server: Host, client: Host, sent: bytes) -> None:
    socket = take(await tcp(server), initiator=True)
    await socket.send_all(sent)
    await assert_closes(socket)
    await assert_serves(server, client)


# --- D3: noise and nothing else


async def test_only_noise_is_offered(server: Host) -> None:
    socket = take(await tcp(server), initiator=True)
    protocols = (b"/tls/1.0.0", b"/plaintext/2.0.0", b"/plaintext/1.0.0", b"/secio/1.0.0", b"ls", b"/noise")
    await socket.send_all(HEADER + b"".join(bytes([len(p) + 1]) + p + b"\n" for p in protocols))
    answer = b""
    while not answer.endswith(b"/noise\n"):
        answer += await socket.receive_some(1000)
    assert answer == HEADER + b"\x03na\n" * 5 + b"\x07/noise\n"


async def test_another_identity_cannot_be_claimed(server: Host) -> None:
    """A key signs the noise key of its session: knowing a public key is not enough."""
    victim, attacker = Identity.generate("ed25519"), Identity.generate("ed25519")
    transport = noise_transport(attacker)
    claimed = noise_transport(victim).libp2p_privkey.get_public_key()

    class Forged:
        """Shows the victim's public key and signs with the attacker's private one."""

        def __init__(self, real) -> None:
            self.real = real

        def sign(self, data: bytes) -> bytes:
            return self.real.sign(data)

        def get_public_key(self):
            return claimed

    transport.libp2p_privkey = Forged(transport.libp2p_privkey)
    socket = take(await tcp(server), initiator=True)
    channel = await secure_outbound(socket, transport, server.peer_id)  # our half is done before theirs
    await assert_closes(channel)
    assert server.connected_peers() == []


async def echo_once(stream) -> None:
    await stream.write(await stream.read(1000))


EVIL_ADDRESS = bytes.fromhex("2a2203dbbb03cb82")  # for which the address library raises a TypeError


async def test_an_address_that_breaks_its_parser(server: Host) -> None:
    """Said by a peer of itself; it must end neither the host nor the connection."""

    async def introduce(stream: Stream) -> None:
        message = b"\x12" + bytes([len(EVIL_ADDRESS)]) + EVIL_ADDRESS
        await stream.write(bytes([len(message)]) + message)

    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as evil:
        evil.unserve(IDENTIFY)
        evil.serve(IDENTIFY, introduce)
        await evil.connect(server.addresses()[0])
        await server.wait_identified()
        stream = await evil.open_stream(server.peer_id, "Echo.run")
        await stream.write(b"on")
        assert await stream.read(10) == b"on"
        await stream.close()


@given(st.binary(max_size=40))
@example(EVIL_ADDRESS)
def test_any_announced_address_is_one_or_none(data: bytes) -> None:
    parse_binary_address(data)


async def test_unproven_connections_are_bounded(client: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_HANDSHAKES", 3)
    async with open_host(HostConfig(Identity.generate("ed25519"))) as host:
        silent = [await tcp(host) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        late = await tcp(host)
        with trio.fail_after(5):
            assert await late.receive_some(10) == b""
        for stream in silent:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await client.connect(host.addresses()[0])


# --- one peer's excess is not the others' trouble


@asynccontextmanager
async def limited_server(**limits: int) -> AsyncIterator[Libp2pHost]:
    config = HostConfig(Identity.generate("ed25519"), limits=Limits(**limits))
    async with open_host(config) as host:
        host.serve("Echo.run", echo)
        yield host
        close_sockets()


async def test_streams_without_end(client: Host) -> None:
    async with limited_server(streams=100) as server, muxed(server) as connection:
        for _ in range(3 * defaults.MAX_UNACKNOWLEDGED_STREAMS):
            stream = await connection.open_stream()
            await stream.write(HEADER)
        await connection.ping()
        assert server._inbound.running <= 51
        assert server._memory.used <= 51 * INITIAL_WINDOW
        await assert_serves(server, client)


async def test_streams_that_are_reset_as_soon_as_they_are_open(client: Host) -> None:
    async with limited_server(streams=100) as server, muxed(server) as connection:
        for _ in range(2000):
            stream = await connection.open_stream()
            await stream.write(HEADER)
            await stream.reset()
        await connection.ping()
        await assert_serves(server, client)
        with trio.fail_after(5):
            while server._inbound.running > 1:  # the friend's
                await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize("length", [INITIAL_WINDOW + 1, (1 << 32) - 1])
async def test_frames_that_claim_too_much(client: Host, length: int) -> None:
    async with limited_server() as server:
        channel = await secured(server, Identity.generate("ed25519"))
        await channel.send_all(encode_header(WINDOW_UPDATE, SYN, 1, 0) + encode_header(DATA, 0, 1, length))
        await assert_closes(channel)
        await assert_serves(server, client)


async def test_a_peer_that_never_grants_window(client: Host) -> None:
    """It asks for echoes and reads none: handlers wait, within the budget, and nobody else does."""
    buffers = 8 * defaults.MIB
    async with limited_server(streams=20, buffer_bytes=buffers) as server, muxed(server) as connection:
        for _ in range(15):
            stream = await connection.open_stream()
            with contextlib.suppress(NetworkError):
                await multistream.propose(stream, "Echo.run")
                with trio.move_on_after(0.02):
                    await stream.write(bytes(2 * INITIAL_WINDOW))
        assert 1 < server._inbound.running <= 11
        [theirs] = server.connections
        held = sum(stream._buffered for stream in theirs._streams.values())
        assert held <= server._memory.used <= buffers // 2
        await assert_serves(server, client)


async def test_trickles(client: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then, in each phase of a connection, gets nobody past a deadline."""
    monkeypatch.setattr(defaults, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(defaults, "NEGOTIATION_SECONDS", 0.2)

    async def trickle(channel: ByteChannel) -> None:
        with trio.fail_after(5), contextlib.suppress(NetworkError):
            for byte in HEADER * 100:
                await channel.send_all(bytes([byte]))
                await trio.sleep(0.05)
            pytest.fail("nobody ended it")

    async with limited_server() as server, muxed(server) as connection, trio.open_nursery() as nursery:
        nursery.start_soon(trickle, take(await tcp(server), initiator=True))
        nursery.start_soon(trickle, await connection.open_stream())
        push = await connection.open_stream()
        await multistream.propose(push, IDENTIFY_PUSH)
        await push.write(b"\xff\x7f")
        nursery.start_soon(trickle, push)
        await assert_serves(server, client)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert server._memory.used == 0


async def test_a_connection_that_trickles_frames(client: Host) -> None:
    """The session goes on, at the price of a connection, and is no trouble to others."""
    async with limited_server() as server:
        channel = await secured(server, Identity.generate("ed25519"))
        for byte in encode_header(WINDOW_UPDATE, SYN, 1, 0) + encode_header(DATA, 0, 1, 100):
            await channel.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked(0.001)
        await assert_serves(server, client)
        assert server._memory.used <= 3 * INITIAL_WINDOW
        channel.abort()


@pytest.mark.parametrize("protocol", [PING, KAD])
async def test_a_burst_of_small_requests_gives_way_to_others(
    server: Host, client: Host, protocol: str
) -> None:
    """Reads and writes that need not wait do not yield: so whoever serves many requests of one read has to."""
    request = bytes(32) if protocol == PING else b"\x02\x08\x05"
    count = 2000
    await client.connect(server.addresses()[0])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    stream = await client.open_stream(server.peer_id, protocol)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await stream.write(request * count)
        left = len(request) * count
        while left:
            left -= len(await stream.read(left))
        nursery.cancel_scope.cancel()
    assert turns >= count
