"""Streams whose protocol is proposed together with the first payload: bytes, refusals, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from yamux_pair import Peer, against_script, connected

from kwaainet_bridge.errors import (
    PeerUnreachable,
    ProtocolNotSupported,
    StreamClosed,
    StreamReset,
)
from kwaainet_bridge.net import Host, Stream, multistream
from kwaainet_bridge.net.yamux_frames import ACK, DATA, FIN, INITIAL_WINDOW, PING, RST, WINDOW_UPDATE, Payload
from kwaainet_bridge.rpc import RpcClient, RpcServer, streaming, unary
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse

HEADER = b"\x13/multistream/1.0.0\n"
AGREED = HEADER + b"\x09Echo.run\n"
REFUSED = HEADER + b"\x03na\n"
DRIVER = Path(__file__).with_name("pylibp2p_driver.py")


async def sent(peer: Peer) -> bytes:
    """The payload of the next data frame."""
    header = await peer.expect(DATA)
    data = b""
    while len(data) < header.length:
        event = await peer.next()
        assert isinstance(event, Payload)
        data += event.data
    return data


# --- the bytes


async def test_header_protocol_and_payload_are_one_frame() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        await peer.expect(PING)  # the first thing on a new connection
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(b"hello")
        first = await peer.stream.receive_some(1000)
        assert first == bytes.fromhex("000000010000000100000023") + AGREED + b"hello"
        await peer.send(DATA, ACK, 1, len(AGREED) + 3, AGREED + b"abc")
        assert await stream.read(100) == b"abc"


async def test_the_answer_may_come_in_any_pieces() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(b"hello")
        for byte in AGREED + b"abc":
            await peer.send(DATA, ACK, 1, 1, bytes([byte]))
        await peer.send(WINDOW_UPDATE, FIN, 1, 0)
        received = b""
        while data := await stream.read(2):
            received += data
        assert received == b"abc"


async def test_a_cancelled_first_read_loses_nothing() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await peer.send(DATA, ACK, 1, 10, AGREED[:10])
        with trio.move_on_after(0.02):
            await stream.read(100)
        await peer.send(DATA, 0, 1, len(AGREED) - 10 + 3, AGREED[10:] + b"abc")
        assert await stream.read(100) == b"abc"


async def test_the_first_read_proposes() -> None:
    async with against_script(initiator=True) as (connection, peer, _), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        nursery.start_soon(stream.read, 100)
        assert await sent(peer) == AGREED
        await peer.send(DATA, ACK, 1, len(AGREED) + 1, AGREED + b"x")


async def test_a_large_payload_needs_no_answer() -> None:
    """192 KiB leave before the peer has said anything at all."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(bytes(192 << 10))
        received = 0
        while received < (192 << 10) + len(AGREED):
            received += len(await sent(peer))
        assert received == (192 << 10) + len(AGREED)


# --- refusals


async def test_a_refusal_comes_out_of_the_first_read() -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(b"hello")
        await peer.send(DATA, ACK, 1, len(REFUSED), REFUSED)
        with pytest.raises(ProtocolNotSupported, match=r"does not serve Echo\.run"):
            await stream.read(100)
        await peer.expect(WINDOW_UPDATE, RST)
        with pytest.raises(StreamClosed):
            await stream.read(100)
        assert connection.open_streams == 0


async def test_a_refusal_and_a_reset() -> None:
    """As daemons do: the payload is no protocol name. The refusal counts, for a reader and for a writer."""
    async with against_script(initiator=True) as (connection, peer, _):
        for number in (1, 3):
            stream = await connection.open_stream()
            stream.propose("Echo.run")
            await stream.write(b"hello")
            await peer.send(DATA, ACK, number, len(REFUSED), REFUSED)
            await peer.send(WINDOW_UPDATE, RST, number, 0)
            while connection.open_streams:
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ProtocolNotSupported):
                await (stream.read(100) if number == 1 else stream.write(b"more"))


async def test_a_writer_without_window_hears_of_the_refusal() -> None:
    async with against_script(initiator=True) as (connection, peer, _), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        stream.propose("Echo.run")

        async def write() -> None:
            with pytest.raises(ProtocolNotSupported):
                await stream.write(bytes(2 * INITIAL_WINDOW))

        nursery.start_soon(write)
        await sent(peer)
        await peer.send(DATA, ACK, 1, len(REFUSED), REFUSED)
        await peer.send(WINDOW_UPDATE, RST, 1, 0)


