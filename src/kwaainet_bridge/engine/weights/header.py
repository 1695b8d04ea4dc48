"""The header of a safetensors file: which bytes each tensor has. It comes from others, so nothing in it is believed."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CheckpointError

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies, from the byte ``start`` of the file up to ``stop``; ``dtype`` as the format calls it."""

    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


def length_of(first: bytes, size: int, shown: str) -> int:
    """Bytes of the header, by the first 8 bytes of a file of ``size``. CheckpointError for what cannot be."""
    length = int.from_bytes(first, "little")
    if len(first) != 8 or not 0 < length <= min(
        size - 8, defaults.MAX_TENSOR_HEADER_BYTES
    ):  # as they are stored
        raise CheckpointError(f"{shown} is no safetensors file")
    return length


def places_in(text: bytes, size: int, shown: str) -> dict[str, Place]:
    """Where each tensor of a file of ``size`` bytes lies. CheckpointError for what cannot be."""
    begin = 8 + len(text)
    try:
        told = json.loads(text)
        told.pop("__metadata__", None)
        places = {name: _place(begin, entry) for name, entry in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{shown}: its header cannot be read: {e}") from e
    for name, place in places.items():
        if not begin <= place.start <= place.stop <= size:
            raise CheckpointError(f"{shown}: {name} lies outside of the file")
        bits = _BITS.get(place.dtype)
        if bits is not None and prod(place.shape) * bits != 8 * (place.stop - place.start):
            raise CheckpointError(f"{shown}: {name} has another size than its shape says")
    for (_, first), (name, second) in pairwise(sorted(places.items(), key=lambda item: item[1][:2])):
        if second.start < first.stop:
            raise CheckpointError(f"{shown}: {name} lies on another tensor")
    return places


def _place(begin: int, entry: Any) -> Place:
    start, stop = _integers(entry["data_offsets"])
    shape, dtype = _integers(entry["shape"]), entry["dtype"]
    if not isinstance(dtype, str) or any(length < 0 for length in shape):
        raise ValueError(f"{dtype!r} {shape} is no tensor")
    return Place(begin + start, begin + stop, dtype, shape)


def _integers(told: Any) -> tuple[int, ...]:
    if not isinstance(told, list) or not all(type(number) is int for number in told):
        raise TypeError(f"{told!r} are no integers")
    return tuple(told)
