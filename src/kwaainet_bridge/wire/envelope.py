"""Unary calls: one length-delimited envelope each way.

Source: the Hivemind fork of go-libp2p-daemon, tag v0.5.0.hivemind1, ``persistent_stream.go``, and captured
bytes. The length in front of an envelope is an unsigned LEB128 varint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import DELIMITED, Buffer, field_header, total
from kwaainet_bridge.wire.pb import envelope_pb2
from kwaainet_bridge.wire.prefixed import PrefixedDecoder
from kwaainet_bridge.wire.varint import MAX_UVARINT_BYTES, decode_uvarint, encode_uvarint

_CALL_ID, _CALL, _ANSWER = (number << 3 | DELIMITED for number in (1, 3, 4))
_PEER, _PROTO, _DATA = (number << 3 | DELIMITED for number in (1, 2, 3))
_RESPONSE, _ERROR = (number << 3 | DELIMITED for number in (1, 2))

CALL_ID_BYTES: Final = 16
"""A UUID. Stock daemons drop calls whose id has another length, and confuse two calls in flight of one id."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request. ``peer`` is whatever the caller wrote: who called is known from the connection only."""

    call_id: bytes
    peer: bytes
    protocol: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: exactly one of ``response`` and ``error`` is not None.

    Stock daemons match answers by stream, so ``call_id`` need not be that of the call.
    """

    call_id: bytes
    response: bytes | None
    error: str | None


def encode_call(call_id: bytes, peer: bytes, protocol: str, *data: Buffer) -> bytes:
    """The complete wire bytes of a request to ``peer`` (its id's bytes) for the negotiated ``protocol``.

    The buffers of ``data`` together are a message of the method's request type. Raises ValueError unless
    ``call_id`` has CALL_ID_BYTES.
    """
    if len(call_id) != CALL_ID_BYTES:
        raise ValueError(f"a call id has {CALL_ID_BYTES} bytes, not {len(call_id)}")
    name = protocol.encode()
    head = (field_header(_PEER, len(peer)), peer, field_header(_PROTO, len(name)), name)
    return _delimited(call_id, _CALL, *head, field_header(_DATA, total(data)), *data)


def encode_answer(call_id: bytes, *response: Buffer) -> bytes:
    """The complete wire bytes of an answer that carries a message of the method's response type, in buffers."""
    return _delimited(call_id, _ANSWER, field_header(_RESPONSE, total(response)), *response)


def encode_error(call_id: bytes, text: str) -> bytes:
    """The complete wire bytes of an answer that says why the call failed; lone surrogates go escaped."""
    error = text.encode("utf-8", "backslashreplace")
    return _delimited(call_id, _ANSWER, field_header(_ERROR, len(error)), error)


def body_length(message: bytes) -> int:
    """How long the body of a complete wire message is: stock daemons limit that, without its length prefix."""
    prefix = decode_uvarint(message)
    assert prefix is not None  # the message is whole
    return prefix[0]


def _delimited(call_id: bytes, tag: int, *content: Buffer) -> bytes:
    """An envelope that holds ``content`` as its field ``tag``, joined once: the protobuf library copies more."""
    head = field_header(_CALL_ID, len(call_id)) + call_id + field_header(tag, total(content))
    return b"".join([encode_uvarint(len(head) + total(content)), head, *content])


def decode_call(body: bytes) -> Call:
    """Read a request from an envelope without its length. Raises RemoteError naming the bad field."""
    envelope = _parse(body)
    if not envelope.HasField("call"):
        raise RemoteError("unary request: call is absent")
    if len(envelope.call_id) != CALL_ID_BYTES:
        raise RemoteError(f"unary request: call_id has {len(envelope.call_id)} bytes, not {CALL_ID_BYTES}")
    call = envelope.call
    for field in ("peer", "proto", "data"):
        if not call.HasField(field):
            raise RemoteError(f"unary request: call.{field} is absent")
    return Call(envelope.call_id, call.peer, text_of(call.proto, "unary request: call.proto"), call.data)


def decode_answer(body: bytes) -> Answer:
    """Read an answer from an envelope without its length. Raises RemoteError naming the bad field.

    Bytes of an error text that are not UTF-8 are left out, as stock callers do.
    """
    envelope = _parse(body)
    if not envelope.HasField("answer"):
        raise RemoteError("unary answer: answer is absent")
    answer = envelope.answer
    match answer.WhichOneof("result"):
        case "response":
            return Answer(envelope.call_id, answer.response, None)
        case "error":
            return Answer(envelope.call_id, None, answer.error.decode("utf-8", "ignore"))
        case _:
            raise RemoteError("unary answer: answer has neither response nor error")


def _parse(body: bytes) -> envelope_pb2.Envelope:
    try:
        envelope = envelope_pb2.Envelope.FromString(body)
    except DecodeError as e:
        raise RemoteError(f"unary envelope: does not decode: {e}") from e
    if not envelope.HasField("call_id"):
        raise RemoteError("unary envelope: call_id is absent")
    return envelope


def text_of(value: str | bytes, field: str) -> str:
    """The value of a proto2 string field: protobuf hands bytes that are not UTF-8 over as they are.

    Raises RemoteError naming ``field``.
    """
    if isinstance(value, bytes):
        raise RemoteError(f"{field} is not UTF-8")
    return value


class DelimitedDecoder(PrefixedDecoder[bytes]):
    """Cuts a stream into length-delimited bodies of at most ``max_bytes``. See PrefixedDecoder."""

    _name = "delimited message"
    _longest_header = MAX_UVARINT_BYTES

    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        parsed = decode_uvarint(header)
        return None if parsed is None else (0, *parsed)

    def _build(self, tag: int, body: bytes) -> bytes:  # noqa: ARG002 - a delimited message has no tag
        return body
