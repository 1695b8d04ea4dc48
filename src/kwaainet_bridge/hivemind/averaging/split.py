"""Who averages what: the split that every member of a group computes alone.

Nothing about it is sent, so members that compute another one fail each other. Source: hivemind 1.1.12,
``averaging/load_balancing.py`` and ``averaging/partition.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final

import numpy as np
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.compression.codec import new_values
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.balance import balanced_scores

_BITS_AFTER: Final = {CompressionType.FLOAT16: 16, CompressionType.MEANSTD_16BIT: 16}
_BITS_OF_OTHERS: Final = 8


@dataclass(frozen=True, slots=True)
class Part:
    """``length`` elements of tensor number ``tensor``, flattened, from ``start`` on."""

    tensor: int
    start: int
    length: int

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The part itself, one-dimensional: a view if the tensor is contiguous."""
        return tensors[self.tensor].detach().reshape(-1)[self.start : self.start + self.length]


def share_elements(
    total: int,
    bandwidths: Sequence[float | None],
    balanced: Callable[[Sequence[float | None]], list[float]] = balanced_scores,
) -> tuple[int, ...]:
    """How many of ``total`` elements each member averages. None: not specified; 0, or what is no bandwidth: nothing.

    ``balanced`` decides where bandwidths are given. Raises RemoteError if nobody is there to average, or one is no
    bandwidth where others are given. With given bandwidths it takes a while, see ``balanced_scores``.
    """
    if any(bandwidth is not None and bandwidth > 0 for bandwidth in bandwidths):
        scores = balanced(bandwidths)
    else:
        scores = [1.0 if bandwidth is None else 0.0 for bandwidth in bandwidths]
    if not any(scores):
        raise RemoteError("nobody in the group averages: all members are in client mode or have bandwidth 0")
    whole = reduce(operator.add, scores)  # as all members add: sum() corrects roundings from Python 3.12 on
    shares = [int(total * score / whole) for score in scores]
    while sum(shares) < total:  # Hagenbach-Bischoff; the first of equals gets the next element
        quotients = [score / (share + 1) for score, share in zip(scores, shares, strict=True)]
        shares[quotients.index(max(quotients))] += 1
    return tuple(shares)


def partition(
    tensors: Sequence[torch.Tensor],
    shares: Sequence[int],
    compression: CompressionType = CompressionType.NONE,
    part_bytes: int = defaults.AVERAGING_PART_BYTES,
) -> list[list[Part]]:
    """The parts that each member averages, in the order in which they travel. A member may have none.

    A tensor is cut into parts of ``part_bytes`` after compression. A part that belongs to several members goes to
    the one with most of it.
    """
    total = sum(tensor.numel() for tensor in tensors)
    ends = (np.cumsum(shares) / np.sum(shares) * total).astype(np.int64)
    ends[-1] = total
    parts: list[list[Part]] = [[] for _ in shares]
    at, member = 0, 0
    for number, tensor in enumerate(tensors):
        length = part_elements(tensor.dtype, compression, part_bytes)
        for start in range(0, max(tensor.numel(), 1), length):  # an empty tensor is one empty part
            part = Part(number, start, min(length, tensor.numel() - start))
            first, overlaps, end = member, [int(ends[member]) - at], at + part.length
            while end > ends[member]:
                member += 1
                overlaps.append(int(min(end, ends[member]) - ends[member - 1]))
            owner = first + overlaps.index(max(overlaps)) if member > first else member
            parts[owner].append(part)
            at = end
    return parts


def part_elements(dtype: torch.dtype, compression: CompressionType, part_bytes: int) -> int:
    """Elements of a whole part."""
    bits = 8 * dtype.itemsize
    after = bits if compression == CompressionType.NONE else _BITS_AFTER.get(compression, _BITS_OF_OTHERS)
    return int(part_bytes / (dtype.itemsize * (after / bits)))


def deltas_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Memory for the differences between averages, which are float32, and ``tensors``; on the CPU.

    In one piece for each tensor: parts that stay until the end, among others that do not, would tear up memory.
    """
    types = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    return [new_values(t.numel(), dtype).reshape(t.shape) for t, dtype in zip(tensors, types, strict=True)]
