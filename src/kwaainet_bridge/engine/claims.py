"""Sets of pages as the bits of integers, and counts of who would like to have which page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def mask_of(pages: range) -> int:
    """The set of these pages."""
    return ((1 << len(pages)) - 1) << pages.start


def common(masks: Sequence[int], blocks: range) -> int:
    """What is in the sets of all of ``blocks``."""
    result = masks[blocks.start]
    for mask in masks[blocks.start + 1 : blocks.stop]:
        result &= mask
    return result


def lowest(mask: int) -> int:
    """The first page of a set that has any."""
    return (mask & -mask).bit_length() - 1


def first_run(mask: int, length: int) -> int | None:
    """Where the first run of that many pages begins."""
    have = 1
    while mask and have < length:
        step = min(have, length - have)
        mask &= mask >> step
        have += step
    return lowest(mask) if mask else None


def longest_run(mask: int, most: int) -> int:
    """The length of the longest run of pages, at most ``most``."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if first_run(mask, middle) is None:
            high = middle - 1
        else:
            low = middle
    return low


class Claims:
    """How many sequences claim each page of each block.

    The counts of a block are kept bit by bit, all pages at once: a claim costs a few operations on integers, however
    many others there are. A peer may make as many as the cache has pages.
    """

    def __init__(self, blocks: int) -> None:
        self._bits: list[list[int]] = [[] for _ in range(blocks)]
        """Of each block: the pages whose count has bit 0, bit 1 and so on."""
        self.claimed = [0] * blocks
        """Of each block: the pages that anybody claims."""

    def add(self, blocks: range, places: Iterable[range]) -> None:
        """Each of ``places`` is claimed once more."""
        more = _counts(places)
        for block in blocks:
            bits = self._bits[block]
            for number, pages in enumerate(more):
                _add(bits, pages, number)
            self.claimed[block] = _any(bits)

    def remove(self, blocks: range, places: Iterable[range]) -> None:
        """Undo :meth:`add` with the same arguments."""
        fewer = _counts(places)
        for block in blocks:
            bits = self._bits[block]
            for number, pages in enumerate(fewer):
                _subtract(bits, pages, number)
            self.claimed[block] = _any(bits)


def _counts(places: Iterable[range]) -> list[int]:
    bits: list[int] = []
    for place in places:
        _add(bits, mask_of(place), 0)
    return bits


def _add(bits: list[int], pages: int, number: int) -> None:
    """Add 2 ** number to the counts of ``pages``."""
    while pages:
        while number >= len(bits):
            bits.append(0)
        bits[number], pages = bits[number] ^ pages, bits[number] & pages
        number += 1


def _subtract(bits: list[int], pages: int, number: int) -> None:
    """Subtract it; the counts are large enough."""
    while pages:
        bits[number], pages = bits[number] ^ pages, pages & ~bits[number]
        number += 1
    while bits and not bits[-1]:
        bits.pop()


def _any(bits: list[int]) -> int:
    result = 0
    for pages in bits:
        result |= pages
    return result
