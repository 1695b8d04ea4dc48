"""The values of a tensor in ``/kwaai/tensor/2.0.0``: which compressions carry what, how long they are, encode, decode.

Numbers 0 to 5 are Hivemind's compressions with Hivemind's bytes. The two of KwaaiNet have bytes of their own here,
all little-endian: ``KWAAI_INT8`` is ``[float16 scale * blocks][int8 code * values]`` with 64 values in a block, and
``KWAAI_TOP_K`` is ``[uint32 index * k][float32 value * k]``, indices ascending.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kwaainet_bridge.compression import codec
from kwaainet_bridge.compression.blockwise import BLOCK as _BLOCKWISE
from kwaainet_bridge.compression.codec import (
    Buffer,
    elements,
    from_bytes,
    host_values,
    new_values,
    tiles,
    view_bytes,
)
from kwaainet_bridge.compression.encoded import DTYPES, NAMES, checked_shape
from kwaainet_bridge.compression.kwaai import (
    BLOCK,
    QuantisedBlocks,
    dequantise_blocks,
    keep_largest,
    quantise_blocks,
)
from kwaainet_bridge.errors import CompressionError, RemoteError

TOP_K: Final = 0.01
"""Fraction of a tensor's values that KWAAI_TOP_K keeps where the sender says nothing else."""

_MAX_TOP_K_ELEMENTS: Final = (1 << 32) - 1
_KEPT_BYTES: Final = 8  # of an index and its value


class Compression(enum.IntEnum):
    """Source of 0 to 5: hivemind 1.1.12, ``proto/runtime.proto``."""

    NONE = 0
    MEANSTD_16BIT = 1
    FLOAT16 = 2
    QUANTILE_8BIT = 3
    UNIFORM_8BIT = 4
    BLOCKWISE_8BIT = 5
    KWAAI_INT8 = 64
    KWAAI_TOP_K = 65


_PLAIN_FLOATS: Final = frozenset({torch.float32, torch.float64, torch.float16})
_CARRIED: Final[dict[Compression, frozenset[torch.dtype]]] = {
    Compression.NONE: frozenset(NAMES),
    Compression.MEANSTD_16BIT: _PLAIN_FLOATS,
    Compression.FLOAT16: _PLAIN_FLOATS,
    Compression.QUANTILE_8BIT: _PLAIN_FLOATS | {torch.bfloat16},
    Compression.UNIFORM_8BIT: _PLAIN_FLOATS | {torch.bfloat16},
    Compression.BLOCKWISE_8BIT: frozenset(NAMES),
    Compression.KWAAI_INT8: frozenset(NAMES),
    Compression.KWAAI_TOP_K: frozenset(NAMES),
}


class UnsupportedValues(RemoteError):
    """A dtype or compression that this version does not know, or two that do not go together."""


def compression_of(value: int | str) -> Compression:
    """By number or name. Raises CompressionError if there is none."""
    try:
        return Compression[value] if isinstance(value, str) else Compression(value)
    except (KeyError, ValueError):
        names = ", ".join(Compression.__members__)
        raise CompressionError(f"there is no compression {value!r:.40}, only {names}") from None


def encode_values(tensor: torch.Tensor, compression: int | str, *, top_k: float = TOP_K) -> list[Buffer]:
    """The values of ``tensor``, of any shape, strides and device, as buffers to send one after the other.

    With NONE they may share the tensor's memory. ``top_k`` is a fraction for KWAAI_TOP_K: 0 to 1, one value at
    least. Raises CompressionError if this compression cannot carry this tensor.
    """
    chosen = compression_of(compression)
    if tensor.dtype not in _CARRIED[chosen]:
        raise CompressionError(f"{chosen.name} does not support {tensor.dtype} tensors")
    if chosen == Compression.KWAAI_INT8:
        blocks = quantise_blocks(tensor)
        return [view_bytes(blocks.scales), view_bytes(blocks.data)]
    if chosen == Compression.KWAAI_TOP_K:
        return _encode_top_k(tensor, top_k)
    return codec(chosen.value).parts(tensor)


def check_values(
    dtype: str, shape: Sequence[int], compression: int, count: int
) -> tuple[torch.dtype, tuple[int, ...], Compression]:
    """What ``dtype``, ``shape`` and ``compression`` mean, once ``count`` bytes were found to be what they need.

    Nothing is allocated. Raises UnsupportedValues, RemoteError for a shape or a number of bytes that cannot be.
    """
    known = DTYPES.get(dtype)
    if known is None:
        raise UnsupportedValues(f"dtype {dtype!r:.40} does not travel")
    try:
        chosen = compression_of(compression)
    except CompressionError as e:
        raise UnsupportedValues(str(e)) from e
    if known not in _CARRIED[chosen]:
        raise UnsupportedValues(f"{chosen.name} does not support dtype {dtype}")
    size = checked_shape(shape)
    if chosen == Compression.MEANSTD_16BIT and not size:
        raise UnsupportedValues("MEANSTD_16BIT needs one dimension at least, the shape is empty")
    values = elements(size)
    if chosen == Compression.KWAAI_TOP_K:
        if values > _MAX_TOP_K_ELEMENTS:
            raise UnsupportedValues(f"KWAAI_TOP_K does not support {values} values")
        if count % _KEPT_BYTES or not min(values, 1) <= count // _KEPT_BYTES <= values:
            raise RemoteError(f"{count} bytes of KWAAI_TOP_K for {values} values")
    elif count != (expected := _size(chosen, size, known)):
        raise RemoteError(f"{count} bytes; {chosen.name} needs {expected} for {dtype} of shape {list(size)}")
    return known, size, chosen


