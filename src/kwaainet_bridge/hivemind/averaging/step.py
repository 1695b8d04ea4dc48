"""One step of an averager, while it is under way and after."""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Histogram
from kwaainet_bridge.errors import AveragingCancelled, DeadlineExceeded
from kwaainet_bridge.hivemind.averaging.group import Group
from kwaainet_bridge.wire.peer_id import PeerId


class Phase(enum.StrEnum):
    """Where a step is."""

    LOOKING = "looking for a group"
    WAITING = "waiting for the trigger"
    AVERAGING = "averaging"
    DONE = "done"


class Outcome(enum.StrEnum):
    """How a step ended."""

    WHOLE = "whole"
    """Everybody's values are in the average, and all of it came back."""
    PARTIAL = "partial"
    """It averaged, but somebody was left out or a share did not come back."""
    NO_GROUP = "no_group"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def of(cls, end: StepResult | Exception | None) -> Outcome:
        """That of a step which gave or raised this; None: which was cancelled."""
        match end:
            case StepResult():
                failed = end.failed_senders or end.failed_reducers or end.missing_elements
                return cls.PARTIAL if failed else cls.WHOLE
            case DeadlineExceeded():
                return cls.NO_GROUP
            case None:
                return cls.CANCELLED
        return cls.FAILED


class FailureKind(enum.StrEnum):
    """Why a member was left out of an all-reduce, or its share was given up."""

    LATE = "late"
    """A part did not come in time."""
    SILENT = "silent"
    """No average came in time."""
    LEFT = "left"
    """Its stream ended before its time."""
    UNREACHABLE = "unreachable"
    """It could not be called."""
    REFUSED = "refused"
    """It answered that it does not take part."""
    INCOMPLETE = "incomplete"
    """It sent or answered too few parts."""
    SURPLUS = "surplus"
    """It answered too many."""
    INVALID = "invalid"
    """It sent values or messages that cannot be used."""


@dataclass(frozen=True, slots=True)
class Ban:
    """A member that was left out of one all-reduce, or whose share was given up; ``at`` is unix time."""

    peer: PeerId
    kind: FailureKind
    reason: str
    at: float


@dataclass(slots=True)
class Counts:
    """What an averager did since it began. ``bans`` are the latest, oldest first."""

    steps: Counter[Outcome] = field(default_factory=Counter)
    failures: Counter[FailureKind] = field(default_factory=Counter)
    bans: deque[Ban] = field(default_factory=lambda: deque(maxlen=defaults.AVERAGING_REMEMBERED_BANS))
    allreduce_seconds: Histogram = field(default_factory=lambda: Histogram(defaults.AVERAGING_SECONDS_BOUNDS))

    def note(self, ban: Ban) -> None:
        self.failures[ban.kind] += 1
        self.bans.append(ban)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One round: what each member gathered for, and what was missing in it.

    ``failed_senders`` are members whose values are not (all) in our share of the average, ``failed_reducers`` those
    whose shares kept our local values in part or whole: ``missing_elements`` of them. Bytes are those of tensors as
    they travelled.
    """

    gathered: dict[PeerId, Any]
    failed_senders: dict[PeerId, str]
    failed_reducers: dict[PeerId, str]
    missing_elements: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Status:
    """What an averager does, and what it did since it began.

    ``phase`` is that of the step under way, None if there is none; ``members`` are those of its group, if it has one.
    ``rounds`` are steps that averaged; ``last`` is the result of the latest. ``counts`` go on changing.
    """

    phase: Phase | None
    members: tuple[PeerId, ...]
    rounds: int
    sent_bytes: int
    received_bytes: int
    last: StepResult | None
    counts: Counts = field(default_factory=Counts, compare=False)


class Step:
    """A step that was begun; ``Averager.begin`` makes it, and runs it in the background.

    Once it is averaging, neither the trigger nor the weight has any effect.
    """

    def __init__(self, weight: float, *, gather: bytes, scheduled: float, deadline: float) -> None:
        self.weight = weight
        self.phase = Phase.LOOKING
        self.group: Group | None = None
        self.gather = gather
        self.scheduled = scheduled
        self.deadline = deadline
        self.scope = trio.CancelScope()
        self._triggered = trio.Event()
        self._done = trio.Event()
        self._outcome: StepResult | Exception | None = None

    @property
    def weight(self) -> float:
        """How much the tensors count. Setting it raises ValueError unless it is finite and at least 0."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight is {weight}: it must be a finite number of at least 0")
        self._weight = float(weight)

    @property
    def triggered(self) -> bool:
        return self._triggered.is_set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def trigger(self) -> None:
        """Let the averaging begin, as soon as there is a group. The tensors may not be changed from now on."""
        self._triggered.set()

    def cancel(self) -> None:
        """Leave the group, if there is one; the tensors are unchanged."""
        self.scope.cancel()

    async def result(self) -> StepResult:
        """Wait for the end. Raises AveragingCancelled after ``cancel``, else what ``Averager.step`` raises.

        Cancelled: the step goes on.
        """
        await self._done.wait()
        if isinstance(self._outcome, StepResult):
            return self._outcome
        raise self._outcome or AveragingCancelled("this step was cancelled")

    async def wait_triggered(self) -> None:
        await self._triggered.wait()

    def end(self, outcome: StepResult | Exception | None) -> None:
        """Called once, by the averager; None if the step was cancelled."""
        self.phase = Phase.DONE
        self._outcome = outcome
        self._done.set()