async def test_a_writer_who_hears_of_a_reset_leaves_the_answer_to_the_reader() -> None:
    """A server that has had enough says why and resets; callers read on although sending failed."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(b"hello")
        await peer.send(DATA, ACK, 1, len(AGREED) + 3, AGREED + b"why")
        await peer.send(WINDOW_UPDATE, RST, 1, 0)
        await stream.wait_ended()
        for _ in range(2):
            with pytest.raises(StreamReset):
                await stream.write(b"more")
        assert await stream.read(100) == b"why"
        with pytest.raises(StreamReset):
            await stream.read(100)


@pytest.mark.parametrize(("answer", "expected"), [(AGREED + b"why", b"why"), (REFUSED, ProtocolNotSupported)])
@pytest.mark.parametrize("writer_first", [True, False])
async def test_a_waiting_reader_gets_the_answer_whoever_wakes_first(
    answer: bytes, expected: object, writer_first: bool
) -> None:
    async with against_script(initiator=True) as (connection, peer, _), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        got: list[object] = []

        async def write() -> None:
            with pytest.raises((StreamReset, ProtocolNotSupported)):
                await stream.write(bytes(2 * INITIAL_WINDOW))

        async def read() -> None:
            try:
                got.append(await stream.read(100))
            except Exception as e:
                got.append(type(e))

        nursery.start_soon(write)
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        if writer_first:  # else the order in which trio runs the two is random
            wake, stream._wake_reader = stream._wake_reader, lambda: None
        await peer.send(DATA, ACK, 1, len(answer), answer)
        await peer.send(WINDOW_UPDATE, RST, 1, 0)
        await stream.wait_ended()
        if writer_first:
            await trio.testing.wait_all_tasks_blocked()
            wake()
        nursery.cancel_scope.deadline = trio.current_time() + 5
        while not got:
            await trio.testing.wait_all_tasks_blocked()
        assert got == [expected]


@pytest.mark.parametrize("answer", [HEADER + b"\x04x.y\n", b"HTTP/1.1 400\r\n", HEADER + b"\x00"])
async def test_a_malformed_answer(answer: bytes) -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await peer.send(DATA, ACK, 1, len(answer), answer)
        with pytest.raises(PeerUnreachable, match=r"Echo\.run: multistream") as caught:
            await stream.read(100)
        assert caught.value.hop == "protocol"
        assert connection.usable


@pytest.mark.parametrize("flag", [FIN, RST])
async def test_a_peer_that_leaves_before_it_answers(flag: int) -> None:
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.write(b"hello")
        await peer.send(WINDOW_UPDATE, ACK | flag, 1, 0)
        with pytest.raises(StreamReset):
            await stream.read(100)


# --- endings before the first write


async def test_closed_before_any_write() -> None:
    """The peer's handler starts, and sees the end."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.close()
        assert await sent(peer) == AGREED
        await peer.expect(WINDOW_UPDATE, FIN)


async def test_reset_before_any_write() -> None:
    """The peer never hears of the stream."""
    async with against_script(initiator=True) as (connection, peer, _):
        stream = await connection.open_stream()
        stream.propose("Echo.run")
        await stream.reset()
        assert connection.open_streams == 0
        with pytest.raises(StreamClosed):
            await stream.read(1)
        other = await connection.open_stream()
        other.announce()
        await connection.close()
        assert {frame.stream_id for frame in await peer.until_closed()} == {0, other.stream_id}


async def test_the_connection_ends_before_any_write() -> None:
    async with connected() as (client, server, _):
        stream = await client.open_stream()
        stream.propose("Echo.run")
        await server.close()
        await client.closed.wait()
        with pytest.raises(StreamReset):
            await stream.read(1)
        with pytest.raises(StreamReset):
            await stream.write(b"x")
        await stream.close()
        await stream.reset()


# --- two of our hosts


ECHO = unary("Test.echo", ExpertRequest, ExpertResponse)
TALK = streaming("Test.talk", ExpertRequest, ExpertResponse)


async def identified(client: Host, server: Host) -> None:
    await client.connect(server.addresses()[0])
    await client.wait_identified()


async def test_a_served_protocol_is_not_waited_for(server: Host, client: Host, monkeypatch) -> None:
    await identified(client, server)
    stream = await client.open_stream(server.peer_id, "Echo.run")
    assert stream._proposal is not None
    await stream.write(b"hello")
    assert await stream.read(100) == b"hello"
    await stream.close()


async def test_a_protocol_that_identify_does_not_list_is_waited_for_once(server: Host, client: Host) -> None:
    await identified(client, server)
    with pytest.raises(ProtocolNotSupported, match=r"does not serve Late\.run"):
        await client.open_stream(server.peer_id, "Late.run")

    async def greet(stream: Stream) -> None:
        await stream.write(b"hi")

    server.serve("Late.run", greet)
    for _ in range(2):
        stream = await client.open_stream(server.peer_id, "Late.run")
        assert await stream.read(100) == b"hi"
        await stream.close()
    assert client.connections.find(server.peer_id).agreed == {"Late.run", "/ipfs/id/1.0.0"}


async def test_a_protocol_that_was_served(server: Host, client: Host) -> None:
    async def echo(request, context):
        return ExpertResponse(metadata=request.metadata)

    async def talk(call):
        async for _ in call:
            pass

    mounted = RpcServer(server)
    mounted.mount(ECHO, echo)
    mounted.mount_stream(TALK, talk)
    await identified(client, server)
    mounted.unmount(ECHO)
    mounted.unmount(TALK)
    caller = RpcClient(client)
    for size in (0, 1000, 200_000, 1 << 20):
        with pytest.raises(ProtocolNotSupported, match=r"Test\.echo"):
            await caller.call(server.peer_id, ECHO, ExpertRequest(metadata=bytes(size)), timeout=10)
    async with caller.stream(server.peer_id, TALK, open_timeout=5) as call:
        await call.send(ExpertRequest())
        with pytest.raises(ProtocolNotSupported, match=r"Test\.talk"):
            await call.receive()
    mounted.mount(ECHO, echo)
    answer = await caller.call(server.peer_id, ECHO, ExpertRequest(metadata=b"x"), timeout=10)
    assert answer.metadata == b"x"


