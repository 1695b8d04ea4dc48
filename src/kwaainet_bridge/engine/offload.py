"""Room in the KV cache from sessions that are idle: their pages wait in the host's memory for the next step.

Nothing moves as long as there is room. When a session begins or grows and there is none, those that have been idle for
long enough leave, the longest idle first, until there is room or the host's part is full. Whoever steps again comes
back first, and waits for room as one that grows does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import trio

from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.engine.compute import ComputeThread

if TYPE_CHECKING:
    from kwaainet_bridge.engine.holding import Holding


class Memory(Protocol):
    """What reads and writes pages, in the compute thread: see Runner."""

    def read_pages(
        self, blocks: range, pages: Sequence[int], _contended: object
    ) -> Generator[None, None, list[torch.Tensor]]: ...

    def write_pages(
        self, blocks: range, pages: Sequence[int], contents: Sequence[torch.Tensor], _contended: object
    ) -> Generator[None, None, None]: ...


@dataclass(frozen=True, slots=True, eq=False)
class MovedOut:
    """Pages of a session on the host: for each block keys and values [2, kv_heads, pages, PAGE_TOKENS, head_dim].

    ``rows[i]`` are numbers of pages in these tensors, in the order of sequence i. ``tokens`` counts those of all
    sequences.
    """

    contents: list[torch.Tensor]
    rows: list[list[int]]
    pages: int
    num_bytes: int
    tokens: int


@dataclass(slots=True)
class Moved:
    """How many sessions went one way since the engine began, and the bytes of their pages."""

    sessions: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OffloadUse:
    """What is on the host now, and what went ``out`` to it and came ``back``."""

    sessions: int
    tokens: int
    num_bytes: int
    out: Moved
    back: Moved


class Offload:
    """The host's part, of at most ``max_bytes``, for sessions that were idle for ``idle_seconds`` by ``clock``."""

    def __init__(
        self,
        memory: Memory,
        compute: ComputeThread,
        *,
        idle_seconds: float,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.left = max_bytes
        self.holdings: dict[Holding, None] = {}
        """In the order in which they began."""
        self._there: set[MovedOut] = set()
        self._out, self._back = Moved(), Moved()
        self._compute = compute
        self._idle_seconds = idle_seconds
        self._one_at_a_time = trio.Lock()

    @property
    def use(self) -> OffloadUse:
        return OffloadUse(
            len(self._there),
            sum(moved.tokens for moved in self._there),
            sum(moved.num_bytes for moved in self._there),
            replace(self._out),
            replace(self._back),
        )

    def note_out(self, moved: MovedOut) -> None:
        """These pages are on the host, where their place was taken before."""
        self._there.add(moved)
        _count(self._out, moved)

    def note_back(self, moved: MovedOut) -> None:
        """They are in the cache again."""
        self.forget(moved)
        _count(self._back, moved)

    def forget(self, moved: MovedOut) -> None:
        """Nobody needs them any more: their place is free."""
        self._there.remove(moved)
        self.left += moved.num_bytes

    async def make_room(self, budget: PageBudget, inner: range, pages: int) -> None:
        """Move idle sessions out until ``pages`` of each of the blocks are promised to nobody, or none is left to move.

        They are numbered from 0. Cancelled: a session that is moving stays where it was.
        """
        if budget.fits(inner, pages):
            return
        async with self._one_at_a_time:
            while not budget.fits(inner, pages):
                holding = self._next(inner)
                if holding is None:
                    return
                await holding.move_out(self._compute)

    def _next(self, inner: range) -> Holding | None:
        before = self.clock() - self._idle_seconds
        idle = [
            (holding.idle_since, number, holding)
            for number, holding in enumerate(self.holdings)
            if holding.idle_since is not None
            and holding.idle_since <= before
            and holding.has_room_in(inner)
            and holding.held_bytes <= self.left
        ]
        return min(idle)[2] if idle else None


def _count(way: Moved, moved: MovedOut) -> None:
    way.sessions += 1
    way.num_bytes += moved.num_bytes
