"""A tensor as bytes and back, for whoever has no message of his own to put them in."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.blockwise import Blockwise8
from kwaainet_bridge.compression.codebook import Quantile8, Uniform8
from kwaainet_bridge.compression.codec import Buffer, Codec, CompressionType
from kwaainet_bridge.compression.half import Float16, MeanStd16
from kwaainet_bridge.compression.raw import Raw
from kwaainet_bridge.errors import CompressionError, RemoteError

DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Every dtype that travels, by its name. Their order is part of the format of ``Encoded.to_bytes``."""

NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

_CODECS: Final[dict[int, Codec]] = {
    codec.compression: codec
    for codec in (Raw(), Float16(), MeanStd16(), Uniform8(), Quantile8(), Blockwise8())
}
_HEADER: Final = struct.Struct("<BBBB")
_VERSION: Final = 1
_ORDER: Final = tuple(DTYPES.values())


def codec(compression: int | str) -> Codec:
    """The codec of a CompressionType, its name, or a peer's number for it. Raises CompressionError if unknown."""
    if isinstance(compression, str):
        named = CompressionType.__members__.get(compression)
        if named is None:
            raise CompressionError(
                f"there is no compression {compression!r:.40}, only {', '.join(CompressionType.__members__)}"
            )
        compression = named
    found = _CODECS.get(compression)
    if found is None:
        raise CompressionError(f"there is no compression {compression}")
    return found


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor's values as bytes, and what it takes to read them again."""

    compression: CompressionType
    dtype: torch.dtype
    shape: tuple[int, ...]
    buffer: Buffer

    def to_bytes(self) -> bytes:
        """``[u8 1][u8 compression][u8 dtype][u8 dimensions][u64 dimension *][buffer]``, little-endian.

        The number of a dtype is its place in DTYPES.
        """
        head = _HEADER.pack(_VERSION, self.compression, _ORDER.index(self.dtype), len(self.shape))
        return b"".join([head, struct.pack(f"<{len(self.shape)}Q", *self.shape), self.buffer])

    @classmethod
    def from_bytes(cls, data: Buffer) -> Encoded:
        """Reads what ``to_bytes`` wrote; the buffer is a view of ``data``. Raises RemoteError.

        The buffer's length is checked by ``decode``.
        """
        if len(data) < _HEADER.size:
            raise RemoteError(f"encoded tensor: {len(data)} bytes, its header has {_HEADER.size}")
        version, compression, dtype, dimensions = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise RemoteError(f"encoded tensor: version is {version}, not {_VERSION}")
        if compression not in _CODECS:
            raise RemoteError(f"encoded tensor: there is no compression {compression}")
        if dtype >= len(_ORDER):
            raise RemoteError(f"encoded tensor: there is no dtype {dtype}")
        values_at = _HEADER.size + 8 * dimensions
        if dimensions > defaults.MAX_TENSOR_DIMENSIONS or values_at > len(data):
            raise RemoteError(f"encoded tensor: {dimensions} dimensions in {len(data)} bytes")
        shape = checked_shape(struct.unpack_from(f"<{dimensions}Q", data, _HEADER.size))
        return cls(CompressionType(compression), _ORDER[dtype], shape, memoryview(data)[values_at:])


def encode(tensor: torch.Tensor, compression: int | str = CompressionType.BLOCKWISE_8BIT) -> Encoded:
    """The values of ``tensor``, of any shape, strides and device, under a CompressionType or its name.

    Raises CompressionError if the compression is unknown or cannot carry this dtype or these values.
    """
    if tensor.dtype not in NAMES:
        raise CompressionError(f"{tensor.dtype} tensors do not travel")
    chosen = codec(compression)
    return Encoded(chosen.compression, tensor.dtype, tuple(tensor.shape), chosen.compress(tensor))


def decode(encoded: Encoded) -> torch.Tensor:
    """The tensor: new, contiguous, writable, on the CPU, sharing nothing with the buffer.

    Raises RemoteError if shape and buffer do not fit; nothing is allocated before they were found to.
    """
    shape = checked_shape(encoded.shape)
    return codec(encoded.compression).decompress(encoded.buffer, shape, encoded.dtype)


def checked_shape(size: Sequence[int]) -> tuple[int, ...]:
    """A shape that a peer sent, once its product is known to be bounded. Raises RemoteError."""
    if len(size) > defaults.MAX_TENSOR_DIMENSIONS:
        raise RemoteError(
            f"size has {len(size)} dimensions, at most {defaults.MAX_TENSOR_DIMENSIONS} are accepted"
        )
    shape = tuple(size)
    elements = 1
    for dimension in shape:
        if dimension < 0:
            raise RemoteError(f"size {list(shape)} has a negative dimension")
        elements *= dimension or 1  # torch multiplies the others for strides even if one is zero
        if elements > defaults.MAX_TENSOR_ELEMENTS:
            raise RemoteError(
                f"size {list(shape)} has more than {defaults.MAX_TENSOR_ELEMENTS} elements or strides as wide"
            )
    return shape
