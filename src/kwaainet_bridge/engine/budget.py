"""How many bytes of KV cache are promised to sessions, and who waits for more."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from kwaainet_bridge.errors import AllocationFailed


@dataclass(slots=True)
class _Waiter:
    num_bytes: int
    granted: trio.Event = field(default_factory=trio.Event)


class CacheBudget:
    """Counts bytes exactly; those who wait are admitted in the order of arrival. It allocates nothing itself."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.left = total
        self._waiting: deque[_Waiter] = deque()

    @asynccontextmanager
    async def reserve(self, num_bytes: int, *, timeout: float) -> AsyncIterator[None]:
        """Hold ``num_bytes`` for the duration of the block.

        ``timeout`` in seconds; 0 takes what is free now, past those who wait, or fails at once. Raises
        AllocationFailed when there is no room in time, at once if there never could be. Cancelled while
        waiting: the place in the queue is given up. The bytes are returned on every way out.
        """
        await self._take(num_bytes, timeout)
        try:
            yield
        finally:
            self._give_back(num_bytes)

    async def _take(self, num_bytes: int, timeout: float) -> None:
        # who does not wait takes no turn from those who do: nearly all clients ask this way
        if num_bytes <= self.left and (timeout <= 0 or not self._waiting):
            self.left -= num_bytes
            return
        if timeout <= 0 or num_bytes > self.total:
            raise AllocationFailed(f"Could not allocate {num_bytes} bytes immediately: out of memory")
        waiter = _Waiter(num_bytes)
        self._waiting.append(waiter)
        try:
            with trio.move_on_after(timeout):
                await waiter.granted.wait()
        except trio.Cancelled:
            if waiter.granted.is_set():
                self._give_back(num_bytes)
            raise
        finally:
            if not waiter.granted.is_set():
                self._waiting.remove(waiter)
                self._admit()  # it may have stood before a smaller one
        if not waiter.granted.is_set():
            raise AllocationFailed(
                f"Could not allocate {num_bytes} bytes within {timeout:g} s: out of memory"
            )

    def _give_back(self, num_bytes: int) -> None:
        self.left += num_bytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0].num_bytes <= self.left:
            waiter = self._waiting.popleft()
            self.left -= waiter.num_bytes
            waiter.granted.set()
