"""Messages of ``/kwaai/tensor/2.0.0``: named tensors between peers, several on a stream, large ones in parts.

Frames are ``[length: 8 bytes, big-endian][marker: 1 byte][payload]`` (``wire.frames.LENGTH_FIRST``), payloads
protobuf: with marker 0 a Message, which is one of Offer, Part and Ack; with marker 1 an End. The protocol is this
project's own; docs/protocols/kwaai-tensor.md is its specification.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

import torch
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.codec import Buffer
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import (
    DELIMITED,
    VARINT,
    Known,
    field_header,
    number_field,
    read_fields,
    total,
)
from kwaainet_bridge.wire.frames import END_OR_ERROR, LENGTH_FIRST, MESSAGE, Frame, FrameDecoder
from kwaainet_bridge.wire.kwaai_tensor2_values import Compression, check_values, decode_values, new_buffer
from kwaainet_bridge.wire.pb import kwaai_tensor_pb2 as pb

PROTOCOL: Final = "/kwaai/tensor/2.0.0"

MAX_FRAME_BYTES: Final = defaults.MAX_TENSOR2_PART_BYTES + defaults.KIB
"""Longest payload of a frame: a part, and what is around its values."""

_OFFER, _PART, _ACK = (number << 3 | DELIMITED for number in (1, 2, 3))
_KINDS: Final[Known] = {_OFFER: "offer", _PART: "part", _ACK: "ack"}
_NUMBER, _OFFSET = (number << 3 | VARINT for number in (1, 2))
_DATA: Final = 3 << 3 | DELIMITED
_PART_FIELDS: Final[Known] = {_NUMBER: "number", _OFFSET: "offset", _DATA: "data"}


class Code(enum.IntEnum):
    """What became of a tensor, and why a stream ends."""

    OK = 0
    """End: nothing more follows, and nothing is wrong."""
    ACCEPTED = 1
    """Ack: the parts may come."""
    RECEIVED = 2
    """Ack: the tensor was decoded and taken."""
    REFUSED = 3
    """Ack: it is not wanted here."""
    UNSUPPORTED = 4
    """Ack: the dtype, the compression or both together are not known here."""
    TOO_LARGE = 5
    """Ack: it is larger than what is ever accepted here."""
    BUSY = 6
    """Ack, End: too much is under way; later it may go."""
    INVALID = 7
    """Ack: sizes that contradict each other, or values that do not decode."""
    FAILED = 8
    """Ack: an error of the receiver's own."""
    PROTOCOL = 9
    """End: the other side broke the protocol."""
    TIMEOUT = 10
    """End: the other side is too slow."""
    STOPPING = 11
    """Ack, End: the node stops."""


REFUSALS: Final = frozenset(
    {
        Code.REFUSED,
        Code.UNSUPPORTED,
        Code.TOO_LARGE,
        Code.BUSY,
        Code.INVALID,
        Code.FAILED,
        Code.STOPPING,
    }
)
"""What a peer may answer instead of taking a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A tensor that its sender would send: the ``number``-th of the stream, from 1 on.

    ``bytes`` is how long its values are under ``compression``; ``data`` is empty or all of them. What came from a
    peer has been checked for its form and its own length only: see ``check_values``.
    """

    number: int
    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    compression: int = Compression.NONE
    bytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    data: Buffer = b""

    @property
    def whole(self) -> bool:
        """Whether nothing more is to come: the values are here, or there are none."""
        return len(self.data) == self.bytes


@dataclass(frozen=True, slots=True)
class Part:
    """The values of a tensor from byte ``offset`` on; ``data`` may be a view of the frame."""

    number: int
    offset: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class Ack:
    """What became of the offer of that number; ``code`` may be one that is not known here.

    ``bytes``: with RECEIVED those of the values, with TOO_LARGE the most memory that a tensor may take, else 0.
    """

    number: int
    code: int
    text: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """The last that its side says."""

    code: int = Code.OK
    text: str = ""


Message: TypeAlias = Offer | Part | Ack | End
_M = TypeVar("_M", bound=ProtobufMessage)


# --- writing


