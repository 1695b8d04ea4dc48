"""Frames of streaming calls: a marker, a length and a payload, in one of two orders.

``MARKER_FIRST`` is Hivemind's: ``[marker: 1 byte][length: 8 bytes, big-endian][payload]``. ``LENGTH_FIRST`` is
that of the protocols which this project defines under ``/kwaai/``: ``[length][marker][payload]``.

Source of the first: hivemind 1.1.12, ``p2p/p2p_daemon.py``, and captured bytes. A caller ends its side with an
empty frame of marker 1; a server ends its side by closing the stream, and sends marker 1 only to say why the
call failed.

Telling the orders apart. Lengths are below 2**56, so a length begins with a zero byte, and a reader of either
order that meets a header of the other refuses it within these nine bytes and says so, unless the same bytes are
a good header in both orders. Those are: nine zeros, an empty message in both; and, for a reader of Hivemind's
order, a frame of n bytes that passes for one of 256 * n + marker, where that is within its limit; for a reader of
the length-first order, a message of n bytes with n modulo 256 below 2, which passes for a frame of n // 256.
Nothing in these headers tells the orders apart. If the stream ends within such a frame, the error names both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.envelope import text_of
from kwaainet_bridge.wire.fields import Buffer, total
from kwaainet_bridge.wire.pb import envelope_pb2
from kwaainet_bridge.wire.prefixed import PrefixedDecoder

MESSAGE: Final = 0
END_OR_ERROR: Final = 1

HEADER_BYTES: Final = 9

_LENGTH_BYTES: Final = 8
_LENGTHS_END: Final = 1 << 56
"""Lengths are below this, so that the first byte of a length is zero. No peer has such a message."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: ``marker`` is MESSAGE or END_OR_ERROR, ``payload`` the bytes of its protobuf message."""

    marker: int
    payload: bytes

    @property
    def error_text(self) -> str:
        """The text in a frame of marker END_OR_ERROR; empty for a caller's end of stream.

        Raises RemoteError if the payload is no error message or its text is not UTF-8.
        """
        try:
            error = envelope_pb2.StreamError.FromString(self.payload)
        except DecodeError as e:
            raise RemoteError(f"stream error frame: payload does not decode: {e}") from e
        return text_of(error.message, "stream error frame: message")


@dataclass(frozen=True, slots=True)
class FrameOrder:
    """Which of marker and length comes first in a header. ``name`` is for people."""

    name: str
    marker_at: int
    length_at: int

    def encode_message(self, *payload: Buffer) -> bytes:
        """A frame that carries the buffers of ``payload``, together a message of the method's type."""
        return self._encode(MESSAGE, *payload)

    def encode_end(self) -> bytes:
        """The caller's "no more messages"."""
        return self._encode(END_OR_ERROR)

    def encode_error(self, text: str) -> bytes:
        """The server's "the call failed", with a text for people. Lone surrogates are sent escaped."""
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        return self._encode(END_OR_ERROR, envelope_pb2.StreamError(message=text).SerializeToString())

    def encode_header(self, marker: int, length: int) -> bytes:
        """The nine bytes in front of a payload of ``length`` bytes."""
        announced = length.to_bytes(_LENGTH_BYTES, "big")
        return b"%c%b" % (marker, announced) if self.marker_at == 0 else b"%b%c" % (announced, marker)

    def split_header(self, header: bytes | bytearray) -> tuple[int, int]:
        """Marker and length of the nine bytes ``header``, whatever they are."""
        at = self.length_at
        return header[self.marker_at], int.from_bytes(header[at : at + _LENGTH_BYTES], "big")

    def _encode(self, marker: int, *payload: Buffer) -> bytes:
        return b"".join([self.encode_header(marker, total(payload)), *payload])


MARKER_FIRST: Final = FrameOrder("marker first, then length", marker_at=0, length_at=1)
"""The order of Hivemind and Petals."""

LENGTH_FIRST: Final = FrameOrder("length first, then marker", marker_at=8, length_at=0)
"""The order of the ``/kwaai/`` protocols that this project defines."""

encode_message = MARKER_FIRST.encode_message
encode_end = MARKER_FIRST.encode_end
encode_error = MARKER_FIRST.encode_error


class FrameDecoder(PrefixedDecoder[Frame]):
    """Cuts a stream into frames of one order whose payloads are at most ``max_bytes`` long.

    See PrefixedDecoder. Raises ValueError for a limit of 2**56 bytes or more.
    """

    _name = "stream frame"
    _longest_header = HEADER_BYTES

    def __init__(self, max_bytes: int, *, order: FrameOrder = MARKER_FIRST) -> None:
        if max_bytes >= _LENGTHS_END:
            raise ValueError(f"a limit of {max_bytes} bytes: lengths are below {_LENGTHS_END}")
        super().__init__(max_bytes)
        self._order = order
        self._other = LENGTH_FIRST if order == MARKER_FIRST else MARKER_FIRST

    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        first = header[0]
        if self._order.marker_at == 0:
            if first not in (MESSAGE, END_OR_ERROR):
                raise RemoteError(f"stream frame: marker {first} is neither {MESSAGE} nor {END_OR_ERROR}")
        elif first == END_OR_ERROR:
            raise RemoteError(
                f"stream frame: a length of 2**56 or more where frames have {self._order.name}: "
                f"does the peer write {self._other.name}?"
            )
        elif first != 0:
            raise RemoteError(f"stream frame: a length that begins with byte {first}, 2**56 or more")
        if len(header) < HEADER_BYTES:
            return None
        marker, length = self._order.split_header(header)
        if marker not in (MESSAGE, END_OR_ERROR):
            raise RemoteError(
                f"stream frame: marker {marker} is neither {MESSAGE} nor {END_OR_ERROR}"
                + self._suspicion(marker, length)
            )
        return marker, length, HEADER_BYTES

    def _suspicion(self, tag: int, length: int) -> str:
        marker, other_length = self._other.split_header(self._order.encode_header(tag, length))
        if marker not in (MESSAGE, END_OR_ERROR) or other_length > self._max_bytes:
            return ""
        return (
            f" where frames have {self._order.name}; as {self._other.name} the same header announces "
            f"{other_length} bytes: does the peer write that order?"
        )

    def _build(self, tag: int, body: bytes) -> Frame:
        return Frame(tag, body)
