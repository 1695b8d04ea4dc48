"""The pages of the KV cache that one session has: promised, taken, shared with others, moved out and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.compute import ComputeThread, Pieces
from kwaainet_bridge.engine.offload import MovedOut, Offload
from kwaainet_bridge.engine.pages import OutOfPages, PageAllocator, PageTable, pages_for
from kwaainet_bridge.engine.prefix import Key, PrefixCache, SessionPrefix
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.errors import AllocationFailed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """The KV cache as sessions see it: which pages there are, and to whom they are promised.

    ``page_bytes`` is what a page takes in one block. Blocks are numbered from ``first_block`` of the model.
    """

    allocator: PageAllocator
    budget: PageBudget
    page_bytes: int
    first_block: int
    prefixes: PrefixCache | None = None
    offload: Offload | None = None

    def inner(self, blocks: range) -> range:
        """Numbers from 0 on for blocks of the model."""
        return range(blocks.start - self.first_block, blocks.stop - self.first_block)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A step that has its pages: ``keys`` of its whole pages, ``found`` outputs [PAGE, H] of those that were kept, and
    what is left of it to be computed, if anything is.

    There are no keys where the inputs would not tell what the pages hold.
    """

    keys: Sequence[Key]
    found: list[torch.Tensor]
    rest: Step | None