def encode_offer(offer: Offer) -> bytes:
    """Its frame. Raises ValueError for what ``read_message`` would refuse."""
    _check_offer(offer, ValueError)
    message = pb.Offer(
        number=offer.number,
        name=offer.name,
        dtype=offer.dtype,
        shape=offer.shape,
        compression=offer.compression,  # type: ignore[arg-type]  # an open enum
        bytes=offer.bytes,
        metadata=offer.metadata,
        data=bytes(offer.data),
    ).SerializeToString(deterministic=True)
    if len(message) - len(offer.data) > defaults.MAX_TENSOR2_OFFER_BYTES:
        raise ValueError(
            f"tensor {offer.name!r:.60}: an offer of {len(message) - len(offer.data)} bytes without values, "
            f"at most {defaults.MAX_TENSOR2_OFFER_BYTES} are accepted"
        )
    return LENGTH_FIRST.encode_message(field_header(_OFFER, len(message)), message)


def encode_part(number: int, offset: int, data: Sequence[Buffer]) -> bytes:
    """The frame of a part whose values are the buffers of ``data`` one after the other."""
    length = total(data)
    head = number_field(_NUMBER, number) + number_field(_OFFSET, offset) + field_header(_DATA, length)
    return LENGTH_FIRST.encode_message(field_header(_PART, len(head) + length), head, *data)


def encode_ack(ack: Ack) -> bytes:
    """Its frame; long texts are cut."""
    message = pb.Ack(
        number=ack.number,
        code=ack.code,  # type: ignore[arg-type]  # an open enum
        text=_sendable(ack.text),
        bytes=ack.bytes,
    ).SerializeToString()
    return LENGTH_FIRST.encode_message(field_header(_ACK, len(message)), message)


def encode_end(end: End) -> bytes:
    """Its frame; long texts are cut."""
    payload = pb.End(
        text=_sendable(end.text),
        code=end.code,  # type: ignore[arg-type]  # an open enum
    ).SerializeToString()
    return LENGTH_FIRST.encode_header(END_OR_ERROR, len(payload)) + payload


