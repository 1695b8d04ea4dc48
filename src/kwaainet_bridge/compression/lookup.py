"""Which interval a float32 lies in, found by its upper bits in place of a search.

The upper 16 bits of a float32 (sign, exponent, 7 bits of mantissa) cut the number line into cells. A table says
for each cell in which interval it begins; what is left is to look whether a value lies beyond the interval's end
within the cell. Tables are indexed by those bits as an unsigned number.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import torch

from kwaainet_bridge.compression.codec import TILE, tiles

CELLS: Final = 1 << 16
_MANY: Final = 4


def _cells(bits: np.ndarray, out: np.ndarray) -> torch.Tensor:
    """The cell of each float32 whose bits are given as int32, in ``out`` (int32)."""
    np.right_shift(bits.view(np.uint32), 16, out=out.view(np.uint32))
    return torch.from_numpy(out)


class NearestCode:
    """The nearest of 256 ascending float32 codes between -1 and 1, of two the lower one; for NaN that of zero.

    No cell may hold more than one border between two codes. A table entry for a cell is made so that adding a
    value's own bits gives the code in the upper half of an int32: the lower half carries into it exactly when the
    value lies beyond the border. Below zero floats with larger bits are smaller, so there the upper half counts
    in the negative, and its magnitude is the code.
    """

    def __init__(self, codes: torch.Tensor) -> None:
        self._codes = codes
        keys = torch.arange(CELLS, dtype=torch.int64)
        signed = torch.where(keys < CELLS // 2, keys, keys - CELLS)
        starts = _float(signed << 16)
        inside, nan = starts.abs() <= 1, starts.isnan()
        first = torch.where(nan, self._search(torch.zeros(1)), self._search(starts))
        last = self._search(_float((signed << 16) + CELLS - 1))
        crossed = inside & (first != last)
        if ((last - first)[crossed].abs() != 1).any():
            raise ValueError("two borders in one cell")
        # the first value beyond the border: bisect the lower bits
        low = torch.zeros_like(keys)
        for bit in reversed(range(16)):
            probe = low + (1 << bit)
            before = self._search(_float((signed << 16) + probe - 1)) == first
            low = torch.where(crossed & before, probe, low)
        carry = torch.where(crossed, CELLS - low, 0)
        upper = torch.where(keys < CELLS // 2, first, -first)
        entries = ((upper - signed) << 16) + carry
        self._entries = torch.where(inside | nan, entries, 0).to(torch.int32)

    def find(self, values: np.ndarray, out: np.ndarray, keys: np.ndarray, entries: np.ndarray) -> None:
        """Write the codes of the first float32 ``values`` into ``out``, uint8, as many as it has.

        ``keys`` and ``entries`` are int32, as long as ``values``, and hold nothing of use before or after.
        """
        bits = values.view(np.int32)
        torch.index_select(self._entries, 0, _cells(bits, keys), out=torch.from_numpy(entries))
        np.abs(np.right_shift(np.add(entries, bits, out=entries), 16, out=entries), out=entries)
        np.copyto(out, entries[: len(out)], casting="unsafe")

    def find_on_device(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """``find`` for tensors on one device, with torch's kernels."""
        bits = values.view(torch.int32)
        keys = bits.bitwise_right_shift(16).bitwise_and_(CELLS - 1)
        entries = _on_device(self._entries, values.device).index_select(0, keys)
        out.copy_(entries.add_(bits).bitwise_right_shift_(16).abs_()[: len(out)])

    def _search(self, values: torch.Tensor) -> torch.Tensor:
        """The rule itself, in float32: the code at or below, unless the next one is strictly nearer."""
        codes = self._codes
        below = (torch.bucketize(values, codes, right=True) - 1).clamp_min(0)
        above = (below + 1).clamp_max(len(codes) - 1)
        return below + ((values - codes[above]).abs() < (values - codes[below]).abs())


@lru_cache(maxsize=16)
def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    return table.to(device)


def _float(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


class Buckets:
    """How many of some ascending finite float32 borders are below a value, as ``torch.bucketize`` counts."""

    def __init__(self, borders: torch.Tensor) -> None:
        self._borders = borders = borders + 0.0  # no negative zeros: they would be cells below zero
        self._ends = torch.cat([borders, torch.tensor([float("inf")])])
        bits = borders.view(torch.int32)
        ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> 16
        in_cell = torch.bincount(ascending.to(torch.int64) + CELLS // 2, minlength=CELLS)
        before = (in_cell.cumsum(0) - in_cell).to(torch.int32)
        self._first = torch.cat([before[CELLS // 2 :], before[: CELLS // 2].flip(0)])
        self._most = int(in_cell.max())

    def count_below(self, values: torch.Tensor) -> torch.Tensor:
        """For finite float32 ``values`` of one dimension, as int32."""
        if self._most > _MANY:
            return torch.bucketize(values, self._borders, out_int32=True)
        bits = values.numpy().view(np.int32)
        counts = self._first.index_select(0, _cells(bits, np.empty_like(bits)))
        for _ in range(self._most):
            counts += values > self._ends.index_select(0, counts)
        return counts


def look_up(table: torch.Tensor, keys: np.ndarray, out: torch.Tensor) -> None:
    """Write the value in ``table`` of each key into ``out``; keys are unsigned and may be read-only memory."""
    count = min(len(keys), TILE)
    aligned, wide = np.empty(count, keys.dtype), np.empty(count, np.int32)
    places = torch.from_numpy(wide)
    for tile in tiles(len(keys)):
        found, length = out[tile], tile.stop - tile.start
        if length < count:
            aligned, wide, places = aligned[:length], wide[:length], places[:length]
        # converting straight from an odd address is several times slower than this copy
        np.copyto(aligned.view(np.uint8), keys[tile].view(np.uint8))
        np.copyto(wide, aligned)
        torch.index_select(table, 0, places, out=found)
