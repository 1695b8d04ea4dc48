"""Plain counts, kept where things happen and read by whoever wants to know. Nothing here knows who that is."""

from __future__ import annotations

import bisect
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from kwaainet_bridge import defaults


class Histogram:
    """How often values up to each of some bounds were seen, and their sum.

    ``bounds`` rise; values above the last one are counted, too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = (*bounds, math.inf)
        self.sum = 0.0
        self.largest = 0.0
        self._counts = [0] * len(self.bounds)

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.largest = max(self.largest, value)

    def cumulative(self) -> list[tuple[float, int]]:
        """Each bound, the last one infinite, and how many values were not above it."""
        seen, rows = 0, []
        for bound, count in zip(self.bounds, self._counts, strict=True):
            seen += count
            rows.append((bound, seen))
        return rows

    def quantile(self, share: float) -> float:
        """The bound below which ``share`` (0 to 1) of the values are, at most the largest value; 0 without values."""
        wanted = share * self.count
        bound = next((bound for bound, seen in self.cumulative() if seen >= wanted), math.inf)
        return min(bound, self.largest)


@dataclass(slots=True)
class Refused:
    """Whom a host turned away how often, and when last. ``who`` is a peer's id, or an address where none is proven."""

    who: str
    scope: str
    reason: str
    times: int
    at: float


class Refusals:
    """What a host has turned away since it began: ``connections`` beyond its limits or those of an ``address``,
    ``streams`` beyond its limits or those of a ``protocol``."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("connections", "address", "denied", "streams", "protocol"), 0)
        self._latest: OrderedDict[tuple[str, str], Refused] = OrderedDict()

    def note(self, scope: str, who: str, reason: str, now: float) -> None:
        """Count one; of whom it was the latest ``defaults.REFUSED_KEPT`` are kept."""
        self._counts[scope] += 1
        times = 1 if (known := self._latest.pop((who, scope), None)) is None else known.times + 1
        self._latest[who, scope] = Refused(who, scope, reason, times, now)
        if len(self._latest) > defaults.REFUSED_KEPT:
            self._latest.popitem(last=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each scope."""
        return dict(self._counts)

    @property
    def latest(self) -> list[Refused]:
        """Who was turned away, the latest first."""
        return list(reversed(self._latest.values()))


def _seconds() -> Histogram:
    return Histogram(defaults.STEP_SECONDS_BOUNDS)


@dataclass(slots=True)
class EngineCounts:
    """How steps of sessions were computed: how long each waited for its batch, and of each batch, how long it took, and
    how many tokens of all its steps it had."""

    queue_seconds: Histogram = field(default_factory=_seconds)
    batch_seconds: Histogram = field(default_factory=_seconds)
    batch_tokens: Histogram = field(default_factory=lambda: Histogram(defaults.BATCH_TOKENS_BOUNDS))


@dataclass(slots=True)
class ServingCounts:
    """What was computed for callers of one network since the start.

    ``steps`` are those of inference sessions, ``passes`` forward and backward requests; tokens count each sequence of a
    batch. Bytes are those of tensors as they travelled, by the name of their compression. ``step_seconds`` is how long
    a step took: to ``read`` what came, in the ``engine``, and to make and send the ``reply``.
    """

    steps: int = 0
    step_tokens: int = 0
    passes: int = 0
    pass_tokens: int = 0
    refused: int = 0
    step_seconds: dict[str, Histogram] = field(
        default_factory=lambda: {phase: _seconds() for phase in ("read", "engine", "reply")}
    )
    received_bytes: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def time_step(self, *times: float) -> None:
        """Count a step by when it came, when it was read, when the engine had done it, and when it was replied to."""
        for histogram, (began, ended) in zip(self.step_seconds.values(), pairwise(times), strict=True):
            histogram.observe(ended - began)
