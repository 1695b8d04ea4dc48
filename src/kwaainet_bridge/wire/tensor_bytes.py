"""The bytes of a ``Tensor`` message from a tensor and back, with one copy of its values each way.

They are what the protobuf library writes for :func:`kwaainet_bridge.wire.tensors.encode_tensor`, whose message
copies the values twice more: into the message, and out of it. The format is proto3's: fields in any order, the
last of one number counts, unknown ones are skipped.
"""

from __future__ import annotations

from typing import Final

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType, codec
from kwaainet_bridge.compression.codec import Buffer
from kwaainet_bridge.compression.encoded import DTYPES, checked_shape
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire.tensors import values_to_send
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_BUFFER, _SIZE, _REQUIRES_GRAD, _DTYPE, _COMPRESSION, _CHUNKS = range(1, 7)
_TYPES: Final = {
    _BUFFER: (_DELIMITED,),
    _SIZE: (_VARINT, _DELIMITED),
    _REQUIRES_GRAD: (_VARINT,),
    _DTYPE: (_DELIMITED,),
    _COMPRESSION: (_VARINT,),
    _CHUNKS: (_VARINT,),
}
_NAMES: Final = ("", "buffer", "size", "requires_grad", "dtype", "compression", "chunks")


def tensor_parts(
    tensor: torch.Tensor, compression: int = CompressionType.NONE, *, legacy_bfloat16: bool = False
) -> list[Buffer]:
    """The message in buffers to send one after the other; see encode_tensor for what it carries and raises.

    They may share memory with the tensor: send or join them before it changes.
    """
    dtype, values = values_to_send(tensor, compression, legacy_bfloat16=legacy_bfloat16)
    head = field_header(_BUFFER, sum(map(len, values))) if any(map(len, values)) else b""
    tail = b""
    if tensor.ndim:
        size = b"".join(map(encode_uvarint, tensor.shape))
        tail += field_header(_SIZE, len(size)) + size
    if tensor.requires_grad:
        tail += bytes([_REQUIRES_GRAD << 3, 1])
    tail += field_header(_DTYPE, len(dtype)) + dtype.encode()
    if compression:
        tail += bytes([_COMPRESSION << 3, compression])
    return [head, *values, tail]


def field_header(number: int, length: int) -> bytes:
    """What stands before ``length`` bytes of field ``number``: to put a tensor into another message."""
    return encode_uvarint(number << 3 | _DELIMITED) + encode_uvarint(length)


def read_tensor(data: Buffer, *, name: str = "tensor") -> torch.Tensor:
    """The tensor that the bytes of a whole message carry; like ``decode_tensor``.

    Raises RemoteError that begins with ``name`` and the field that is wrong.
    """
    try:
        return _read(memoryview(data))
    except (CompressionError, RemoteError) as e:
        raise RemoteError(f"{name}: {e}") from e


def _read(data: memoryview) -> torch.Tensor:
    buffer: Buffer = b""
    size: list[int] = []
    dtype_name, compression, requires_grad = b"", 0, False
    at = 0
    while at < len(data):
        key, at = _varint(data, at, "field number")
        number, wire_type = key >> 3, key & 7
        if wire_type not in _TYPES.get(number, (wire_type,)):
            raise RemoteError(f"{_NAMES[number]} has wire type {wire_type}")
        value, start, at = _value(data, at, number, wire_type)
        if number == _BUFFER:
            buffer = data[start:at]
        elif number == _SIZE:
            _add_dimensions(size, data[start:at])
        elif number == _REQUIRES_GRAD:
            requires_grad = value != 0
        elif number == _DTYPE:
            dtype_name = bytes(data[start : min(at, start + 40)])
        elif number == _COMPRESSION:
            compression = value
    dtype = DTYPES.get(dtype_name.decode("utf-8", "replace"))
    if dtype is None:
        raise RemoteError(f"dtype {dtype_name!r} does not travel")
    if requires_grad and not dtype.is_floating_point:
        raise RemoteError(f"requires_grad is set for {dtype}, which has no gradients")
    tensor = codec(compression).decompress(buffer, checked_shape(size), dtype)
    return tensor.requires_grad_(requires_grad)


def _varint(data: memoryview, at: int, field: str) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # most numbers of a message are that short
        return data[at], at + 1
    try:
        parsed = decode_uvarint(data, at)
    except RemoteError as e:
        raise RemoteError(f"{field}: {e}") from e
    if parsed is None:
        raise RemoteError(f"{field} ends early")
    return parsed


def _value(data: memoryview, at: int, number: int, wire_type: int) -> tuple[int, int, int]:
    """A number, if the field is one, and where its bytes begin and end."""
    field = _NAMES[number] if number < len(_NAMES) else f"field {number}"
    if number == 0 or wire_type not in (_VARINT, _FIXED64, _DELIMITED, _FIXED32):
        raise RemoteError(f"field {number} has wire type {wire_type}")
    value, start = 0, at
    if wire_type == _VARINT:
        value, end = _varint(data, at, field)
    elif wire_type == _DELIMITED:
        length, start = _varint(data, at, field)
        end = start + length
    else:
        end = at + (8 if wire_type == _FIXED64 else 4)
    if end > len(data):
        raise RemoteError(f"{field} ends after {len(data) - start} of {end - start} bytes")
    return value, start, end


def _add_dimensions(size: list[int], packed: memoryview) -> None:
    at = 0
    while at < len(packed):
        if len(size) == defaults.MAX_TENSOR_DIMENSIONS:
            raise RemoteError(
                f"size has more than the {defaults.MAX_TENSOR_DIMENSIONS} dimensions that are accepted"
            )
        dimension, at = _varint(packed, at, "size")
        size.append(dimension)
