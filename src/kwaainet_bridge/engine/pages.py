"""Which pages of the KV cache hold which sequence. No I/O, no tensors: numbers in, numbers out.

Every block of the served span has the same number of pages. A sequence of a session on some blocks takes page number p
of each of these blocks at once, so one list of numbers says where its tokens lie in all of them; page p of other blocks
stays free for others. A page has as many owners as there are sequences that begin alike; who wants to write into one
with several owners takes a copy first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import EngineError


def pages_for(tokens: int) -> int:
    """Pages that so many tokens of one sequence take in each block."""
    return -(-tokens // defaults.PAGE_TOKENS)


class OutOfPages(Exception):
    """There are not so many pages free on all of these blocks. Nothing was taken."""


class PageAllocator:
    """Free pages and claims of each block, and the owners of each page in use.

    A claim is where a sequence would like to grow: others keep off as long as there is room elsewhere, since a sequence
    in one run of pages is read in place. ``blocks`` are numbered from 0.
    """

    def __init__(self, pages: int, blocks: int) -> None:
        self.pages = pages
        everything = (1 << pages) - 1
        self._free = [everything] * blocks
        self._claims = [Counter[tuple[int, int]]() for _ in range(blocks)]
        self._unclaimed = [everything] * blocks
        self._owners: dict[tuple[int, int], int] = {}
        """By page and first block: two sessions that share blocks never have the same page there."""

    def free(self, block: int) -> int:
        """Pages of one block that nobody has."""
        return self._free[block].bit_count()

    def common(self, blocks: range) -> int:
        """Pages that are free on all of ``blocks``: what a session there could take."""
        return _common(self._free, blocks).bit_count()

    def owners(self, blocks: range, page: int) -> int:
        """How many sequences of a session on ``blocks`` have the page."""
        return self._owners.get((page, blocks.start), 0)

    def claim(self, blocks: range, count: int) -> range:
        """Where a new sequence of up to ``count`` pages should begin and grow; nothing is taken by it.

        A run that nobody claims if there is one, else the longest free run up to ``count``, else an empty range.
        """
        start = _run(_common(self._unclaimed, blocks) & _common(self._free, blocks), count)
        length = count
        if start is None:
            free = _common(self._free, blocks)
            length = _longest(free, count)
            start = _run(free, length) if length else 0
        assert start is not None
        place = range(start, start + length)
        for block in blocks:
            self._claims[block][place.start, place.stop] += 1
            self._unclaimed[block] &= ~_mask(place)
        return place

    def unclaim(self, blocks: range, place: range) -> None:
        """Give up what :meth:`claim` returned."""
        key = place.start, place.stop
        for block in blocks:
            self._claims[block][key] -= 1
            if not self._claims[block][key]:
                del self._claims[block][key]
            mask = (1 << self.pages) - 1
            for start, stop in self._claims[block]:
                mask &= ~_mask(range(start, stop))
            self._unclaimed[block] = mask

    def take(self, blocks: range, count: int, *, near: int = 0) -> list[int]:
        """``count`` pages, free on all of ``blocks``, of which the caller becomes the one owner.

        In one run that begins at ``near`` if that is free; else where no one claims; else anywhere. Raises OutOfPages.
        """
        free = _common(self._free, blocks)
        if free.bit_count() < count:
            raise OutOfPages
        taken: list[int] = []
        unclaimed = free & _common(self._unclaimed, blocks)
        while len(taken) < count:
            if not free >> near & 1:
                near = _lowest(unclaimed or free)
            taken.append(near)
            bit = 1 << near
            free &= ~bit
            unclaimed &= ~bit
            near += 1
        mask = sum(1 << page for page in taken)
        for block in blocks:
            self._free[block] &= ~mask
        for page in taken:
            self._owners[page, blocks.start] = 1
        return taken

    def share(self, blocks: range, pages: Iterable[int]) -> None:
        """One more owner of each of ``pages``, which are in use."""
        for page in pages:
            self._owners[page, blocks.start] += 1

    def release(self, blocks: range, pages: Iterable[int]) -> None:
        """One owner less; a page without owners is free."""
        mask = 0
        for page in pages:
            key = page, blocks.start
            self._owners[key] -= 1
            if not self._owners[key]:
                del self._owners[key]
                mask |= 1 << page
        if mask:
            for block in blocks:
                self._free[block] |= mask


class PageTable:
    """The pages of one session's sequences. All of them have ``length`` tokens.

    ``rows[i]`` are those of sequence i, in order: token t lies in page ``rows[i][t // page_tokens]``, at
    ``t % page_tokens``.
    """

    def __init__(
        self, allocator: PageAllocator, blocks: range, rows: int, max_length: int, *, page_tokens: int
    ) -> None:
        self.blocks = blocks
        self.length = 0
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._max_length = max_length
        self._adopted: int | None = None
        """The last page that the row has from another session: what follows begins a run of its own."""
        self._places = [allocator.claim(blocks, self._pages(max_length)) for _ in range(rows)]

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    @property
    def pages(self) -> list[int]:
        """Different pages in use, as they come in the rows."""
        return list(dict.fromkeys(page for row in self.rows for page in row))

    @property
    def held(self) -> int:
        """How many these are."""
        return len({page for row in self.rows for page in row})

    def needed(self, length: int, *, start: int, order: Sequence[int] | None = None, keep: int = 0) -> int:
        """How many pages will be in use after :meth:`prepare` with the same arguments."""
        kept, fresh, copied = self._plan(length, start, order, keep)
        return kept + fresh + copied

    def prepare(
        self, length: int, *, start: int, order: Sequence[int] | None = None, keep: int = 0
    ) -> list[tuple[int, int]]:
        """Go back to ``start`` tokens, make row i what row ``order[i]`` was, and have room for ``length`` tokens.

        Returns pages to be copied, (from, to), before anything is written from ``start`` on. Raises OutOfPages, with
        the table unchanged. No step of the session may be running: pages that it no longer needs are free at once,
        but for those of the first ``keep`` tokens, from which something is yet to be moved.
        """
        if not 0 <= start <= self.length or not start <= length <= self._max_length:
            raise EngineError(
                f"no room for tokens {start}:{length} of {self._max_length}, after {self.length}"
            )
        _, fresh, copied = self._plan(length, start, order, keep)
        short = fresh + copied - self._allocator.common(self.blocks)
        if short > 0 and short > self._freed(start, order, keep):
            raise OutOfPages
        old, count = self.rows, self._pages(max(start, keep))
        self.rows = [row[:count] for row in (old if order is None else [old[row] for row in order])]
        for row in self.rows:
            self._allocator.share(self.blocks, row)
        for row in old:
            self._allocator.release(self.blocks, row)
        copies = self._own_partial(start) if copied else []
        for row, place in zip(self.rows, self._places, strict=True):
            more = self._pages(length) - len(row)
            if more > 0:
                near = row[-1] + 1 if row and row[-1] != self._adopted else place.start
                row.extend(self._allocator.take(self.blocks, more, near=near))
        self.length = length
        return copies

    def _plan(self, length: int, start: int, order: Sequence[int] | None, keep: int) -> tuple[int, int, int]:
        """Different pages that are kept, new ones, and new ones that begin as copies."""
        count = self._pages(max(start, keep))
        rows = [row[:count] for row in (self.rows if order is None else [self.rows[row] for row in order])]
        kept = len({page for row in rows for page in row})
        fresh = len(rows) * max(0, self._pages(length) - count)
        if length == start or not start % self._page_tokens:
            return kept, fresh, 0
        copied = 0
        mine = Counter(page for row in self.rows for page in row[start // self._page_tokens :])
        for page, users in Counter(row[start // self._page_tokens] for row in rows).items():
            others = self._allocator.owners(self.blocks, page) > mine[page]
            kept -= others
            copied += users - (not others)
        return kept, fresh, copied

    def _freed(self, start: int, order: Sequence[int] | None, keep: int) -> int:
        """Pages that going back to ``start`` sets free."""
        count = self._pages(max(start, keep))
        rows = self.rows if order is None else [self.rows[row] for row in order]
        stay = {page for row in rows for page in row[:count]}
        mine = Counter(page for row in self.rows for page in row)
        return sum(
            page not in stay and self._allocator.owners(self.blocks, page) == users
            for page, users in mine.items()
        )

    def adopt(self, pages: Sequence[int]) -> None:
        """Let the one row, whose pages are full, go on with these, which are in use and full."""
        (row,) = self.rows
        if len(row) * self._page_tokens != self.length:
            raise EngineError(f"pages can be adopted where one ends, not after {self.length} tokens")
        self._allocator.share(self.blocks, pages)
        row.extend(pages)
        self.length += len(pages) * self._page_tokens
        self._adopted = row[-1] if pages else None

    def _own_partial(self, start: int) -> list[tuple[int, int]]:
        """A page of its own for each row whose page, which is about to be written, has other owners."""
        index = start // self._page_tokens
        copies = []
        for row in self.rows:
            page = row[index]
            if self._allocator.owners(self.blocks, page) > 1:
                (row[index],) = self._allocator.take(self.blocks, 1, near=page + 1)
                self._allocator.release(self.blocks, [page])
                copies.append((page, row[index]))
        return copies

    def vacate(self) -> tuple[list[int], list[list[int]]]:
        """Give back all pages. Returns them, and the rows as numbers in that list, for :meth:`occupy`."""
        pages = self.pages
        number = {page: index for index, page in enumerate(pages)}
        rows = [[number[page] for page in row] for row in self.rows]
        for row in self.rows:
            self._allocator.release(self.blocks, row)
        self.rows = [[] for _ in self.rows]
        return pages, rows

    def occupy(self, count: int, rows: list[list[int]]) -> list[int]:
        """Have rows as :meth:`vacate` returned them on ``count`` pages, which are returned. Raises OutOfPages."""
        pages = self._allocator.take(self.blocks, count, near=self._places[0].start)
        self.rows = [[pages[number] for number in row] for row in rows]
        users = Counter(page for row in self.rows for page in row)
        for page, rows_with_it in users.items():
            for _ in range(rows_with_it - 1):
                self._allocator.share(self.blocks, [page])
        self._adopted = None
        return pages

    def close(self) -> None:
        """Give back everything."""
        for row in self.rows:
            self._allocator.release(self.blocks, row)
        self.rows = [[] for _ in self.rows]
        for place in self._places:
            self._allocator.unclaim(self.blocks, place)
        self._places = []
        self.length = 0


def _mask(pages: range) -> int:
    return ((1 << len(pages)) - 1) << pages.start


def _common(masks: Sequence[int], blocks: range) -> int:
    common = masks[blocks.start]
    for mask in masks[blocks.start + 1 : blocks.stop]:
        common &= mask
    return common


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _run(mask: int, length: int) -> int | None:
    """Where the first run of that many set bits begins."""
    have = 1
    while mask and have < length:
        step = min(have, length - have)
        mask &= mask >> step
        have += step
    return _lowest(mask) if mask else None


def _longest(mask: int, most: int) -> int:
    """The length of the longest run of set bits, at most ``most``."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if _run(mask, middle) is None:
            high = middle - 1
        else:
            low = middle
    return low
