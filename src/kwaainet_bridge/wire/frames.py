"""Frames of streaming calls: ``[marker: 1 byte][length: 8 bytes, big-endian][payload]``.

Source: hivemind 1.1.12, ``p2p/p2p_daemon.py``, and captured bytes. A caller ends its side with an empty frame
of marker 1; a server ends its side by closing the stream, and sends marker 1 only to say why the call failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.envelope import text_of
from kwaainet_bridge.wire.pb import envelope_pb2
from kwaainet_bridge.wire.prefixed import PrefixedDecoder

MESSAGE: Final = 0
END_OR_ERROR: Final = 1

HEADER_BYTES: Final = 9


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


def encode_message(payload: bytes) -> bytes:
    """A frame that carries ``payload``, the bytes of a message of the method's type."""
    return _encode(MESSAGE, payload)


def encode_end() -> bytes:
    """The caller's "no more messages"."""
    return _encode(END_OR_ERROR, b"")


def encode_error(text: str) -> bytes:
    """The server's "the call failed", with a text for people. Lone surrogates are sent escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _encode(END_OR_ERROR, envelope_pb2.StreamError(message=text).SerializeToString())


def _encode(marker: int, payload: bytes) -> bytes:
    return b"%c%b%b" % (marker, len(payload).to_bytes(8, "big"), payload)


class FrameDecoder(PrefixedDecoder[Frame]):
    """Cuts a stream into frames whose payloads are at most ``max_bytes`` long. See PrefixedDecoder."""

    _name = "stream frame"
    _longest_header = HEADER_BYTES

    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        marker = header[0]
        if marker not in (MESSAGE, END_OR_ERROR):
            raise RemoteError(f"stream frame: marker {marker} is neither {MESSAGE} nor {END_OR_ERROR}")
        if len(header) < HEADER_BYTES:
            return None
        return marker, int.from_bytes(header[1:], "big"), HEADER_BYTES

    def _build(self, tag: int, body: bytes) -> Frame:
        return Frame(tag, body)
