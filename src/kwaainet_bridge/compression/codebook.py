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
    Codec,
    CompressionType,
    elements,
    from_bytes,
    host_values,
    to_bytes,
)
from kwaainet_bridge.errors import RemoteError

BUCKETS: Final = 256
_COUNT_BYTES: Final = 8
_HEADER: Final = BUCKETS.to_bytes(_COUNT_BYTES, "little")
_CODES_AT: Final = _COUNT_BYTES + 4 * BUCKETS

_RANGE_IN_SIGMAS: Final = 6
_MIDDLE: Final = BUCKETS // 2
_LEAST_CHUNK: Final = 100_000


class CodebookCodec(Codec):
    """``[int64 256][float32 codebook * 256][uint8 code * values]``; tensors of any float dtype.

    Infinities and NaN would spoil every other value through the codebook, so a tensor that has any is
    refused, and so are finite values whose squares float32 cannot sum (UNIFORM_8BIT only).
    """

    def compress(self, tensor: torch.Tensor) -> bytes:
        if not tensor.dtype.is_floating_point:
            self.refuse(f"{tensor.dtype} tensors")
        values = host_values(tensor).reshape(-1)
        if values.numel() == 0:
            return _HEADER + bytes(4 * BUCKETS)
        codes = self._codes(values)
        return (
            _HEADER
            + to_bytes(_bucket_means(values.to(torch.float32), codes))
            + to_bytes(codes.to(torch.uint8))
        )

    def decompress(self, buffer: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        count = elements(shape)
        self.require_length(buffer, _CODES_AT + count, shape, dtype)
        if buffer[:_COUNT_BYTES] != _HEADER:
            announced = int.from_bytes(buffer[:_COUNT_BYTES], "little", signed=True)
            raise RemoteError(f"buffer announces a codebook of {announced} entries, not {BUCKETS}")
        codebook = from_bytes(buffer, _COUNT_BYTES, BUCKETS, torch.float32)
        codes = from_bytes(buffer, _CODES_AT, count, torch.uint8)
        return codebook.to(dtype).index_select(0, codes.to(torch.int32)).reshape(tuple(shape))

    @abc.abstractmethod
    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        """The bucket of each of these values (one dimension, not empty, any float dtype) as int64."""


def _bucket_means(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(BUCKETS).scatter_add_(0, codes, values)
    return sums / torch.bincount(codes, minlength=BUCKETS).clamp_min_(1)


class Uniform8(CodebookCodec):
    """Buckets of equal width, six standard deviations in all around the mean; the outermost take the rest."""

    compression = CompressionType.UNIFORM_8BIT

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        mean = values.mean().to(torch.float32)  # rounded to the tensor's own dtype first, as stock peers do
        centered = values.to(torch.float32) - mean
        std = centered.norm() / math.sqrt(max(values.numel() - 1, 1))
        if not (torch.isfinite(mean) and torch.isfinite(std)):
            self.refuse("tensors with values that are not finite or whose squares overflow float32")
        per_bucket = 1 / (_RANGE_IN_SIGMAS * std / BUCKETS)
        # torch's own quantizer rounds centered * per_bucket + 128 to float32 once; float64 holds the product
        # exactly. Of equal values per_bucket is infinite and the product NaN, which it puts into the last
        # bucket.
        position = (centered.double() * per_bucket.double() + _MIDDLE).to(torch.float32)
        return position.round_().clamp_(0, BUCKETS - 1).nan_to_num_(nan=BUCKETS - 1).to(torch.int64)


class Quantile8(CodebookCodec):
    """Buckets that hold equally many values, as far as quantiles of quantiles of large chunks can tell.

    The last bits of quantiles differ between numpy 1.26 and 2.3, so two peers may cut between other values.
    """

    compression = CompressionType.QUANTILE_8BIT

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.float32)
        if not torch.isfinite(values).all():
            self.refuse("tensors with values that are not finite")
        borders = torch.from_numpy(_quantiles(values.numpy())[1:-1])
        return torch.bucketize(values, borders)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """The BUCKETS + 1 quantiles of ``values``, float32 or, from numpy 1, float64."""
    wanted = np.linspace(0.0, 1.0, num=BUCKETS + 1, dtype=np.float32)
    size = _chunk_size(len(values))
    chunks = [np.quantile(values[i : i + size], wanted) for i in range(0, len(values), size)]
    quantiles: np.ndarray = np.quantile(np.asarray(chunks, dtype=np.float32), wanted)
    return quantiles


def _chunk_size(count: int) -> int:
    """Chunks of at least 100,000 values, the remainder spread over them."""
    chunks, rest = divmod(count, _LEAST_CHUNK)
    if chunks == 0 or count == _LEAST_CHUNK:
        return _LEAST_CHUNK
    return _LEAST_CHUNK + (rest - 1) // chunks + 1
