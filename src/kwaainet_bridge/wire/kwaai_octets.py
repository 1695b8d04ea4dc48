"""Bytes that come as a msgpack array of integers, as Rust peers send them: a byte below 128 as itself, others as two.

Source: KwaaiNet v0.6.2 with rmp-serde 1.3.1, which writes each element of a ``Vec<u8>`` as an integer.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kwaainet_bridge.compression.codec import TILE, Buffer
from kwaainet_bridge.errors import RemoteError

_U8: Final = 0xCC
"""Stands before an integer of one byte; below 128 it may be left out."""


def read_octets(data: memoryview, at: int, count: int, name: str) -> tuple[Buffer, int]:
    """The ``count`` items that begin at ``at``, as bytes, and where they end.

    Integers have their shortest form or that of one byte (``cc``); no encoder writes other ones. Raises RemoteError
    naming the field for anything else and where items are missing; before that, no more is allocated than there
    are bytes. Takes about 20 ns for each item.
    """
    if count > len(data) - at:
        raise RemoteError(f"{name} announces {count} items in {len(data) - at} bytes")
    octets = np.empty(count, np.uint8)
    done = 0
    while done < count:
        tile = np.frombuffer(data[at : at + min(TILE, 2 * (count - done))], np.uint8)
        marks = _marks(tile)
        if tile.size and marks[-1]:  # its value is not in this tile
            tile, marks = tile[:-1], marks[:-1]
        kept = np.flatnonzero(~marks)[: count - done]
        if not kept.size:
            raise RemoteError(f"{name} ends after {done} of {count} items")
        used = int(kept[-1]) + 1
        tile, marks = tile[:used], marks[:used]
        lone = tile >= 0x80
        lone[1:] &= ~marks[:-1]
        lone &= ~marks
        if lone.any():
            first = int(lone.argmax())
            item = done + first - int(np.count_nonzero(marks[:first]))
            raise RemoteError(
                f"{name}: item {item} begins with {int(tile[first]):#x}, no integer of 0 to 255"
            )
        octets[done : done + kept.size] = tile[kept]
        done += kept.size
        at += used
    return octets.data if count else b"", at


def _marks(tile: np.ndarray) -> np.ndarray:
    """Which bytes of a tile, whose first one begins an item, are a mark and not a value.

    A ``cc`` is one if the number of its kind without a gap before it is even.
    """
    marks: np.ndarray = tile == _U8
    places = np.flatnonzero(marks)
    behind_another = np.flatnonzero(np.diff(places) == 1) + 1
    if behind_another.size:  # rare: one in 256 values of random bytes
        begins = np.diff(behind_another, prepend=-1) != 1
        run = np.maximum.accumulate(np.where(begins, behind_another, 0))
        marks[places[behind_another[(behind_another - run) & 1 == 0]]] = False
    return marks
