"""Messages over a byte stream: what both ends of a call share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError, StreamClosed
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.method import AnyMessage
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.fields import Buffer, total
from kwaainet_bridge.wire.frames import FrameOrder

M = TypeVar("M", bound=AnyMessage)

_READ_BYTES = 256 * defaults.KIB  # one read of a stream: what a yamux window holds at first


def parse(kind: type[M], payload: bytes, method: str) -> M:
    """Decode a message. Raises RemoteError naming the method."""
    try:
        return kind.FromString(payload) if issubclass(kind, Message) else kind.read(payload)
    except DecodeError as e:
        raise RemoteError(f"{method}: {len(payload)} bytes are no {kind.__name__}") from e
    except RemoteError as e:
        raise RemoteError(f"{method}: {kind.__name__}: {e}") from e


def parts(message: AnyMessage) -> list[Buffer]:
    """The bytes of a message, in buffers to send one after the other."""
    return [message.SerializeToString()] if isinstance(message, Message) else message.parts()


async def read_delimited(
    stream: Stream, max_bytes: int, *, on_read: Callable[[int], None] = lambda _count: None
) -> bytes:
    """Read the one varint-delimited body of a unary call; bytes after it are ignored, as stock daemons do.

    Raises RemoteError for a length over ``max_bytes`` before reading on, StreamClosed if the stream ends
    first.
    """
    decoder = DelimitedDecoder(max_bytes)
    while True:
        data = await stream.read(_READ_BYTES)
        if not data:
            decoder.finish()
            raise StreamClosed(f"{stream.protocol}: {stream.remote} closed the stream without a message")
        on_read(len(data))
        if bodies := decoder.feed(data):
            return bodies[0]


class FrameReader(Generic[M]):
    """Reads the frames of one direction of a streaming call."""

    def __init__(
        self,
        stream: Stream,
        kind: type[M],
        max_message_bytes: int = defaults.MAX_FRAME_BYTES,
        *,
        order: FrameOrder = frames.MARKER_FIRST,
        on_read: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """``on_read`` is told how many bytes have arrived; what it raises comes out of :meth:`next`."""
        self._stream = stream
        self._kind = kind
        self._on_read = on_read
        self._decoder = frames.FrameDecoder(max_message_bytes, order=order)
        self._ready: deque[frames.Frame] = deque()

    async def next(self) -> frames.Frame | None:
        """The next frame, or None at the end of the stream on a frame boundary.

        Raises RemoteError when the stream ends inside a frame. Cancelled: nothing is lost.
        """
        while not self._ready:
            self._decoder.feed(b"")  # raises what was wrong behind the last good frame
            pieces = await self._stream.read_pieces(_READ_BYTES)
            if not pieces:
                self._decoder.finish()
                return None
            self._on_read(total(pieces))
            self._ready.extend(self._decoder.feed_pieces(pieces))
        return self._ready.popleft()

    def parse(self, frame: frames.Frame) -> M:
        return parse(self._kind, frame.payload, self._stream.protocol)

    def check_boundary(self) -> None:
        """Raise RemoteError if the bytes so far end inside a frame."""
        self._decoder.finish()
