"""What one model of a node is doing: the part of the node's truth that is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import structlog

from kwaainet_bridge import defaults
from kwaainet_bridge.node.phase import Announced, Phase

if TYPE_CHECKING:
    from kwaainet_bridge.engine import LoadProgress
    from kwaainet_bridge.node.announcing import AnnounceReport
    from kwaainet_bridge.node.served import ServedBlocks

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Owner(Protocol):
    """The node that a model is of."""

    @property
    def now(self) -> float: ...

    def follow(self, model: ModelState) -> None:
        """The model is in another phase."""
        ...

    def note(self, kind: str, text: str) -> None: ...

    def notify(self) -> None: ...

    async def wait_changed(self) -> None: ...


class ModelState:
    """One model's phase and what is wrong with it, if anything.

    ``degraded`` maps a condition's name to its reason. ``announces`` are the networks in which its blocks are to be
    announced, ``announced`` how that went, and ``prefixes`` what they are called there, once that is known.
    ``served`` is there while its blocks are; ``loading`` is how far they are on their way into memory, or were the last
    time, and ``coming`` which these are, from when they are known until they are served or given up.
    """

    def __init__(self, key: str, node: Owner, *, announces: Sequence[str] = ()) -> None:
        self.key = key
        self._node = node
        self.phase = Phase.STARTING
        self.since = node.now
        self.facts: dict[str, object] = {}
        self.degraded: dict[str, str] = {}
        self.announces = tuple(announces)
        self.announced: dict[str, Announced] = {}
        self.prefixes: dict[str, str] = {}
        self.served: ServedBlocks | None = None
        self.loading: LoadProgress | None = None
        self.coming: range | None = None
        self._loading_told = float("-inf")

    def enter(self, phase: Phase, **facts: object) -> None:
        """Move to ``phase``; the node's own phase follows from those of its models, and the log tells it."""
        self.phase, self.since, self.facts = phase, self._node.now, facts
        self._node.follow(self)

    def note_loading(self, progress: LoadProgress) -> None:
        """Note how far loading is; logged now and then while tensors are fetched."""
        self.loading = progress
        if progress.missing_bytes and self._node.now >= self._loading_told + defaults.LOADING_LOG_SECONDS:
            self._loading_told = self._node.now
            log.info(
                "fetching weights",
                model=self.key,
                mib=progress.fetched_bytes // defaults.MIB,
                of_mib=progress.missing_bytes // defaults.MIB,
            )

    def note_announced(self, report: AnnounceReport) -> None:
        """Note how a round of announcements went; it is an event if it went otherwise than the one before."""
        before = self.announced.get(report.network)
        if before is None or _outcome(before.last) != _outcome(report):
            kept = f"{report.by_others} of {report.records} records kept by others"
            self._node.note("announced", f"{self.key}: {report.state.name} in {report.network}: {kept}")
        self.announced.setdefault(report.network, Announced(report, 0.0)).add(report, self._node.now)

    def degrade(self, condition: str, reason: str) -> None:
        """Note that ``condition`` is not met. Logged when the reason is new."""
        if self.degraded.get(condition) != reason:
            self.degraded[condition] = reason
            log.warning("degraded", condition=condition, model=self.key, reason=reason)
            self._node.note("degraded", f"{condition} of {self.key}: {reason}")
            self._node.notify()

    def recover(self, condition: str) -> None:
        if self.degraded.pop(condition, None) is not None:
            log.info("recovered", condition=condition, model=self.key)
            self._node.note("recovered", f"{condition} of {self.key}")
            self._node.notify()

    async def wait_changed(self) -> None:
        """Return once something of the node is another: a phase, a condition, the reachability."""
        await self._node.wait_changed()

    async def wait_for(self, phase: Phase) -> None:
        """Return once the model is in ``phase``."""
        while self.phase is not phase:
            await self._node.wait_changed()


def _outcome(report: AnnounceReport) -> tuple[object, ...]:
    return report.state, report.records, report.by_others
