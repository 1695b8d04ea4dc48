"""How many pages of the KV cache are promised to sessions, and who waits for more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kwaainet_bridge.errors import AllocationFailed


@dataclass(slots=True, eq=False)
class _Waiter:
    blocks: range
    pages: int
    granted: trio.Event = field(default_factory=trio.Event)


class PageBudget:
    """Counts promised pages of each block exactly. It allocates nothing itself.

    Those who wait are admitted in the order of arrival, but sessions that live and grow before those that are to begin.
    Of the former each is admitted once there is room for it: one that waits for much, as a long prompt does, keeps no
    other from its next token.
    ``blocks`` are numbered from 0.
    """

    def __init__(self, pages: int, blocks: int) -> None:
        self.pages = pages
        self._left = [pages] * blocks
        self._growing: deque[_Waiter] = deque()
        self._beginning: deque[_Waiter] = deque()

    @property
    def left(self) -> int:
        """Pages that are promised to nobody, those of all blocks together."""
        return sum(self._left)

    @property
    def growing(self) -> bool:
        """Whether sessions that live wait for more."""
        return bool(self._growing)

    def fits(self, blocks: range, pages: int) -> bool:
        """Whether ``pages`` of each of ``blocks`` are promised to nobody."""
        return min(self._left[blocks.start : blocks.stop]) >= pages

    def take_now(self, blocks: range, pages: int) -> bool:
        """Promise ``pages`` of each of ``blocks`` if they are left, past those who wait; whether they were."""
        if not self.fits(blocks, pages):
            return False
        for block in blocks:
            self._left[block] -= pages
        return True

    async def take(
        self,
        blocks: range,
        pages: int,
        *,
        timeout: float,
        refusal: Callable[[str], str],
        growing: bool = False,
    ) -> None:
        """Promise ``pages`` of each of ``blocks``, for a session that grows or for one that begins.

        ``timeout`` in seconds; 0 takes what is left now, past those who wait, or fails at once. Raises
        AllocationFailed when they are not left in time, at once if they never could be; its text is
        ``refusal("immediately")`` or ``refusal("within 5 s")``. Cancelled while waiting: the place in the queue is
        given up and nothing is promised.
        """
        queue = self._growing if growing else self._beginning
        waiting = not growing and bool(self._growing or self._beginning)
        # who does not wait takes no turn from those who do: nearly all clients ask this way
        if (timeout <= 0 or not waiting) and self.take_now(blocks, pages):
            return
        if timeout <= 0 or pages > self.pages:
            raise AllocationFailed(refusal("immediately"))
        waiter = _Waiter(blocks, pages)
        queue.append(waiter)
        try:
            with trio.move_on_after(timeout):
                await waiter.granted.wait()
        except trio.Cancelled:
            if waiter.granted.is_set():
                self.give_back(blocks, pages)
            raise
        finally:
            if not waiter.granted.is_set():
                queue.remove(waiter)
                self._admit()  # it may have stood before a smaller one
        if not waiter.granted.is_set():
            raise AllocationFailed(refusal(f"within {timeout:g} s"))

    def give_back(self, blocks: range, pages: int) -> None:
        """Take back a promise, or a part of one."""
        for block in blocks:
            self._left[block] += pages
        self._admit()

    def _admit(self) -> None:
        for waiter in list(self._growing):
            if self.take_now(waiter.blocks, waiter.pages):
                self._growing.remove(waiter)
                waiter.granted.set()
        while not self._growing and self._beginning:
            if not self.take_now(self._beginning[0].blocks, self._beginning[0].pages):
                return
            self._beginning.popleft().granted.set()
