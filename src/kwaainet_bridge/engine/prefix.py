"""Prefixes that sessions have in common: pages of the KV cache that are kept, found again and shared.

A page is kept with the outputs of its tokens under a key that names everything they come from: whose they are, the
blocks, the adapter, and the bytes of all inputs up to the end of the page, as a chain of BLAKE2b hashes, one for each
page. What a session finds, it neither computes nor stores again.

Accounts: a page that sessions have is promised once, by the cache in the place of all of them. One that no session has
is promised to nobody, and goes when a session needs its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.aside import aside
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.pages import PageAllocator, PageTable

PAGE = defaults.PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Key:
    """``scope`` is what sessions must have in common; ``digest`` is that of all inputs up to the end of a page."""

    scope: Hashable
    digest: bytes


@dataclass(slots=True, eq=False)
class KeptPage:
    """A page, the outputs [PAGE, H] of its tokens after the last of ``blocks``, and how many sessions have it."""

    key: Key
    blocks: range
    page: int
    output: torch.Tensor
    sessions: int


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """Tokens of whole pages that could have been kept: how many were ``found``, how many had to be ``computed``, since
    the engine began; and what is kept now."""

    found: int
    computed: int
    kept_bytes: int


class PrefixCache:
    """All kept pages of an engine, at most ``max_bytes`` with their outputs; ``page_bytes`` is a page in one block."""

    def __init__(
        self, allocator: PageAllocator, budget: PageBudget, *, page_bytes: int, max_bytes: int
    ) -> None:
        self._allocator = allocator
        self._budget = budget
        self._page_bytes = page_bytes
        self._max_bytes = self._room = max_bytes
        self._found = self._computed = 0
        self._kept: OrderedDict[Key, KeptPage] = OrderedDict()
        """Whatever was used last comes last, and the beginning of a prefix after its end."""

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    @property
    def use(self) -> PrefixUse:
        return PrefixUse(self._found * PAGE, self._computed * PAGE, self._max_bytes - self._room)

    def count(self, asked: int, found: int) -> None:
        """A step asked for so many pages, and had some of them without computing them."""
        self._found += found
        self._computed += asked - found

    def take(self, keys: Sequence[Key]) -> list[KeptPage]:
        """Pages for the first of ``keys``, as far as they are here and can be promised. The caller has them now."""
        taken: list[KeptPage] = []
        for key in keys:
            kept = self._kept.get(key)
            if kept is None:
                break
            if not kept.sessions and (self._budget.growing or not self._budget.take_now(kept.blocks, 1)):
                break
            kept.sessions += 1
            taken.append(kept)
        for kept in reversed(taken):
            self._kept.move_to_end(kept.key)
        return taken

    def leave(self, kept: KeptPage) -> None:
        """A session has the page no longer."""
        kept.sessions -= 1
        if not kept.sessions:
            self._budget.give_back(kept.blocks, 1)

    def keep(self, key: Key, blocks: range, page: int, output: torch.Tensor) -> KeptPage | None:
        """Keep a page that a session has, which was promised to it and now is to the cache; None if it is not kept.

        ``output`` is nobody else's.
        """
        size = self._bytes(blocks, output)
        if key in self._kept:
            return None
        while self._room < size:
            if not self.evict():
                return None
        self._room -= size
        self._allocator.share(blocks, [page])
        kept = self._kept[key] = KeptPage(key, blocks, page, output, 1)
        return kept

    def evict(self, blocks: range | None = None) -> bool:
        """Let go of the page, in one of ``blocks``, that no session has and that was used least recently, if any."""
        for kept in self._kept.values():
            if not kept.sessions and (blocks is None or _meet(kept.blocks, blocks)):
                del self._kept[kept.key]
                self._room += self._bytes(kept.blocks, kept.output)
                self._allocator.release(kept.blocks, [kept.page])
                return True
        return False

    def _bytes(self, blocks: range, output: torch.Tensor) -> int:
        return len(blocks) * self._page_bytes + int(output.numel() * output.element_size())


class SessionPrefix:
    """What one session, of one sequence, has in common with others: which of its pages are the cache's."""

    def __init__(self, cache: PrefixCache, scope: Hashable, table: PageTable) -> None:
        self._cache = cache
        self._scope = scope
        self._table = table
        self._shared: dict[int, KeptPage] = {}
        """By number in the sequence."""
        self._sources: list[KeptPage] = []
        """Those that the next step copies before it writes: it no longer has them, and until then nobody else may."""
        self._digest = b""
        self._hashed = 0
        """Tokens that the digest is of, the session's first; -1 after it has gone back and on with others."""

    async def keys(self, hidden: torch.Tensor, start: int, *, plain: bool) -> list[Key]:
        """Of the whole pages of ``hidden`` [1, T, H], a step at ``start``; to be asked for every step.

        None where not all before it is known, or where the step is not ``plain``: its inputs do not say it all.
        """
        if start == 0:
            self._digest, self._hashed = b"", 0
        elif start < self._hashed:
            self._hashed = -1
        if not plain or start != self._hashed or hidden.shape[1] < PAGE:
            return []
        if hidden.nbytes <= defaults.INLINE_BYTES:
            return self._hash(hidden)
        return await trio.to_thread.run_sync(self._hash, hidden)

    def _hash(self, hidden: torch.Tensor) -> list[Key]:
        data = memoryview(hidden[0].cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        size = PAGE * hidden.shape[2] * hidden.itemsize
        digest, scope, keys = self._digest, (self._scope, hidden.dtype), []
        for offset in range(0, len(data) - size + 1, size):
            digest = blake2b(digest + data[offset : offset + size], digest_size=32).digest()
            keys.append(Key(scope, digest))
        return keys

    def adopt(self, keys: Sequence[Key], start: int) -> list[torch.Tensor]:
        """Let the session, at ``start``, go on with what is kept for ``keys``; the outputs of those tokens, by page.

        One that goes back computes anew: what it has after ``start`` would be lost if there were no room for the rest.
        """
        if start != self._table.length:
            return []
        taken = self._cache.take(keys)
        if taken:
            self._table.adopt([kept.page for kept in taken])
            self._shared |= dict(enumerate(taken, start // PAGE))
        return [kept.output for kept in taken]

    async def keep(self, keys: Sequence[Key], start: int, output: torch.Tensor) -> int:
        """The step at ``start`` with these keys has run: keep its pages; how many the cache now answers for.

        ``output`` [1, T, H] is that of the whole step. Pages that the session has from the cache are passed over. Not
        cancellable.
        """
        first = start // PAGE
        new = [
            (first + number, key, output[0, number * PAGE : (number + 1) * PAGE])
            for number, key in enumerate(keys)
            if first + number not in self._shared and key not in self._cache
        ]
        copies = await aside(sum(part.nbytes for *_, part in new), lambda: [part.clone() for *_, part in new])
        count = 0
        (row,) = self._table.rows
        for (index, key, _), copy in zip(new, copies, strict=True):
            kept = self._cache.keep(key, self._table.blocks, row[index], copy)
            if kept is not None:
                self._shared[index] = kept
                count += 1
            elif key not in self._cache:
                break  # no room; those behind it would never be found
        if keys:
            self._digest, self._hashed = keys[-1].digest, start + len(keys) * PAGE
        return count

    def staying(self, start: int) -> int:
        """How many pages of the cache the session has still when it goes on at ``start``."""
        return sum(index < start // PAGE for index in self._shared)

    def settle(self, sources: Collection[int] = ()) -> None:
        """The table has changed: leave what it no longer has, but for ``sources``, which are left the next time."""
        (row,) = self._table.rows
        gone = self._sources
        self._sources = []
        for index, kept in list(self._shared.items()):
            if index >= len(row) or row[index] != kept.page:
                del self._shared[index]
                (self._sources if kept.page in sources else gone).append(kept)
        for kept in gone:
            self._cache.leave(kept)


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