def memory_needed(dtype: torch.dtype, shape: Sequence[int], compression: Compression, count: int) -> int:
    """Bytes that ``count`` bytes of values and the decoding of them take at most, those of the tensor included.

    What decoding takes for a piece at a time is left out: it does not grow with the tensor, and is below 4 MiB.
    """
    if compression == Compression.NONE:
        return count
    size: int = dtype.itemsize * elements(shape)
    return 2 * count + size


def new_buffer(count: int) -> torch.Tensor:
    """Memory for ``count`` bytes of values, uninitialised: uint8 of one dimension."""
    return new_values(count, torch.uint8)


def decode_values(
    buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], compression: Compression
) -> torch.Tensor:
    """A contiguous, writable CPU tensor of the values in ``buffer``, one of ``new_buffer``, filled.

    ``check_values`` was asked before. With NONE it is ``buffer`` itself, seen otherwise: leave that alone then.
    Raises RemoteError for values that cannot be.
    """
    if compression == Compression.NONE:
        if dtype == torch.bool and buffer.numel() and int(buffer.max()) > 1:
            raise RemoteError("bool values other than 0 and 1")
        return (buffer.view(dtype) if buffer.numel() else torch.empty(0, dtype=dtype)).reshape(shape)
    data = memoryview(buffer.numpy()) if buffer.numel() else memoryview(b"")
    if compression == Compression.KWAAI_INT8:
        return _decode_int8(data, dtype, shape)
    if compression == Compression.KWAAI_TOP_K:
        return _decode_top_k(data, dtype, shape)
    if compression == Compression.BLOCKWISE_8BIT and dtype != torch.float32:
        return _decode_blockwise(data, dtype, shape)
    return codec(compression.value).decompress(data, shape, dtype)


def _size(compression: Compression, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if compression == Compression.KWAAI_INT8:
        count = elements(shape)
        return 2 * -(-count // BLOCK) + count
    return codec(compression.value).size(shape, dtype)


def _decode_blockwise(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Piece by piece: the codec decodes to float32, of which there would otherwise be a whole tensor."""
    count = elements(shape)
    blocks = -(-count // _BLOCKWISE)
    announced = int.from_bytes(data[:8], "little", signed=True)
    if announced != blocks:
        raise RemoteError(f"buffer announces {announced} blocks, {count} values make {blocks}")
    codebook_at = 16 + 4 * blocks
    codes_at = codebook_at + 1024
    values = new_values(count, dtype)
    for tile in tiles(count):
        first, last = tile.start // _BLOCKWISE, -(-tile.stop // _BLOCKWISE)
        piece = b"".join(
            [
                (last - first).to_bytes(8, "little"),
                data[8:16],
                data[16 + 4 * first : 16 + 4 * last],
                data[codebook_at:codes_at],
                data[codes_at + tile.start : codes_at + tile.stop],
            ]
        )
        values[tile] = codec("BLOCKWISE_8BIT").decompress(piece, (tile.stop - tile.start,), torch.float32)
    return values.reshape(shape)


def _decode_int8(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = elements(shape)
    codes_at = 2 * -(-count // BLOCK)
    values = new_values(count, dtype)
    for tile in tiles(count):  # whole blocks
        size = tile.stop - tile.start
        codes = from_bytes(data, codes_at + tile.start, size, torch.int8)
        scales = from_bytes(data, 2 * (tile.start // BLOCK), -(-size // BLOCK), torch.float16)
        values[tile] = dequantise_blocks(QuantisedBlocks(codes, scales, (size,)))
    return values.reshape(shape)


def _encode_top_k(tensor: torch.Tensor, fraction: float) -> list[Buffer]:
    if not tensor.numel():
        return []
    kept = keep_largest(host_values(tensor), fraction)
    if not torch.isfinite(kept.values).all():
        raise CompressionError("KWAAI_TOP_K does not support values that are not finite in float32")
    indices, order = kept.indices.sort()
    return [indices.numpy().astype("<u4").view(np.uint8).data, view_bytes(kept.values[order])]


def _decode_top_k(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    kept, count = len(data) // _KEPT_BYTES, elements(shape)
    if not kept:
        return torch.empty(0, dtype=dtype).reshape(shape)
    indices = np.frombuffer(data, "<u4", kept)
    if int(indices[-1]) >= count or not (indices[1:] > indices[:-1]).all():
        raise RemoteError(f"KWAAI_TOP_K: indices do not ascend, or are beyond {count} values")
    whole = torch.zeros(count, dtype=dtype)
    for tile in tiles(kept):
        values = from_bytes(data, 4 * (kept + tile.start), tile.stop - tile.start, torch.float32)
        if not torch.isfinite(values).all():
            raise RemoteError("KWAAI_TOP_K: values that are not finite")
        whole.index_copy_(0, torch.from_numpy(indices[tile].astype(np.int64)), values.to(dtype))
    return whole.reshape(shape)
