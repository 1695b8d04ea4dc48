"""Messages of ``/kwaai/tensor/1.0.0`` and the quantised tensor in them: bincode 1.x with its default options.

A stream carries one request and one reply, each as ``[u32 length, big-endian][message]``. A message is
``[u32 type][name][u8 0 or 1][quantised tensor, if 1][shape][metadata]``, a quantised tensor
``[i8 data *][float16 scale *][u64 dimension *][u64 block_size]``; lists and texts have an u64 count in front, and
all these numbers are little-endian.

Source: KwaaiNet v0.6.2, ``examples/tensor_exchange.rs``, and bytes made by the serialiser that it uses. What its
reader takes and this one refuses: frames of any length, bytes behind a message, a block size of 0, counts that do
not fit each other, scales that are not finite, and a shape beside the tensor that is another one.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.codec import Buffer, from_bytes, view_bytes
from kwaainet_bridge.compression.kwaai import QuantisedBlocks, check_blocks
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import total
from kwaainet_bridge.wire.prefixed import PrefixedDecoder

PROTOCOL: Final = "/kwaai/tensor/1.0.0"

RECEIVED: Final = "received"
"""Metadata of an acknowledgement."""

_COUNT_BYTES: Final = 8
_TYPE_BYTES: Final = 4
_LENGTH_BYTES: Final = 4
_TENSOR: Final = "quantised tensor"
_MESSAGE: Final = "tensor message"


class TensorMessageType(enum.IntEnum):
    DATA = 0
    ACK = 1
    REQUEST = 2


@dataclass(frozen=True, slots=True)
class KwaaiTensorMessage:
    """A tensor, a receipt for one, or the wish for one, by name.

    DATA has a tensor, of the same ``shape``; the others have none. The example sends the empty shape with those.
    """

    type: TensorMessageType
    name: str
    tensor: QuantisedBlocks | None = None
    shape: tuple[int, ...] = ()
    metadata: str = ""


def tensor_message(name: str, tensor: QuantisedBlocks, *, metadata: str = "") -> KwaaiTensorMessage:
    """A message that carries ``tensor``."""
    return KwaaiTensorMessage(TensorMessageType.DATA, name, tensor, tensor.shape, metadata)


def receipt(message: KwaaiTensorMessage) -> KwaaiTensorMessage:
    """The reply to a message that carries a tensor."""
    return KwaaiTensorMessage(TensorMessageType.ACK, message.name, metadata=RECEIVED)


def encode_frame(message: KwaaiTensorMessage) -> bytes:
    """A message with its length in front.

    Raises ValueError for one that KwaaiTensorDecoder would refuse for its length, or a type without or with a
    tensor that should have or not have one.
    """
    if (message.tensor is not None) != (message.type == TensorMessageType.DATA):
        raise ValueError(f"{message.type.name} {'with' if message.tensor else 'without'} a tensor")
    parts: list[Buffer] = [message.type.to_bytes(_TYPE_BYTES, "little"), _text(message.name)]
    parts += [b"\x00"] if message.tensor is None else [b"\x01", encode_quantised(message.tensor)]
    parts += [_dimensions(message.shape), _text(message.metadata)]
    length = total(parts)
    if length > defaults.MAX_TENSOR_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes, at most {defaults.MAX_TENSOR_FRAME_BYTES} are accepted")
    return b"".join([length.to_bytes(_LENGTH_BYTES, "big"), *parts])


def read_message(data: Buffer) -> KwaaiTensorMessage:
    """Read all of ``data``, a frame without its length; its tensor is a copy and fit for dequantise_blocks.

    Raises RemoteError naming the wrong field.
    """
    if len(data) < _TYPE_BYTES:
        raise RemoteError(f"{_MESSAGE}: type ends early")
    number = int.from_bytes(data[:_TYPE_BYTES], "little")
    try:
        kind = TensorMessageType(number)
    except ValueError as e:
        raise RemoteError(f"{_MESSAGE}: there is no type {number}") from e
    name, at = _read_text(data, _TYPE_BYTES, "name")
    option = data[at] if at < len(data) else None
    if option not in (0, 1):
        raise RemoteError(f"{_MESSAGE}: data {'ends early' if option is None else f'has tag {option}'}")
    if bool(option) != (kind == TensorMessageType.DATA):
        raise RemoteError(f"{_MESSAGE}: {kind.name} {'with' if option else 'without'} a tensor")
    tensor, at = _quantised(data, at + 1) if option else (None, at + 1)
    shape, at = _read_dimensions(data, at, _MESSAGE)
    metadata, at = _read_text(data, at, "metadata")
    if at != len(data):
        raise RemoteError(f"{_MESSAGE}: {len(data) - at} bytes behind metadata")
    if tensor is not None:
        check_blocks(tensor)
        if tensor.shape != shape:
            raise RemoteError(f"{_MESSAGE}: shape is {list(shape)}, that of the tensor {list(tensor.shape)}")
    return KwaaiTensorMessage(kind, name, tensor, shape, metadata)


class KwaaiTensorDecoder(PrefixedDecoder[KwaaiTensorMessage]):
    """Cuts a stream into messages whose frames are at most ``max_bytes`` long. See PrefixedDecoder."""

    _name = "tensor frame"
    _longest_header = _LENGTH_BYTES

    def __init__(self, max_bytes: int = defaults.MAX_TENSOR_FRAME_BYTES) -> None:
        super().__init__(max_bytes)

    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        if len(header) < _LENGTH_BYTES:
            return None
        return 0, int.from_bytes(header, "big"), _LENGTH_BYTES

    def _build(self, tag: int, body: bytes) -> KwaaiTensorMessage:  # noqa: ARG002 - a frame has no tag
        return read_message(body)


def encode_quantised(quantised: QuantisedBlocks) -> bytes:
    """The bytes of a quantised tensor."""
    return b"".join(
        [
            _count(quantised.data.numel()),
            view_bytes(quantised.data),
            _count(quantised.scales.numel()),
            view_bytes(quantised.scales),
            _dimensions(quantised.shape),
            _count(quantised.block_size),
        ]
    )


def read_quantised(data: Buffer) -> QuantisedBlocks:
    """Read all of ``data`` as one quantised tensor.

    Raises RemoteError naming the field that does not fit into the bytes; what the fields say of each other is
    checked by ``check_blocks`` and ``dequantise_blocks``.
    """
    quantised, at = _quantised(data, 0)
    if at != len(data):
        raise RemoteError(f"{_TENSOR}: {len(data) - at} bytes behind block_size")
    return quantised


def _quantised(data: Buffer, at: int) -> tuple[QuantisedBlocks, int]:
    codes, at = _list(data, at, f"{_TENSOR}: data", 1)
    scales, at = _list(data, at, f"{_TENSOR}: scales", 2)
    shape, at = _read_dimensions(data, at, _TENSOR)
    block_size, at = _number(data, at, f"{_TENSOR}: block_size")
    return (
        QuantisedBlocks(
            from_bytes(data, *codes, torch.int8), from_bytes(data, *scales, torch.float16), shape, block_size
        ),
        at,
    )


def _count(number: int) -> bytes:
    return number.to_bytes(_COUNT_BYTES, "little")


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > defaults.MAX_TENSOR_TEXT_BYTES:
        raise ValueError(
            f"a text of {len(encoded)} bytes, at most {defaults.MAX_TENSOR_TEXT_BYTES} are accepted"
        )
    return _count(len(encoded)) + encoded


def _dimensions(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<Q{len(shape)}Q", len(shape), *shape)


def _number(data: Buffer, at: int, field: str) -> tuple[int, int]:
    if len(data) - at < _COUNT_BYTES:
        raise RemoteError(f"{field} ends early")
    return int.from_bytes(data[at : at + _COUNT_BYTES], "little"), at + _COUNT_BYTES


def _list(data: Buffer, at: int, field: str, item_bytes: int) -> tuple[tuple[int, int], int]:
    """Where a list's items begin and how many there are, and where it ends."""
    count, at = _number(data, at, field)
    end = at + count * item_bytes
    if end > len(data):
        raise RemoteError(f"{field} announces {count} items in {len(data) - at} bytes")
    return (at, count), end


def _read_dimensions(data: Buffer, at: int, whose: str) -> tuple[tuple[int, ...], int]:
    (start, count), at = _list(data, at, f"{whose}: shape", 8)
    if count > defaults.MAX_TENSOR_DIMENSIONS:
        raise RemoteError(
            f"{whose}: shape has {count} dimensions, at most {defaults.MAX_TENSOR_DIMENSIONS} are accepted"
        )
    return struct.unpack_from(f"<{count}Q", data, start), at


def _read_text(data: Buffer, at: int, field: str) -> tuple[str, int]:
    (start, count), at = _list(data, at, f"{_MESSAGE}: {field}", 1)
    if count > defaults.MAX_TENSOR_TEXT_BYTES:
        raise RemoteError(
            f"{_MESSAGE}: {field} has {count} bytes, at most {defaults.MAX_TENSOR_TEXT_BYTES} are accepted"
        )
    try:
        return str(memoryview(data)[start:at], "utf-8"), at
    except UnicodeDecodeError as e:
        raise RemoteError(f"{_MESSAGE}: {field} is not UTF-8") from e