def slices(buffers: Sequence[Buffer], size: int) -> Iterator[list[Buffer]]:
    """The bytes of ``buffers`` in pieces of ``size``, the last one shorter: views, one or more to a piece."""
    piece: list[Buffer] = []
    room = size
    for buffer in buffers:
        view, at = memoryview(buffer), 0
        while at < len(view):
            piece.append(view[at : at + room])
            at += len(piece[-1])
            room -= len(piece[-1])
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _sendable(text: str) -> str:
    text = text[: defaults.MAX_ERROR_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
    return text[: defaults.MAX_ERROR_CHARACTERS]


# --- reading


def frame_decoder() -> FrameDecoder:
    """A decoder of this protocol's frames."""
    return FrameDecoder(MAX_FRAME_BYTES, order=LENGTH_FIRST)


def read_message(frame: Frame) -> Message:
    """The message in a frame; the data of a part or an offer may be views of it. Raises RemoteError."""
    if frame.marker != MESSAGE:
        return _read_end(frame.payload)
    found = read_fields(memoryview(frame.payload), _KINDS)
    if len(found) != 1:
        raise RemoteError(f"tensor message: {len(found)} of offer, part and ack, one is due")
    [(tag, _, content)] = found
    if tag == _OFFER:
        return _read_offer(content)
    return _read_part(content) if tag == _PART else _read_ack(content)


def _read_end(payload: bytes) -> End:
    _check_length("end", len(payload), defaults.MAX_TENSOR2_TEXT_BYTES)
    end = _parse(pb.End, payload, "end")
    return End(int(end.code), end.text)


def _read_offer(content: memoryview) -> Offer:
    _check_length("offer", len(content), defaults.MAX_TENSOR2_OFFER_BYTES + defaults.MAX_TENSOR2_INLINE_BYTES)
    read = _parse(pb.Offer, content, "offer")
    _check_length("offer", len(content) - len(read.data), defaults.MAX_TENSOR2_OFFER_BYTES)
    offer = Offer(
        number=read.number,
        name=read.name,
        dtype=read.dtype,
        shape=tuple(read.shape),
        compression=int(read.compression),
        bytes=read.bytes,
        metadata=dict(read.metadata),
        data=read.data,
    )
    _check_offer(offer, RemoteError)
    return offer


def _read_part(content: memoryview) -> Part:
    number = offset = 0
    data: Buffer = b""
    for tag, value, field_bytes in read_fields(content, _PART_FIELDS):
        if tag == _NUMBER:
            number = value
        elif tag == _OFFSET:
            offset = value
        else:
            data = field_bytes
    if not data:
        raise RemoteError("part: data is empty")
    _check_length("part: data", len(data), defaults.MAX_TENSOR2_PART_BYTES)
    return Part(number, offset, data)


def _read_ack(content: memoryview) -> Ack:
    _check_length("ack", len(content), defaults.MAX_TENSOR2_TEXT_BYTES)
    ack = _parse(pb.Ack, content, "ack")
    return Ack(ack.number, int(ack.code), ack.text, ack.bytes)


def _parse(kind: type[_M], content: Buffer, name: str) -> _M:
    try:
        return kind.FromString(bytes(content))
    except DecodeError as e:
        raise RemoteError(f"{name}: {len(content)} bytes are no {kind.__name__}") from e


def _check_length(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise RemoteError(f"{name} has {length} bytes, at most {limit} are accepted")


def _check_offer(offer: Offer, error: type[Exception]) -> None:
    """What is wrong with an offer for any receiver."""
    name = len(offer.name.encode())
    if not 1 <= name <= defaults.MAX_TENSOR2_NAME_BYTES:
        raise error(f"offer: name has {name} bytes, 1 to {defaults.MAX_TENSOR2_NAME_BYTES} are accepted")
    if len(offer.shape) > defaults.MAX_TENSOR_DIMENSIONS:
        raise error(
            f"offer: shape has {len(offer.shape)} dimensions, at most {defaults.MAX_TENSOR_DIMENSIONS} are accepted"
        )
    if len(offer.metadata) > defaults.MAX_TENSOR2_METADATA:
        raise error(
            f"offer: metadata has {len(offer.metadata)} entries, at most {defaults.MAX_TENSOR2_METADATA} are accepted"
        )
    if offer.data and (not offer.whole or len(offer.data) > defaults.MAX_TENSOR2_INLINE_BYTES):
        raise error(
            f"offer: data has {len(offer.data)} of {offer.bytes} bytes: none or all come here, "
            f"at most {defaults.MAX_TENSOR2_INLINE_BYTES}"
        )


# --- putting a tensor together


class IncomingTensor:
    """The values of one offer as they come. Memory for all of them is made here: check the offer's length first."""

    def __init__(self, offer: Offer) -> None:
        """Raises RemoteError for an offer that ``check_values`` refuses."""
        self.offer = offer
        self._kind = check_values(offer.dtype, offer.shape, offer.compression, offer.bytes)
        self._buffer = new_buffer(offer.bytes)
        self._view = memoryview(self._buffer.numpy())
        self._filled = 0
        if offer.data:
            self._fill(offer.data)

    @property
    def complete(self) -> bool:
        return self._filled == self.offer.bytes

    def add(self, part: Part) -> None:
        """Take the next part. Raises RemoteError if it is not the next one or goes beyond the tensor's end."""
        if part.number != self.offer.number:
            raise RemoteError(f"part of tensor {part.number} where one of {self.offer.number} is due")
        if part.offset != self._filled:
            raise RemoteError(f"part at {part.offset} where byte {self._filled} is due")
        if len(part.data) > self.offer.bytes - self._filled:
            raise RemoteError(
                f"part of {len(part.data)} bytes at {part.offset}: the tensor has {self.offer.bytes}"
            )
        self._fill(part.data)

    def tensor(self) -> torch.Tensor:
        """The tensor, once complete: of its own memory, contiguous, writable, on the CPU. Call it once.

        Raises RemoteError for values that cannot be.
        """
        if not self.complete:
            raise ValueError(f"{self._filled} of {self.offer.bytes} bytes have come")
        return decode_values(self._buffer, *self._kind)

    def _fill(self, data: Buffer) -> None:
        self._view[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
