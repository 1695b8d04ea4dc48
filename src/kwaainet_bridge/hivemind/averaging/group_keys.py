"""The DHT keys at which averagers meet, and how they change from round to round.

Source: hivemind 1.1.12, ``averaging/key_manager.py``, ``averaging/averager.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch

from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.values import Found, FoundEntry
from kwaainet_bridge.wire.peer_id import PeerId


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a prefix that no group key can begin with."""
    if not prefix or "." in prefix:
        raise ValueError(f"averaging prefix {prefix!r}: must be text without a dot")


def check_bits(bits: str) -> None:
    """Raises ValueError unless ``bits`` are zeros and ones, or none."""
    if set(bits) - {"0", "1"}:
        raise ValueError(f"group bits {bits!r}: only 0 and 1 may be in them")


def group_key(prefix: str, bits: str) -> str:
    return f"{prefix}.0b{bits}"


def state_key(prefix: str) -> str:
    """Where peers say that others can download their state."""
    return f"{prefix}.all_averagers"


Numbers: TypeAlias = Callable[[bytes, int, int], Sequence[int]]
"""From a group's id, how many numbers there are and how many members: a different number for each of them."""


def stock_numbers(group_id: bytes, buckets: int, size: int) -> Sequence[int]:
    return random.Random(group_id).sample(range(buckets), size)


def next_bits(
    bits: str,
    group_id: bytes,
    index: int,
    size: int,
    target_size: int | None,
    *,
    numbers: Numbers = stock_numbers,
) -> str:
    """The group bits of member number ``index`` after a round with ``group_id``; all members know all of these.

    Members of one group go apart: each draws another number below ``target_size``, or the next power of two, and its
    digits push out the oldest bits.
    """
    if not bits:
        return bits
    buckets = target_size or 1 << (size - 1).bit_length()
    number = numbers(group_id, buckets, size)[index]
    width = math.ceil(math.log2(buckets))
    return (bits + (format(number, "b").rjust(width, "0")))[-len(bits) :]


def schema_hash(tensors: Iterable[torch.Tensor]) -> bytes:
    """What tells groups apart whose tensors differ in number, shape or kind: 20 bytes.

    Every fact is hashed as text. ``compression`` is always 0: stock peers describe bare tensors here.
    """
    described = [
        {
            "size": f"torch.Size({list(tensor.shape)})",
            "dtype": str(tensor.dtype),
            "layout": str(tensor.layout),
            "device": str(tensor.device),
            "requires_grad": str(tensor.requires_grad),
            "pin_memory": str(tensor.is_pinned()),
            "compression": "0",
        }
        for tensor in tensors
    ]
    return DhtId.of(described).to_bytes()


def entries_of(found: Found | None) -> list[tuple[PeerId, FoundEntry]]:
    """The entries of a dictionary that peers keep under their ids; others are left out."""
    if found is None or not found.is_dictionary:
        return []
    entries = []
    for subkey, entry in found.value.items():
        if isinstance(subkey, bytes) and is_peer_id(subkey):
            entries.append((PeerId(subkey), entry))
    return entries


def is_peer_id(raw: bytes) -> bool:
    return 2 <= len(raw) <= 64 and raw[1] == len(raw) - 2
