"""KwaaiNet's two tensor forms: linear int8 in blocks, and the k largest values alone.

Neither is a CompressionType of Hivemind, so a tensor goes from one network to the other decoded and encoded
again. Source: KwaaiNet v0.6.2, its block quantiser and top-k compressor, and bytes made by the serialiser that it
uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.codec import elements, host_values
from kwaainet_bridge.compression.encoded import Encoded, checked_shape, decode, encode
from kwaainet_bridge.errors import CompressionError, RemoteError

BLOCK: Final = 64
_STEPS: Final = 127
_U32: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class QuantisedBlocks:
    """Values as ``data * scale`` of their block: int8 codes, float16 scales, both of one dimension, on the CPU."""

    data: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    block_size: int = BLOCK


@dataclass(frozen=True, slots=True)
class SparseValues:
    """The values (float32) at some indices (int64, below 2**32) of a flattened tensor; the others are zero."""

    indices: torch.Tensor
    values: torch.Tensor
    original_size: int
    shape: tuple[int, ...]


def quantise_blocks(tensor: torch.Tensor, block_size: int = BLOCK) -> QuantisedBlocks:
    """A block's scale is its largest magnitude / 127, and 1 if all are zero; codes are rounded half away from zero.

    Tensors of any dtype, through float32. A value comes back within half a scale plus 127 * 2**-11 of its scale
    while the scale is at least 2**-14 (the smallest normal float16); below, scales lose precision, and a block whose
    largest magnitude is at most 3.7e-6 comes back as zeros. Raises CompressionError for values that are not
    finite and for scales beyond float16: magnitudes above 65519 * 127.
    """
    if block_size < 1:
        raise CompressionError(f"blocks of {block_size} values")
    values = host_values(tensor).to(torch.float32).reshape(-1)
    count = values.numel()
    blocks = -(-count // block_size)
    # a tensor shorter than one block is not padded to it: the block's size says nothing of the memory needed
    width = min(block_size, count) or 1
    padded = torch.nn.functional.pad(values, (0, blocks * width - count)).view(blocks, width)
    largest = padded.abs().amax(dim=1)
    scales = torch.where(largest == 0, 1.0, largest / _STEPS)
    stored = scales.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise CompressionError("block int8 does not support values that are not finite or above 65519 * 127")
    # the smallest float32 magnitudes have a scale of zero, and only they a quotient that is not finite
    quotients = (padded / scales[:, None]).nan_to_num_(nan=0.0)
    # not (x + 0.5).floor(): that sum rounds 0.49999997 up to 1
    whole = quotients.trunc()
    codes = whole.add_(((quotients - whole).abs() >= 0.5) * quotients.sign()).clamp_(-_STEPS, _STEPS)
    data = codes.to(torch.int8).view(-1)[:count].contiguous()
    return QuantisedBlocks(data, stored, tuple(tensor.shape), block_size)


def check_blocks(quantised: QuantisedBlocks) -> tuple[int, ...]:
    """The shape, once counts, block size and scales were found to fit it; nothing of its size is allocated.

    Raises RemoteError naming the field.
    """
    shape = checked_shape(quantised.shape)
    count, size = elements(shape), quantised.block_size
    if size < 1:
        raise RemoteError(f"quantised tensor: block_size is {size}")
    if quantised.data.numel() != count:
        raise RemoteError(
            f"quantised tensor: data has {quantised.data.numel()} values, shape {list(shape)} {count}"
        )
    blocks = -(-count // size)
    if quantised.scales.numel() != blocks:
        raise RemoteError(
            f"quantised tensor: scales has {quantised.scales.numel()} values for {blocks} blocks of {size}"
        )
    if not torch.isfinite(quantised.scales).all():
        raise RemoteError("quantised tensor: scales has values that are not finite")
    return shape


def dequantise_blocks(quantised: QuantisedBlocks, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A new CPU tensor of ``dtype``. Raises RemoteError if counts, block size or scales cannot be right."""
    shape = check_blocks(quantised)
    count, size, blocks = elements(shape), quantised.block_size, quantised.scales.numel()
    values = quantised.data.to(torch.float32)
    scales = quantised.scales.to(torch.float32)
    whole = count // size
    values[: whole * size].view(whole, min(size, count) or 1).mul_(scales[:whole, None])
    if whole < blocks:
        values[whole * size :].mul_(scales[-1])
    return values.to(dtype).reshape(shape)


def keep_largest(tensor: torch.Tensor, fraction: float) -> SparseValues:
    """The ``max(1, floor(n * fraction))`` values of largest magnitude, in descending order, ties by index.

    Tensors of any dtype, through float32. Raises CompressionError for an empty tensor, a fraction outside
    0 to 1, and NaN, which has no place in that order.
    """
    if not 0 <= fraction <= 1:
        raise CompressionError(f"a fraction of {fraction}")
    values = host_values(tensor).to(torch.float32).reshape(-1)
    count = values.numel()
    if not 0 < count <= min(_U32, defaults.MAX_TENSOR_ELEMENTS):
        raise CompressionError(f"top-k does not support tensors of {count} values")
    if values.isnan().any():
        raise CompressionError("top-k does not support NaN")
    kept = max(1, math.floor(count * fraction))
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:kept]
    return SparseValues(order, values[order], count, tuple(tensor.shape))


def spread_out(sparse: SparseValues, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole tensor, new, on the CPU, zero elsewhere. An index that comes twice gets one of its values.

    Its memory is that of its shape, however few values came: check that first where it matters. Raises
    RemoteError if counts, indices or values cannot be right.
    """
    shape = checked_shape(sparse.shape)
    count, kept = elements(shape), sparse.indices.numel()
    if sparse.original_size != count:
        raise RemoteError(
            f"sparse tensor: original_size is {sparse.original_size}, shape {list(shape)} has {count}"
        )
    if sparse.values.numel() != kept:
        raise RemoteError(f"sparse tensor: values has {sparse.values.numel()} items, indices {kept}")
    if kept > count:
        raise RemoteError(f"sparse tensor: {kept} indices for {count} values")
    if kept and not 0 <= int(sparse.indices.min()) <= int(sparse.indices.max()) < count:
        raise RemoteError(f"sparse tensor: indices has an index beyond {count} values")
    if not torch.isfinite(sparse.values).all():
        raise RemoteError("sparse tensor: values has values that are not finite")
    whole = torch.zeros(count)
    whole.index_copy_(0, sparse.indices.to(torch.int64), sparse.values.to(torch.float32))
    return whole.to(dtype).reshape(shape)


def from_kwaai(
    quantised: QuantisedBlocks, compression: int | str, dtype: torch.dtype = torch.float32
) -> Encoded:
    """A KwaaiNet tensor for a Hivemind peer: dequantised, and encoded anew.

    What BLOCKWISE_8BIT adds to the error is at most 0.0071 of the largest magnitude among 4096 values; FLOAT16 adds
    2**-11 of each value, NONE in float32 nothing. Raises as ``dequantise_blocks`` and ``encode``.
    """
    return encode(dequantise_blocks(quantised, dtype), compression)


def to_kwaai(encoded: Encoded, block_size: int = BLOCK) -> QuantisedBlocks:
    """A Hivemind tensor for a KwaaiNet peer: decoded, and quantised anew, which adds the error of that.

    Its dtype is lost: the KwaaiNet form has none. Raises as ``decode`` and ``quantise_blocks``.
    """
    return quantise_blocks(decode(encoded), block_size)
