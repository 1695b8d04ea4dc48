"""Exchanges of one message: the body behind a varint that says how long it is."""

from __future__ import annotations

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.envelope import DelimitedDecoder

_READ_BYTES = 16 * 1024


async def read_one(stream: Stream, max_bytes: int) -> bytes:
    """Read the body of one message; what follows it is dropped.

    Raises RemoteError if it has more than ``max_bytes``, or if the stream ends before it is whole. The caller brings
    the deadline. Cancelled: the stream cannot be read any further.
    """
    decoder = DelimitedDecoder(max_bytes)
    while data := await stream.read(_READ_BYTES):
        for body in decoder.feed(data):
            return body
    decoder.finish()
    raise RemoteError(f"{stream.protocol}: {stream.remote} closed the stream without a message")