# --- peers that are lazy towards us


@pytest.mark.parametrize(
    "pieces",
    [
        [AGREED + b"hello"],
        [AGREED, b"hello"],
        [HEADER, AGREED[len(HEADER) :] + b"hello"],
        [AGREED[:7], AGREED[7:25], AGREED[25:] + b"hel", b"lo"],
    ],
    ids=["one", "payload-later", "header-first", "cut"],
)
async def test_lazy_callers(server: Host, client: Host, pieces: list[bytes]) -> None:
    """One packet as of go-libp2p; header and name, then payload, as of rust-libp2p's V1Lazy."""
    await identified(client, server)
    stream = await client.connections.find(server.peer_id).open_stream()
    for piece in pieces:
        await stream.write(piece)
        await trio.testing.wait_all_tasks_blocked(0.001)
    received = b""
    while len(received) < len(AGREED) + 5:
        received += await stream.read(100)
    assert received == AGREED + b"hello"
    await stream.close()


async def test_an_answer_without_delay_and_one_in_two_parts() -> None:
    """A rust-libp2p listener sends its header when it has read ours; others answer each message by itself."""
    async with against_script(initiator=True) as (connection, peer, _):
        for number, pieces in ((1, [AGREED]), (3, [HEADER, AGREED[len(HEADER) :]])):
            stream = await connection.open_stream()
            stream.propose("Echo.run")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.agreed)
                await sent(peer)
                for piece in pieces:
                    await peer.send(DATA, ACK, number, len(piece), piece)


# --- an unmodified py-libp2p host


class PyLibp2p:
    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""
        self.address = ""

    async def line(self) -> str:
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some(4096)
            assert data, "the py-libp2p host ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def call(self, address: str, size: int) -> str:
        command = json.dumps({"address": address, "size": size}) + "\n"
        await self._process.stdin.send_all(command.encode())
        answer = json.loads(await self.line())
        assert "ok" in answer, answer
        return answer["ok"]


@asynccontextmanager
async def py_libp2p() -> AsyncIterator[PyLibp2p]:
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        command = [sys.executable, "-W", "ignore", str(DRIVER)]
        process = await nursery.start(partial(start, command, check=False, stderr=subprocess.DEVNULL))
        host = PyLibp2p(process)
        with trio.fail_after(30):
            host.address = await host.line()
        yield host
        nursery.cancel_scope.cancel()


async def test_py_libp2p_in_both_roles(server: Host, client: Host) -> None:
    async with py_libp2p() as theirs:
        peer = await client.connect(theirs.address)
        await client.wait_identified()
        for size in (5, 192 << 10):
            stream = await client.open_stream(peer, "Echo.run")
            assert stream._proposal is not None  # lazy
            payload = bytes(size)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, payload)
                received = b""
                while len(received) < size:
                    received += await stream.read(65536)
            assert received == payload
            await stream.close()
        with pytest.raises(ProtocolNotSupported):
            await client.open_stream(peer, "Nope.run")
        for size in (5, 192 << 10):
            assert await theirs.call(server.addresses()[0], size) == "same"
        stream = await client.open_stream(peer, "Echo.run")  # it lives
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        await stream.close()


@pytest.mark.slow
async def test_py_libp2p_with_transfers_and_many_streams(server: Host, client: Host) -> None:
    """More than any initial window both ways, beside short streams, some of which are reset half-way."""
    size = 8 << 20

    async def transfer() -> None:
        stream = await client.open_stream(peer, "Echo.run")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(size))
            received = 0
            while received < size:
                received += len(await stream.read(65536))
        await stream.close()

    async def short(number: int) -> None:
        stream = await client.open_stream(peer, "Echo.run")
        await stream.write(b"%03d" % number)
        if number % 4 == 3:
            await stream.reset()
            return
        received = b""
        while len(received) < 3:
            received += await stream.read(3)
        assert received == b"%03d" % number
        await stream.close()

    async with py_libp2p() as theirs:
        peer = await client.connect(theirs.address)
        await client.wait_identified()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transfer)
                for number in range(100):
                    nursery.start_soon(short, number)
            assert await theirs.call(server.addresses()[0], size) == "same"
            await short(0)  # it lives


async def test_the_answer_reader_is_bounded() -> None:
    """A peer cannot make the answer grow: a message over the limit is refused as it arrives."""
    proposal = multistream.Proposal("Echo.run")
    assert proposal.feed(HEADER) is None
    with pytest.raises(Exception, match="multistream: message of 65535 bytes"):
        proposal.feed(b"\xff\xff\x03")