class Holding:
    """Of a session on ``blocks`` of ``shape``, (batch size, maximum length), which was promised so many pages.

    ``scope`` is what sessions must have in common to share pages, None: it shares none.
    """

    def __init__(
        self,
        room: CacheRoom,
        blocks: range,
        shape: tuple[int, int],
        *,
        promised: int,
        peer: Hashable,
        scope: Hashable,
    ) -> None:
        self.position = 0
        """How many tokens of each sequence count."""
        self.idle_since: float | None = None
        """When the last step ended; None while one runs."""
        self._room = room
        self._blocks = blocks
        self._inner = room.inner(blocks)
        self._batch_size, self._max_length = shape
        self._promised = promised
        self._peer = peer
        self._table = PageTable(room.allocator, self._inner, *shape, page_tokens=defaults.PAGE_TOKENS)
        self._prefix: SessionPrefix | None = None
        if room.prefixes is not None and scope is not None and self._batch_size == 1:
            self._prefix = SessionPrefix(room.prefixes, scope, self._table)
        self._closed = False
        self._moved: MovedOut | None = None
        self._moving: trio.Event | None = None
        self.rest()
        if room.offload is not None:
            room.offload.holdings[self] = None

    def rest(self) -> None:
        """No step runs any more."""
        if self._room.offload is not None:
            self.idle_since = self._room.offload.clock()

    def go_back(self, start: int) -> None:
        """Forget what comes after ``start`` tokens."""
        self._prepare(start, start=start)

    async def begin(self, step: Step, order: list[int] | None, *, plain: bool) -> Begun:
        """Have pages for a step, of which ``rows`` and ``copies`` are filled in; reorder first if there is an order.

        ``plain``: the pages hold what the inputs alone say. Raises AllocationFailed. Then, and when cancelled, nothing
        has changed.
        """
        tokens, keep = step.hidden.shape[1], max((source + 1 for source, _ in step.moves), default=0)
        keys: Sequence[Key] = ()
        found: list[torch.Tensor] = []
        if self._prefix is not None:
            keys = await self._prefix.keys(step.hidden, step.start, plain=plain)
            found = self._prefix.adopt(keys, step.start)
        first = len(found) * defaults.PAGE_TOKENS
        start = step.start + first
        try:
            copies = await self._take_pages(start, tokens - first, order, keep=keep)
        except BaseException:
            if found:
                self._prepare(step.start, start=step.start)
            raise
        if self._room.prefixes is not None:
            self._room.prefixes.count(len(keys), len(found))
        if first == tokens:
            return Begun(keys, found, None)
        rows = [list(row) for row in self._table.rows]
        hidden = step.hidden[:, first:]
        return Begun(
            keys, found, dataclasses.replace(step, hidden=hidden, start=start, rows=rows, copies=copies)
        )

    async def keep(self, keys: Sequence[Key], start: int, output: torch.Tensor) -> None:
        """The step at ``start`` with these keys has run: its whole pages and their outputs are for others, too."""
        if self._prefix is not None:
            self._prefix.settle()
            self._promised -= await self._prefix.keep(keys, start, output)

    def close(self) -> None:
        """Give back everything. No step may be running."""
        if self._closed:
            return
        self._closed = True
        self._table.close()
        if self._prefix is not None:
            self._prefix.settle()
        self._room.budget.give_back(self._inner, self._promised)
        if self._room.offload is not None:
            self._room.offload.holdings.pop(self, None)
            if self._moved is not None:
                self._room.offload.forget(self._moved)
            self._moved = None

    # --- room

    async def _take_pages(
        self, start: int, tokens: int, order: list[int] | None, *, keep: int
    ) -> list[tuple[int, int]]:
        """Have room for ``tokens`` from ``start`` on, after going back and reordering; pages that must be copied."""
        end = start + tokens
        needed = self._table.needed(end, start=start, order=order, keep=keep)
        if self._prefix is not None:
            needed -= self._prefix.staying(start)
        if needed > self._promised:
            await self._grow(needed, end)
        try:
            return self._prepare(end, start=start, order=order, keep=keep)
        except OutOfPages:  # sessions on other blocks have left no page that is free on all of these
            raise AllocationFailed(self._refusal(needed, end)("immediately")) from None

    def _prepare(
        self, length: int, *, start: int, order: list[int] | None = None, keep: int = 0
    ) -> list[tuple[int, int]]:
        """As :meth:`PageTable.prepare`; prefixes that no session has give way."""
        copies = self._give_way(partial(self._table.prepare, length, start=start, order=order, keep=keep))
        if self._prefix is not None:
            self._prefix.settle([source for source, _ in copies])
        return copies

    def _give_way(self, take: Callable[[], T]) -> T:
        """What ``take`` returns once it finds pages."""
        prefixes = self._room.prefixes
        while True:
            try:
                return take()
            except OutOfPages:
                if prefixes is None or not prefixes.evict(self._inner):
                    raise

    async def _grow(self, needed: int, length: int) -> None:
        most = self._batch_size * pages_for(self._max_length)
        ample = min(most, needed + self._batch_size * pages_for(defaults.CACHE_AHEAD_TOKENS))
        budget = self._room.budget
        if not budget.growing and budget.take_now(self._inner, ample - self._promised):
            self._promised = ample
            return
        await self._wait_for(needed - self._promised, self._refusal(needed, length))
        self._promised = needed

    async def _wait_for(self, pages: int, refusal: Callable[[str], str]) -> None:
        budget = self._room.budget
        if self._room.offload is not None:
            await self._room.offload.make_room(budget, self._inner, pages)
        await budget.take(
            self._inner, pages, timeout=defaults.CACHE_GROWTH_SECONDS, refusal=refusal, growing=True
        )

    def _refusal(self, needed: int, length: int) -> Callable[[str], str]:
        num_bytes = max(1, needed - self._promised) * len(self._blocks) * self._room.page_bytes
        owner = "The session" if self._peer is None else f"The session of {self._peer}"

        def text(when: str) -> str:
            return (
                f"Could not allocate {num_bytes} bytes {when}: out of memory. {owner} is at token {self.position} and "
                f"needs room for {length}: go on with another server, or later with a new session"
            )

        return text

    # --- moving out and back

    @property
    def held_tokens(self) -> int:
        """What its pages hold in each block, wherever they are: in the KV cache or, moved out, on the host."""
        return defaults.PAGE_TOKENS * (self._table.held if self._moved is None else self._moved.pages)

    @property
    def promised_tokens(self) -> int:
        """Room in the KV cache, in each block, that nobody else can have."""
        return defaults.PAGE_TOKENS * self._promised

    @property
    def moved_out(self) -> bool:
        """Whether its pages are on the host."""
        return self._moved is not None

    @property
    def held_bytes(self) -> int:
        """What its pages take in the KV cache."""
        return self._table.held * len(self._blocks) * self._room.page_bytes

    def has_room_in(self, inner: range) -> bool:
        """Whether it keeps others from pages of these blocks, which are numbered from 0."""
        return self._promised > 0 and self._inner.start < inner.stop and inner.start < self._inner.stop

    async def move_out(self, compute: ComputeThread) -> None:
        """Have the pages on the host, so that others can have their place. No step may be running.

        A step that comes meanwhile waits. Cancelled or failed: it stays where it is.
        """
        offload = self._room.offload
        assert offload is not None
        self._moving = trio.Event()
        num_bytes = self.held_bytes
        offload.left -= num_bytes
        try:
            read = partial(offload.memory.read_pages, self._blocks, self._table.pages)
            contents = await compute.run(Pieces(read, self._peer))
            if not self._closed:
                pages, rows = self._table.vacate()
                tokens = self._batch_size * self.position
                self._moved = MovedOut(contents, rows, len(pages), num_bytes, tokens)
                offload.note_out(self._moved)
                if self._prefix is not None:
                    self._prefix.settle()
                promised, self._promised = self._promised, 0
                self._room.budget.give_back(self._inner, promised)
        finally:
            if self._moved is None:
                offload.left += num_bytes
            self._moving.set()
            self._moving = None

    async def come_back(self, run: Callable[[Pieces], Awaitable[Any]]) -> None:
        """Have the pages in the cache again; ``run`` computes something after which the session must be whole.

        Raises AllocationFailed without room in time. Then, and when cancelled before ``run``, nothing has changed.
        """
        if self._moving is not None:
            await self._moving.wait()
        moved, offload = self._moved, self._room.offload
        if moved is None or offload is None:
            return
        refusal = self._refusal(moved.pages, self._table.length)
        await self._wait_for(moved.pages, refusal)
        try:
            pages = self._give_way(partial(self._table.occupy, moved.pages, moved.rows))
        except OutOfPages:
            self._room.budget.give_back(self._inner, moved.pages)
            raise AllocationFailed(refusal("immediately")) from None
        self._promised, self._moved = moved.pages, None
        offload.note_back(moved)
        await run(
            Pieces(partial(offload.memory.write_pages, self._blocks, pages, moved.contents), self._peer)
        )
