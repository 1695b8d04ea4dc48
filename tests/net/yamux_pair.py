"""Channels in memory for the muxer: one that ends in a script, and pairs of connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

from kwaainet_bridge.net.channel import ConnectionLost
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import FrameParser, Header, Payload, encode_header
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

CLIENT, SERVER = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in (1, 2))


class MemoryChannel:
    """What a secured channel does, over trio's in-memory streams."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream

    async def receive_chunks(self) -> list[bytes]:
        try:
            data = await self.stream.receive_some(65536)
        except (trio.ClosedResourceError, trio.BrokenResourceError) as e:
            raise ConnectionLost("closed") from e
        return [bytes(data)] if data else []

    async def send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        try:
            await self.stream.send_all(b"".join(pieces))
        except (trio.ClosedResourceError, trio.BrokenResourceError) as e:
            raise ConnectionLost("closed") from e

    def abort(self) -> None:
        self.stream.send_stream.close()
        self.stream.receive_stream.close()


class Peer:
    """The other end of a connection, frame by frame."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self.parser = FrameParser()
        self.events: list[Header | Payload] = []

    async def send(self, type_: int, flags: int, stream_id: int, length: int, payload: bytes = b"") -> None:
        await self.stream.send_all(encode_header(type_, flags, stream_id, length) + payload)

    async def next(self) -> Header | Payload | None:
        while not self.events:
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            self.events = list(self.parser.feed(bytes(data)))
        return self.events.pop(0)

    async def expect(self, type_: int, flags: int = 0) -> Header:
        """Return the next frame of ``type_`` that carries ``flags``, skipping all before it."""
        while True:
            event = await self.next()
            assert event is not None, "the connection ended"
            if isinstance(event, Header) and event.type == type_ and event.flags & flags == flags:
                return event

    async def until_closed(self) -> list[Header]:
        headers = []
        while (event := await self.next()) is not None:
            if isinstance(event, Header):
                headers.append(event)
        return headers


def channels() -> tuple[trio.StapledStream, trio.StapledStream]:
    return trio.testing.memory_stream_pair()


@asynccontextmanager
async def against_script(
    *, initiator: bool
) -> AsyncIterator[tuple[YamuxConnection, Peer, list[YamuxStream]]]:
    """A running connection, the scripted peer at its other end, and the streams that the peer opened."""
    ours, theirs = channels()
    accepted: list[YamuxStream] = []
    connection = YamuxConnection(MemoryChannel(ours), SERVER, initiator=initiator, accept=accepted.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection, Peer(theirs), accepted
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected() -> AsyncIterator[
    tuple[YamuxConnection, YamuxConnection, trio.MemoryReceiveChannel[YamuxStream]]
]:
    """Two running connections and the streams that the first opens to the second."""
    ours, theirs = channels()
    send, receive = trio.open_memory_channel[YamuxStream](2000)
    client = YamuxConnection(MemoryChannel(ours), SERVER, initiator=True, accept=lambda _: None)
    server = YamuxConnection(MemoryChannel(theirs), CLIENT, initiator=False, accept=send.send_nowait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        with send, receive:
            yield client, server, receive
            nursery.cancel_scope.cancel()
