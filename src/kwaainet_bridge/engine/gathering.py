"""Whether steps that are ready wait a moment for others. No I/O, no clock: numbers and times in, a decision out.

Sessions that decode come again soon after a batch has answered them, one after the other. Were the first to come to run
at once, it would run alone while the others pile up behind it: they fall into two batches that take turns, each at
nearly the price of one with all. So after a batch of steps those that come first wait for as many as ran or waited when
it ended, if these fit into one: never longer than a share of what that batch took, nor than half a second, and less and
less often where too few come in time.
"""

from __future__ import annotations

from dataclasses import dataclass

from kwaainet_bridge import defaults


@dataclass(slots=True)
class Gathering:
    """Told of each batch of steps that ended, and asked while some are ready. Times are in seconds."""

    _expected: int = 0
    _until: float = float("-inf")
    _ready_at_first: int | None = None
    """How many there were when they began to be held back; None while they are not."""
    _pause: int = 0
    """Batches to leave out after it was last in vain."""
    _batches_left_out: int = 0

    def ended(self, now: float, seconds: float, steps: int) -> None:
        """A batch of steps took so many seconds; ``steps`` were in it or came meanwhile."""
        self._ready_at_first = None
        if self._batches_left_out:
            self._batches_left_out -= 1
            self._expected = 0
        else:
            longest = min(defaults.GATHER_SHARE * seconds, defaults.SCHEDULER_PATIENCE_SECONDS)
            self._expected, self._until = steps, now + longest

    def held_until(self, now: float, ready: int) -> float | None:
        """When the ``ready`` steps should run at the latest, if they are to wait for others; None: now."""
        if ready < self._expected and now < self._until:
            if self._ready_at_first is None:
                self._ready_at_first = ready
            return self._until
        if self._ready_at_first is not None:
            self._judge(came=ready - self._ready_at_first, missing=self._expected - self._ready_at_first)
        self._expected = 0
        return None

    def _judge(self, came: int, missing: int) -> None:
        """Having waited paid if most of those came that were missing."""
        self._ready_at_first = None
        self._pause = 0 if 2 * came >= missing else min(max(2, 2 * self._pause), defaults.GATHER_MAX_PAUSE)
        self._batches_left_out = self._pause
