"""FLOAT16 and MEANSTD_16BIT: two bytes per value.

Source: hivemind 1.1.12, ``compression/floating.py``, and bytes made by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

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

_LARGEST: Final = torch.finfo(torch.float16).max
_SMALLEST_STD: Final = torch.finfo(torch.float32).eps


def _float32_values(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """Stock peers refuse integers and bfloat16 here, and so do we: nobody could tell what they would mean."""
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.bfloat16:
        codec.refuse(f"{tensor.dtype} tensors")
    return host_values(tensor).to(torch.float32)


class Float16(Codec):
    """``[float16 * values]``; float32, float64 and float16 tensors.

    Values beyond the range of float16, infinities too, become its largest; NaN stays NaN.
    """

    compression = CompressionType.FLOAT16

    def compress(self, tensor: torch.Tensor) -> bytes:
        values = _float32_values(self, tensor)
        return to_bytes(values.clamp(-_LARGEST, _LARGEST).to(torch.float16))

    def decompress(self, buffer: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        count = elements(shape)
        self.require_length(buffer, 2 * count, shape, dtype)
        return from_bytes(buffer, 0, count, torch.float16).to(dtype).reshape(tuple(shape))


class MeanStd16(Codec):
    """``[float16 * values][float32 mean * rows][float32 std * rows]``, a row being the last dimension.

    float32, float64 and float16 tensors of one dimension at least. A row that holds an infinity or NaN has no
    mean, and all of it decodes to NaN, as between stock peers; other rows are unharmed.
    """

    compression = CompressionType.MEANSTD_16BIT

    def compress(self, tensor: torch.Tensor) -> bytes:
        values = _float32_values(self, tensor)
        if values.ndim == 0:
            self.refuse("scalars")
        if values.numel() == 0:
            means = torch.zeros(_rows(values.shape))
            return to_bytes(means) + to_bytes(means + _SMALLEST_STD)
        means = values.mean(dim=-1, keepdim=True)
        centered = values - means
        stds = centered.norm(dim=-1, keepdim=True).div_(math.sqrt(values.shape[-1])).clamp_min_(_SMALLEST_STD)
        scaled = centered.div_(stds).clamp_(-_LARGEST, _LARGEST).to(torch.float16)
        return to_bytes(scaled) + to_bytes(means) + to_bytes(stds)

    def decompress(self, buffer: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        if not shape:
            raise RemoteError("MEANSTD_16BIT needs one dimension at least, the shape is empty")
        count = elements(shape)
        rows = _rows(shape)
        self.require_length(buffer, 2 * count + 8 * rows, shape, dtype)
        per_row = (*shape[:-1], 1)
        scaled = from_bytes(buffer, 0, count, torch.float16).reshape(tuple(shape))
        means = from_bytes(buffer, 2 * count, rows, torch.float32).reshape(per_row)
        stds = from_bytes(buffer, 2 * count + 4 * rows, rows, torch.float32).reshape(per_row)
        # in the tensor's own precision at each step, as stock decoders do
        return scaled.to(dtype).mul_(stds).add_(means)


def _rows(shape: Sequence[int]) -> int:
    return elements(shape[:-1])
