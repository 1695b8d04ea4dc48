"""FLOAT16 and MEANSTD_16BIT: two bytes per value.

Source: hivemind 1.1.12, ``compression/floating.py``, and bytes made by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from kwaainet_bridge.compression.codec import (
    TILE,
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
from kwaainet_bridge.errors import RemoteError

_LARGEST: Final = torch.finfo(torch.float16).max
_WIDE: Final = 1 << 14
_SMALLEST_STD: Final = torch.finfo(torch.float32).eps


def _require_plain_floats(codec: Codec, tensor: torch.Tensor) -> None:
    """Stock peers refuse integers and bfloat16 here, and so do we: nobody could tell what they would mean."""
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.bfloat16:
        codec.refuse(f"{tensor.dtype} tensors")


class Float16(Codec):
    """``[float16 * values]``; float32, float64 and float16 tensors.

    Values beyond the range of float16, infinities too, become its largest; NaN stays NaN.
    """

    compression = CompressionType.FLOAT16

    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        _require_plain_floats(self, tensor)
        values = host_values(tensor).reshape(-1)
        halves = new_values(values.numel(), torch.float16)
        for tile in tiles(values.numel()):
            halves[tile] = values[tile].to(torch.float32).clamp(-_LARGEST, _LARGEST)
        return [view_bytes(halves)]

    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        self.require_length(buffer, shape, dtype)
        values = new_values(elements(shape), dtype)
        _widen(buffer, values)
        return values.reshape(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:  # noqa: ARG002 - the same for all
        return 2 * elements(shape)


class MeanStd16(Codec):
    """``[float16 * values][float32 mean * rows][float32 std * rows]``, a row being the last dimension.

    float32, float64 and float16 tensors of one dimension at least. A row that holds an infinity or NaN has no
    mean, one whose squares float32 cannot sum no deviation, and all of it decodes to NaN, as between stock peers;
    other rows are unharmed.
    """

    compression = CompressionType.MEANSTD_16BIT

    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        _require_plain_floats(self, tensor)
        if tensor.ndim == 0:
            self.refuse("scalars")
        rows, width = _rows(tensor.shape), tensor.shape[-1]
        scaled = new_values(rows * width, torch.float16)
        means, stds = torch.zeros(rows, 1), torch.full((rows, 1), _SMALLEST_STD)
        if scaled.numel():
            values = host_values(tensor).reshape(rows, width)
            # torch's threads share a single wide row among them and so round its sums otherwise than those of one
            # row of several: a piece of many rows must never be left as one such row
            at_a_time = rows if width > _WIDE else _rows_at_a_time(width)
            for tile in tiles(rows, at_a_time):
                part = values[tile].to(torch.float32).contiguous()  # sums depend on strides, bytes must not
                mean = torch.mean(part, dim=-1, keepdim=True, out=means[tile])
                centered = torch.sub(part, mean)
                std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True, out=stds[tile])
                std.div_(math.sqrt(width)).clamp_min_(_SMALLEST_STD)
                # within the square root of the row's width, so within what float16 holds
                scaled.view(rows, width)[tile] = centered.div_(std)
        return [view_bytes(scaled), view_bytes(means), view_bytes(stds)]

    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_floats(dtype)
        if not shape:
            raise RemoteError("MEANSTD_16BIT needs one dimension at least, the shape is empty")
        self.require_length(buffer, shape, dtype)
        count, rows, width = elements(shape), _rows(shape), shape[-1]
        values = new_values(count, dtype)
        if count:
            means = from_bytes(buffer, 2 * count, rows, torch.float32)[:, None]
            stds = from_bytes(buffer, 2 * count + 4 * rows, rows, torch.float32)[:, None]
            by_row = values.view(rows, width)
            for tile in tiles(rows, _rows_at_a_time(width)):
                part = by_row[tile]
                _widen(memoryview(buffer)[2 * width * tile.start : 2 * width * tile.stop], part.view(-1))
                # in the tensor's own precision at each step, as stock decoders do
                part.mul_(stds[tile]).add_(means[tile])
        return values.reshape(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:  # noqa: ARG002 - the same for all
        return 2 * elements(shape) + 8 * _rows(shape)


def _widen(halves: Buffer, out: torch.Tensor) -> None:
    """Write the float16 values at the beginning of ``halves`` into ``out``, of any float dtype."""
    bits = view_array(halves, 0, out.numel(), np.int16)
    piece = np.empty(min(out.numel(), TILE), np.int16)
    aligned = torch.from_numpy(piece).view(torch.float16)
    for tile in tiles(out.numel()):
        length = tile.stop - tile.start
        np.copyto(piece[:length], bits[tile])
        out[tile] = aligned[:length]


def _rows(shape: Sequence[int]) -> int:
    return elements(shape[:-1])


def _rows_at_a_time(width: int) -> int:
    return max(1, TILE // width)
