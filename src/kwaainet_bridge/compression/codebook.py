"""UNIFORM_8BIT and QUANTILE_8BIT: one byte per value, which names the mean of the values that share it.

Source: hivemind 1.1.12, ``compression/quantization.py``, and bytes made by it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kwaainet_bridge.compression.codec import (
    Buffer,
    Codec,
    CompressionType,
    elements,
    from_bytes,
    host_values,
    new_values,
    tiles,
    view_array,
    view_bytes,
)
from kwaainet_bridge.compression.lookup import Buckets, look_up
from kwaainet_bridge.errors import RemoteError

BUCKETS: Final = 256
_COUNT_BYTES: Final = 8
_HEADER: Final = BUCKETS.to_bytes(_COUNT_BYTES, "little")
_CODES_AT: Final = _COUNT_BYTES + 4 * BUCKETS

_RANGE_IN_SIGMAS: Final = 6
_MIDDLE: Final = BUCKETS // 2
_LEAST_CHUNK: Final = 100_000
_WHOLE: Final = 3.0 * 2**22
"""A float32 between this and twice as much has no bits for fractions."""


class CodebookCodec(Codec):
    """``[int64 256][float32 codebook * 256][uint8 code * values]``; tensors of any float dtype.

    Infinities and NaN would spoil every other value through the codebook, so a tensor that has any is
    refused, and so are finite values whose squares float32 cannot sum (UNIFORM_8BIT only).
    """

    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        if not tensor.dtype.is_floating_point:
            self.refuse(f"{tensor.dtype} tensors")
        values = (
            host_values(tensor).reshape(-1).contiguous()
        )  # sums depend on strides, a peer's bytes must not
        if values.numel() == 0:
            return [_HEADER, bytes(4 * BUCKETS)]
        codes = self._codes(values)
        return [_HEADER, view_bytes(_bucket_means(values, codes)), view_bytes(codes)]

    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        self.require_length(buffer, shape, dtype)
        if buffer[:_COUNT_BYTES] != _HEADER:
            announced = int.from_bytes(buffer[:_COUNT_BYTES], "little", signed=True)
            raise RemoteError(f"buffer announces a codebook of {announced} entries, not {BUCKETS}")
        codebook = from_bytes(buffer, _COUNT_BYTES, BUCKETS, torch.float32)
        values = new_values(elements(shape), dtype)
        look_up(codebook.to(dtype), view_array(buffer, _CODES_AT, values.numel(), np.uint8), values)
        return values.reshape(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:  # noqa: ARG002 - the same for all
        return _CODES_AT + elements(shape)

    @abc.abstractmethod
    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        """The bucket of each of these values (one dimension, not empty, any float dtype) as uint8."""


def _bucket_means(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    sums, counts = torch.zeros(BUCKETS), torch.zeros(BUCKETS, dtype=torch.int64)
    for tile in tiles(len(values)):  # one sum after the other, in the order that stock peers add in
        of_tile = codes[tile].to(torch.int64)
        sums.scatter_add_(0, of_tile, values[tile].to(torch.float32))
        counts += torch.bincount(codes[tile], minlength=BUCKETS)
    return sums / counts.clamp_min_(1)


class Uniform8(CodebookCodec):
    """Buckets of equal width, six standard deviations in all around the mean; the outermost take the rest."""

    compression = CompressionType.UNIFORM_8BIT

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        mean = values.mean().to(torch.float32)  # rounded to the tensor's own dtype first, as stock peers do
        centered = new_values(len(values), torch.float32)
        torch.sub(values.to(torch.float32), mean, out=centered)
        std = centered.norm() / math.sqrt(max(len(values) - 1, 1))
        if not (math.isfinite(mean) and math.isfinite(std)):
            self.refuse("tensors with values that are not finite or whose squares overflow float32")
        per_bucket = 1 / (_RANGE_IN_SIGMAS * std / BUCKETS)
        if per_bucket == math.inf:
            # of values that are as good as equal; torch's quantizer puts 0 * inf into the last bucket
            return torch.where(centered < 0, 0, BUCKETS - 1).to(torch.uint8)
        codes = torch.empty(len(values), dtype=torch.uint8)
        middle = torch.tensor(float(_MIDDLE))
        for tile in tiles(len(values)):
            # fused, so rounded to float32 once, as in torch's own quantizer (deprecated) where processors can do that
            position = torch.add(middle, centered[tile], alpha=per_bucket.item())
            # to the nearest whole number, of two the even one, which is then in the lowest bits
            codes[tile] = position.clamp_(0, BUCKETS - 1).add_(_WHOLE).view(torch.int32)
        return codes


class Quantile8(CodebookCodec):
    """Buckets that hold equally many values, as far as quantiles of quantiles of large chunks can tell.

    Quantiles are computed as numpy 1.26 does, whichever is installed. numpy 2 rounds their positions to float32,
    so a peer that runs with it may cut between other values; every decoder reads both.
    """

    compression = CompressionType.QUANTILE_8BIT

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.float32)
        if not torch.isfinite(values).all():
            self.refuse("tensors with values that are not finite")
        buckets = Buckets(torch.from_numpy(_rounded_down(_quantiles(values.numpy())[1:-1])))
        codes = torch.empty(len(values), dtype=torch.uint8)
        for tile in tiles(len(values)):
            codes[tile] = buckets.count_below(values[tile])
        return codes


def _quantiles(values: np.ndarray) -> np.ndarray:
    """BUCKETS + 1 quantiles, as float64, of the quantiles, rounded to float32, of chunks of float32 values."""
    size = _chunk_size(len(values))
    chunks = []
    for start in range(0, len(values), size):
        low, high, part = _around_quantiles(values[start : start + size])
        above = high - ((high - low) * (1 - part)).astype(np.float32)
        chunks.append(np.where(part >= 0.5, above, (low + (high - low) * part).astype(np.float32)))
    low, high, part = _around_quantiles(np.concatenate(chunks))
    quantiles: np.ndarray = np.where(part >= 0.5, high - (high - low) * (1 - part), low + (high - low) * part)
    return quantiles


def _around_quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values (float32) below and above each quantile and the part of the way (float64) from one to the other."""
    ascending = np.sort(values)
    positions = np.arange(BUCKETS + 1) * (len(values) - 1) / BUCKETS
    before = np.minimum(np.floor(positions).astype(np.int64), len(values) - 1)
    return ascending[before], ascending[np.minimum(before + 1, len(values) - 1)], positions - before


def _rounded_down(borders: np.ndarray) -> np.ndarray:
    """The largest float32 at most each border: the same float32 values are above."""
    nearest = borders.astype(np.float32)
    below: np.ndarray = np.where(nearest > borders, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return below


def _chunk_size(count: int) -> int:
    """Chunks of at least 100,000 values, the remainder spread over them."""
    chunks, rest = divmod(count, _LEAST_CHUNK)
    if chunks == 0 or count == _LEAST_CHUNK:
        return _LEAST_CHUNK
    return _LEAST_CHUNK + (rest - 1) // chunks + 1
