"""What a node is doing: one truth, told to the log, to whoever waits, and to the node's admin side."""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Histogram
from kwaainet_bridge.hivemind.averaging import Status
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.events import Event, Events
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from kwaainet_bridge.engine import LoadProgress
    from kwaainet_bridge.hivemind.client import SurveyedModel
    from kwaainet_bridge.net import Libp2pHost
    from kwaainet_bridge.node.announcing import AnnounceReport
    from kwaainet_bridge.node.bootstrap import BootstrapWatch
    from kwaainet_bridge.node.served import ServedBlocks

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

CLOCK: Final = "clock"
"""The condition that this machine's clock is that of most bootstrap peers."""


class Phase(enum.StrEnum):
    STARTING = "starting"
    BOOTSTRAPPING = "bootstrapping"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(slots=True)
class Announced:
    """The rounds of announcements in one network: the latest, when it ended, and sums over all."""

    last: AnnounceReport
    at: float
    rounds: int = 0
    records: int = 0
    acknowledged: int = 0
    by_others: int = 0


def _outcome(report: AnnounceReport) -> tuple[object, ...]:
    return report.state, report.records, report.by_others


class NodeState:
    """The node's phase and what is wrong with it, if anything.

    ``degraded`` maps a condition's name to its reason; the node serves on beside it. ``reachability`` is the verdict on
    whether others can dial it, and the evidence for that. ``averaging`` tells of each run that it helps, by its
    name. ``host``, ``served`` and the watches of ``bootstrap``, by network, are there as long as they live; they are
    asked, not copied, when somebody wants to know. ``announces`` are the networks in which blocks are to be announced,
    and ``announced`` how that went; ``lag`` how late the event loop was. ``loading`` is how far blocks are on their way
    into memory, or were the last time. ``surveys`` read, by network, which servers have which blocks; that
    asks other peers. ``events`` is what happened lately.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = trio.current_time,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._unix_clock = unix_clock
        self._unix_began = unix_clock()
        self.events = Events()
        self.surveys: dict[str, Callable[[], Awaitable[Sequence[SurveyedModel]]]] = {}
        self._changed = trio.Event()
        self.phase = Phase.STARTING
        self.began = self.since = clock()
        self.facts: dict[str, object] = {}
        self.degraded: dict[str, str] = {}
        self.averaging: dict[str, Callable[[], Status]] = {}
        self.reachability = (Verdict.UNKNOWN, "no peer has tried to dial it yet")
        self.host: Libp2pHost | None = None
        self.bootstrap: dict[str, BootstrapWatch] = {}
        self.announces: tuple[str, ...] = ()
        self.announced: dict[str, Announced] = {}
        self.served: ServedBlocks | None = None
        self.loading: LoadProgress | None = None
        self._loading_told = float("-inf")
        self.lag = Histogram(defaults.LAG_BOUNDS)
        self._skews: dict[PeerId, float] = {}

    @property
    def now(self) -> float:
        """The time by which ``began``, ``since`` and that of announcements are told, in seconds."""
        return self._clock()

    def unix_time(self, moment: float) -> float:
        """When ``moment``, a time as :attr:`now`, was or will be in unix time, if that clock is not set meanwhile."""
        return self._unix_began + moment - self.began

    def note(self, kind: str, text: str) -> None:
        """Keep an event for whoever looks at the node; the log is told apart from that."""
        self.events.add(Event(self._unix_clock(), kind, text[: defaults.MAX_ERROR_CHARACTERS]))

    def enter(self, phase: Phase, **facts: object) -> None:
        """Move to ``phase`` and log it, with how long the last one took."""
        now = self._clock()
        log.info(
            phase.value,
            event_kind="phase",
            after_seconds=round(now - self.since, 3),
            before=self.phase.value,
            **facts,
        )
        self.note("phase", f"{phase.value}, after {now - self.since:.1f} s of {self.phase.value}")
        self.phase, self.since, self.facts = phase, now, facts
        self._notify()

    def judge(self, verdict: Verdict, evidence: str) -> None:
        """Note whether others can dial the node. Logged when the verdict is new."""
        before, self.reachability = self.reachability[0], (verdict, evidence)
        if verdict is not before:
            log.info("reachability", verdict=verdict.value, before=before.value, evidence=evidence)
            self.note("reachability", f"{verdict.value}: {evidence}")
            self._notify()

    def note_loading(self, progress: LoadProgress) -> None:
        """Note how far loading is; logged now and then while tensors are fetched."""
        self.loading = progress
        if progress.missing_bytes and self._clock() >= self._loading_told + defaults.LOADING_LOG_SECONDS:
            self._loading_told = self._clock()
            log.info(
                "fetching weights",
                mib=progress.fetched_bytes // defaults.MIB,
                of_mib=progress.missing_bytes // defaults.MIB,
            )

    def note_announced(self, report: AnnounceReport) -> None:
        """Note how a round of announcements went; it is an event if it went otherwise than the one before."""
        before = self.announced.get(report.network)
        if before is None or _outcome(before.last) != _outcome(report):
            self.note(
                "announced",
                f"{report.state.name} in {report.network}: "
                f"{report.by_others} of {report.records} records kept by others",
            )
        known = self.announced.setdefault(report.network, Announced(report, self._clock()))
        known.last, known.at = report, self._clock()
        known.rounds += 1
        known.records += report.records
        known.acknowledged += report.acknowledged
        known.by_others += report.by_others

    def hear_clock(self, peer: PeerId, ahead: float) -> None:
        """Note how many seconds a bootstrap peer's clock is ahead, 0 if near enough, and judge this machine's by all.

        One that is alone with its time is taken to be wrong itself, unless nobody else was heard.
        """
        self._skews[peer] = ahead
        off = [seconds for seconds in self._skews.values() if seconds]
        if 2 * len(off) <= len(self._skews):
            self.recover(CLOCK)
        else:
            self.degrade(
                CLOCK,
                f"{len(off)} of {len(self._skews)} bootstrap peers have another time, one is {off[-1]:+.1f} s ahead: "
                "set this machine's clock by NTP",
            )

    def degrade(self, condition: str, reason: str) -> None:
        """Note that ``condition`` is not met. Logged when the reason is new."""
        if self.degraded.get(condition) != reason:
            self.degraded[condition] = reason
            log.warning("degraded", condition=condition, reason=reason)
            self.note("degraded", f"{condition}: {reason}")
            self._notify()

    def recover(self, condition: str) -> None:
        if self.degraded.pop(condition, None) is not None:
            log.info("recovered", condition=condition)
            self.note("recovered", condition)
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Return once the phase, a condition or the reachability is another."""
        await self._changed.wait()

    async def wait_for(self, phase: Phase) -> None:
        """Return once the node is in ``phase``."""
        while self.phase is not phase:
            await self._changed.wait()
