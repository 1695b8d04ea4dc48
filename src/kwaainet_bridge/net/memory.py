"""Streams in memory, with the semantics of the real ones; for tests and for calls within one process."""

from __future__ import annotations

import trio

from kwaainet_bridge.errors import StreamClosed, StreamReset
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.peer_id import PeerId


class _Pipe:
    """One direction: a bounded buffer with the three ways it can end."""

    def __init__(self, window: int) -> None:
        self.buffer = bytearray()
        self.window = window
        self.finished = False
        self.reset = False
        self.abandoned = False  # the reader left: writes are swallowed, as they are after a remote close
        self.changed = trio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemoryStream(Stream):
    """One end of :func:`memory_stream_pair`."""

    def __init__(self, remote: PeerId, protocol: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.remote = remote
        self.protocol = protocol
        self._in = incoming
        self._out = outgoing
        self._closed = False

    async def read(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise StreamClosed("read after close")
            if self._in.buffer:
                data = bytes(self._in.buffer[:max_bytes])
                del self._in.buffer[:max_bytes]
                self._in.notify()
                return data
            if self._in.reset:
                raise StreamReset("the peer reset the stream")
            if self._in.finished:
                return b""
            await self._in.changed.wait()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while True:
            if self._closed:
                raise StreamClosed("write after close")
            if self._out.reset or self._in.reset:
                raise StreamReset("the peer reset the stream")
            if not view or self._out.abandoned:
                return
            room = self._out.window - len(self._out.buffer)
            if room > 0:
                self._out.buffer += view[:room]
                view = view[room:]
                self._out.notify()
            else:
                await self._out.changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._out.finished = True
        self._in.abandoned = True
        self._in.buffer.clear()
        self._out.notify()
        self._in.notify()

    async def reset(self) -> None:
        self._closed = True
        self._out.reset = True
        self._in.reset = True
        self._out.notify()
        self._in.notify()


def memory_stream_pair(
    client: PeerId, server: PeerId, protocol: str, *, window: int = 256 * 1024
) -> tuple[MemoryStream, MemoryStream]:
    """Return (the client's end, the server's end); each direction buffers at most ``window`` bytes."""
    up, down = _Pipe(window), _Pipe(window)
    return MemoryStream(server, protocol, down, up), MemoryStream(client, protocol, up, down)
