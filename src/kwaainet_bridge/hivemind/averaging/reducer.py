"""The reducing half of an all-reduce, without I/O: parts of all senders in, averages out.

Source of the rules: hivemind 1.1.12, ``averaging/partition.py``, ``TensorPartReducer``. Parts are averaged strictly in
order. A part's average is ready once every live sender gave its own; a sender that failed is left out of all parts
that it has not given. Beyond stock: a part is refused whose values could spoil the sum, and deadlines are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.peer_id import PeerId


class Reducer:
    """Averages ``lengths`` (elements of each part) over ``senders``; times are in seconds of any clock.

    Each method that can complete a part returns the numbers of those completed; ``average`` has the last one's values.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        senders: Iterable[PeerId],
        *,
        now: float,
        max_rms: float = math.inf,
        part_seconds: float = defaults.AVERAGING_PART_SECONDS,
    ) -> None:
        """``max_rms`` bounds the root mean square of a part: larger ones are refused. A sender has ``part_seconds`` for
        a part, unless an earlier one took others long."""
        self.lengths = tuple(lengths)
        self.failed: dict[PeerId, str] = {}
        self._received = dict.fromkeys(senders, 0)
        self._max_rms = max_rms
        self._part_seconds = part_seconds
        self._current = 0
        self._average: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._weight = 0.0
        self._since = now
        self._slowest = 0.0

    @property
    def done(self) -> bool:
        """All parts are averaged."""
        return self._current == len(self.lengths)

    @property
    def senders(self) -> tuple[PeerId, ...]:
        return tuple(self._received)

    def average(self, number: int) -> torch.Tensor | None:
        """The average of the part that was completed last, float32; None if all weights were zero: then nobody's
        values change.

        Only that one is kept. Whoever is to give the next part has taken this one first, or will not give it.
        """
        if number != self._current - 1:
            raise LookupError(f"part {number} was not completed last: that was {self._current - 1}")
        return self._average

    def is_ready(self, number: int) -> bool:
        return number < self._current

    def received(self, sender: PeerId) -> int:
        """Parts that a sender gave."""
        return self._received[sender]

    def expected(self, sender: PeerId) -> int:
        """How many elements the sender's next part has. Raises RemoteError if none may come from it now."""
        if sender not in self._received:
            raise RemoteError(f"{sender} is not in the group")
        if sender in self.failed:
            raise RemoteError(f"{sender} was left out: {self.failed[sender]}")
        number = self._received[sender]
        if number == len(self.lengths):
            raise RemoteError(f"{sender} sent more than {number} parts")
        if number != self._current:
            raise RemoteError(f"{sender} sent part {number} before part {self._current} was averaged")
        return self.lengths[number]

    def check(self, part: torch.Tensor, weight: float) -> None:
        """Raise RemoteError for values that would spoil a sum.

        Changes nothing here: it may run in another thread.
        """
        if not part.is_floating_point():
            raise RemoteError(f"a part has dtype {part.dtype}: only floats are averaged")
        if not part.numel():
            return
        largest = _largest(part) * weight
        if not largest <= defaults.AVERAGING_MAX_VALUE:
            raise RemoteError(f"a value times its weight {weight:g} is {largest:g}")
        check_values(part, self._max_rms)

    def add(self, sender: PeerId, part: torch.Tensor, weight: float, *, now: float) -> list[int]:
        """Take in a sender's next part, which ``check`` has found good. Raises RemoteError if it is not the next."""
        length = self.expected(sender)
        if part.numel() != length:
            raise RemoteError(f"a part of {sender} has {part.numel()} elements, not {length}")
        self._received[sender] += 1
        if self._sum is None:
            self._sum = part.to(torch.float32) * weight
        else:
            self._sum.add_(part, alpha=weight)
        self._weight += weight
        return self._advance(now)

    def fail(self, sender: PeerId, why: str, *, now: float) -> list[int]:
        """Leave a sender out of all parts that it has not given. Once is enough; the first reason counts."""
        if sender not in self._received or sender in self.failed or self.done:
            return []
        self.failed[sender] = why
        return self._advance(now)

    def deadline(self) -> float:
        """When those who have not given the current part are late."""
        if self.done:
            return math.inf
        adapted = defaults.AVERAGING_PART_FACTOR * self._slowest
        longest = defaults.AVERAGING_RESULT_FACTOR * self._part_seconds / 2
        patience = min(max(self._part_seconds, adapted), longest)
        return self._since + patience

    def late(self, now: float) -> list[PeerId]:
        """Who has not given the current part although its time is over."""
        return self._missing() if now >= self.deadline() else []

    def _missing(self) -> list[PeerId]:
        return [
            sender
            for sender, count in self._received.items()
            if count == self._current and sender not in self.failed
        ]

    def _advance(self, now: float) -> list[int]:
        completed = []
        while not self.done and not self._missing():
            total, self._sum = self._sum, None
            self._average = None if total is None or not self._weight else total.div_(self._weight)
            completed.append(self._current)
            self._weight = 0.0
            if self._current:  # before the first part, members find each other
                self._slowest = max(self._slowest, now - self._since)
            self._current += 1
            self._since = now
        return completed


def check_values(values: torch.Tensor, max_rms: float) -> None:
    """Raise RemoteError for values that are not finite, or whose root mean square exceeds ``max_rms``."""
    if not values.numel():
        return
    if max_rms == math.inf:
        if not math.isfinite(_largest(values)):
            raise RemoteError("values are not finite")
        return
    norm = float(torch.linalg.vector_norm(values))
    if not math.isfinite(norm):  # the sum of squares of finite float32 numbers is finite in float64
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if not math.isfinite(norm):
        raise RemoteError("values are not finite")
    rms = norm / math.sqrt(values.numel())
    if rms > max_rms:
        raise RemoteError(f"root mean square {rms:g} exceeds {max_rms:g}")


def difference(average: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``average`` less ``part``, float32: in the memory of ``part`` if that is float32, too."""
    return torch.sub(average, part, out=part) if part.dtype == torch.float32 else average - part


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all values are finite; needs no memory."""
    return all(math.isfinite(_largest(tensor)) for tensor in tensors if tensor.numel())


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN if any value is NaN. Of one value at least."""
    lowest, highest = map(float, torch.aminmax(values))  # both are NaN if any value is
    return max(highest, -lowest)
