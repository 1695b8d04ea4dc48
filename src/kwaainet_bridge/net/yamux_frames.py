"""Yamux frames, sans I/O: bytes in, headers and pieces of payload out.

``version u8 | type u8 | flags u16 | stream u32 | length u32``, big-endian; only data frames have a
payload, and ``length`` is its size. In the other types it is the window's increment, the ping's value or
the reason of leaving. Source: hashicorp/yamux spec.md; go-yamux v4.0.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from kwaainet_bridge.errors import RemoteError

DATA: Final = 0
WINDOW_UPDATE: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

NORMAL_TERMINATION: Final = 0
PROTOCOL_ERROR: Final = 1

INITIAL_WINDOW: Final = 256 * 1024
"""Bytes that either side may send on a new stream before the first window update; fixed by the protocol."""

MAX_WINDOW: Final = (1 << 32) - 1

_VIEWED_BYTES = 16 * 1024

_HEADER = struct.Struct("!BBHII")
HEADER_BYTES: Final = _HEADER.size


class Header(NamedTuple):
    """A frame's header. The payload of a data frame follows as :class:`Payload` pieces."""

    type: int
    flags: int
    stream_id: int
    length: int


class Payload(NamedTuple):
    """Some of a data frame's payload; ``remaining`` bytes of it are still to come."""

    data: bytes | memoryview
    remaining: int


def encode_header(type_: int, flags: int, stream_id: int, length: int) -> bytes:
    """Encode a header; for data frames the caller sends ``length`` bytes of payload behind it."""
    return _HEADER.pack(0, type_, flags, stream_id, length)


def _cut(data: bytes, start: int, end: int) -> bytes | memoryview:
    """A piece of ``data``: a view of it where that saves a copy and does not keep much more than itself alive."""
    size = end - start
    return memoryview(data)[start:end] if size >= _VIEWED_BYTES and 2 * size >= len(data) else data[start:end]


class FrameParser:
    """Cuts a byte stream, in whatever pieces it arrives, into headers and payload pieces.

    Holds at most one incomplete header: payload is passed on as it comes, so the receiver checks a frame's
    length against the stream's window before a byte of it is kept.
    """

    def __init__(self) -> None:
        self._header = b""
        self._remaining = 0

    def feed(self, data: bytes) -> Iterator[Header | Payload]:
        """Parse ``data``, which must be iterated over to its end.

        Raises RemoteError on an unknown version or frame type, behind whatever precedes it.
        """
        offset, end = 0, len(data)
        while offset < end:
            if self._remaining:
                piece = _cut(data, offset, min(end, offset + self._remaining))
                offset += len(piece)
                self._remaining -= len(piece)
                yield Payload(piece, self._remaining)
                continue
            if self._header or end - offset < HEADER_BYTES:
                missing = HEADER_BYTES - len(self._header)
                self._header += data[offset : offset + missing]
                offset += missing
                if len(self._header) < HEADER_BYTES:
                    break
                fields, self._header = _HEADER.unpack(self._header), b""
            else:
                fields = _HEADER.unpack_from(data, offset)
                offset += HEADER_BYTES
            version, type_, flags, stream_id, length = fields
            if version != 0:
                raise RemoteError(f"yamux: version {version}")
            if type_ > GO_AWAY:
                raise RemoteError(f"yamux: frame of unknown type {type_}")
            if type_ == DATA:
                self._remaining = length
            yield Header(type_, flags, stream_id, length)
