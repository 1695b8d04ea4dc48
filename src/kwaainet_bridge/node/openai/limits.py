"""How many requests are taken: at one time, and per minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from kwaainet_bridge.node.openai.bodies import ApiError


class Limits:
    """``at_once`` requests run at one time, and with ``per_minute`` so many begin in a minute, or all at its start."""

    def __init__(
        self, *, at_once: int, per_minute: int | None, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._at_once = at_once
        self._per_minute = per_minute
        self._clock = clock
        self._running = 0
        self._left = float(per_minute or 0)
        self._since: float | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within the block a request is taken. Raises ApiError beyond a limit."""
        if self._per_minute is not None:
            now = self._clock()
            if self._since is not None:
                gained = (now - self._since) * self._per_minute / 60
                self._left = min(float(self._per_minute), self._left + gained)
            self._since = now
            if self._left < 1:
                raise ApiError(
                    429,
                    f"more than {self._per_minute} requests a minute: try again",
                    code="rate_limit_exceeded",
                )
        if self._running >= self._at_once:
            raise ApiError(
                429,
                f"{self._running} requests are answered now, as many as are taken",
                code="rate_limit_exceeded",
            )
        self._left -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
