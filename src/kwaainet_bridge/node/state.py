"""What a node is doing: one truth, told to the log and to whoever waits."""

from __future__ import annotations

import enum
from collections.abc import Callable

import structlog
import trio

from kwaainet_bridge.hivemind.averaging import Status
from kwaainet_bridge.net.reachability import Verdict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Phase(enum.StrEnum):
    STARTING = "starting"
    BOOTSTRAPPING = "bootstrapping"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class NodeState:
    """The node's phase and what is wrong with it, if anything.

    ``degraded`` maps a condition's name to its reason; the node serves on beside it. ``reachability`` is the verdict on
    whether others can dial it, and the evidence for that. ``averaging`` tells of each run that it helps, by its
    name.
    """

    def __init__(self, *, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._changed = trio.Event()
        self.phase = Phase.STARTING
        self.since = clock()
        self.facts: dict[str, object] = {}
        self.degraded: dict[str, str] = {}
        self.averaging: dict[str, Callable[[], Status]] = {}
        self.reachability = (Verdict.UNKNOWN, "no peer has tried to dial it yet")

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
        self.phase, self.since, self.facts = phase, now, facts
        self._notify()

    def judge(self, verdict: Verdict, evidence: str) -> None:
        """Note whether others can dial the node. Logged when the verdict is new."""
        before, self.reachability = self.reachability[0], (verdict, evidence)
        if verdict is not before:
            log.info("reachability", verdict=verdict.value, before=before.value, evidence=evidence)
            self._notify()

    def degrade(self, condition: str, reason: str) -> None:
        """Note that ``condition`` is not met. Logged when the reason is new."""
        if self.degraded.get(condition) != reason:
            self.degraded[condition] = reason
            log.warning("degraded", condition=condition, reason=reason)
            self._notify()

    def recover(self, condition: str) -> None:
        if self.degraded.pop(condition, None) is not None:
            log.info("recovered", condition=condition)
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
