"""Which pages of the KV cache hold which sequence. No I/O, no tensors: numbers in, numbers out.

Every block of the served span has the same number of pages. A sequence of a session on some blocks takes page number p
of each of these blocks at once, so one list of numbers says where its tokens lie in all of them; page p of other blocks
stays free for others. A page has as many owners as there are sequences that begin alike; who wants to write into one
with several owners takes a copy first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.claims import Claims, common, first_run, longest_run, lowest, mask_of
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
        self._everything = everything
        self._free = [everything] * blocks
        self._used = [0] * blocks
        """Pages of each block that anybody has or has had."""
        self._claims = Claims(blocks)
        self._owners: dict[tuple[int, int], int] = {}
        """By page and first block: two sessions that share blocks never have the same page there."""

    def free(self, block: int) -> int:
        """Pages of one block that nobody has."""
        return self._free[block].bit_count()

    @property
    def unused(self) -> int:
        """Pages that nobody has had yet, those of all blocks together."""
        return sum(self.pages - used.bit_count() for used in self._used)

    def common(self, blocks: range) -> int:
        """Pages that are free on all of ``blocks``: what a session there could take."""
        return common(self._free, blocks).bit_count()

    def owners(self, blocks: range, page: int) -> int:
        """How many sequences of a session on ``blocks`` have the page."""
        return self._owners.get((page, blocks.start), 0)

    def claim(self, blocks: range, count: int, *, rows: int = 1) -> list[range]:
        """Where each of ``rows`` new sequences of up to ``count`` pages should begin and grow; nothing is taken by it.

        A run that nobody claims if there is one, else the longest free run up to ``count``, else an empty range.
        """
        free = common(self._free, blocks)
        unclaimed = free & self._unclaimed(blocks)
        places: list[range] = []
        while len(places) < rows and (start := first_run(unclaimed, count)) is not None:
            places.append(range(start, start + count))
            unclaimed &= ~mask_of(places[-1])
        if len(places) < rows:
            length = longest_run(free, count)
            start = first_run(free, length) if length else 0
            assert start is not None
            places += [range(start, start + length)] * (rows - len(places))
        self._claims.add(blocks, places)
        return places

    def unclaim(self, blocks: range, places: Sequence[range]) -> None:
        """Give up what :meth:`claim` returned."""
        self._claims.remove(blocks, places)

    def _unclaimed(self, blocks: range) -> int:
        """Pages that nobody claims in any of ``blocks``."""
        claimed = 0
        for block in blocks:
            claimed |= self._claims.claimed[block]
        return self._everything & ~claimed

    def take(self, blocks: range, wants: Iterable[tuple[int, int]]) -> list[list[int]]:
        """For each (count, near) so many pages, free on all of ``blocks``, of which the caller becomes the one owner.

        In one run that begins at ``near`` if that is free; else where no one claims; else anywhere. Raises OutOfPages.
        """
        free = common(self._free, blocks)
        unclaimed = free & self._unclaimed(blocks)
        left, all_taken, mask = free.bit_count(), [], 0
        for count, near in wants:
            left -= count
            if left < 0:
                raise OutOfPages
            taken: list[int] = []
            page = near
            while len(taken) < count:
                if not free >> page & 1:
                    page = lowest(unclaimed or free)
                taken.append(page)
                bit = 1 << page
                mask |= bit
                free &= ~bit
                unclaimed &= ~bit
                page += 1
            all_taken.append(taken)
        for block in blocks:
            self._free[block] &= ~mask
            self._used[block] |= mask
        for page in chain.from_iterable(all_taken):
            self._owners[page, blocks.start] = 1
        return all_taken

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
        self._places = allocator.claim(blocks, self._pages(max_length), rows=rows)

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
        self._allocator.share(self.blocks, chain.from_iterable(self.rows))
        self._allocator.release(self.blocks, chain.from_iterable(old))
        copies = self._own_partial(start) if copied else []
        wants = [
            (
                max(0, self._pages(length) - len(row)),
                row[-1] + 1 if row and row[-1] != self._adopted else place.start,
            )
            for row, place in zip(self.rows, self._places, strict=True)
        ]
        for row, taken in zip(self.rows, self._allocator.take(self.blocks, wants), strict=True):
            row.extend(taken)
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
        sources: list[tuple[list[int], int]] = []
        users = Counter(row[index] for row in self.rows)
        left = {page: self._allocator.owners(self.blocks, page) for page in users}
        for row in self.rows:
            page = row[index]
            if left[page] > 1:
                left[page] -= 1
                sources.append((row, page))
        targets = self._allocator.take(self.blocks, [(1, page + 1) for _, page in sources])
        self._allocator.release(self.blocks, [page for _, page in sources])
        for (row, _), (target,) in zip(sources, targets, strict=True):
            row[index] = target
        return [(page, target) for (_, page), (target,) in zip(sources, targets, strict=True)]

    def vacate(self) -> tuple[list[int], list[list[int]]]:
        """Give back all pages. Returns them, and the rows as numbers in that list, for :meth:`occupy`."""
        pages = self.pages
        number = {page: index for index, page in enumerate(pages)}
        rows = [[number[page] for page in row] for row in self.rows]
        self._allocator.release(self.blocks, chain.from_iterable(self.rows))
        self.rows = [[] for _ in self.rows]
        return pages, rows

    def occupy(self, count: int, rows: list[list[int]]) -> list[int]:
        """Have rows as :meth:`vacate` returned them on ``count`` pages, which are returned. Raises OutOfPages."""
        (pages,) = self._allocator.take(self.blocks, [(count, self._places[0].start)])
        self.rows = [[pages[number] for number in row] for row in rows]
        users = Counter(page for row in self.rows for page in row)
        for page, rows_with_it in users.items():
            for _ in range(rows_with_it - 1):
                self._allocator.share(self.blocks, [page])
        self._adopted = None
        return pages

    def close(self) -> None:
        """Give back everything."""
        self._allocator.release(self.blocks, chain.from_iterable(self.rows))
        self.rows = [[] for _ in self.rows]
        self._allocator.unclaim(self.blocks, self._places)
        self._places = []
        self.length = 0
