"""What a node is doing: one truth, told to the log, to whoever waits, and to the node's admin side."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Histogram
from kwaainet_bridge.hivemind.averaging import Status
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.events import Event, Events
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.pausing import Pausing
from kwaainet_bridge.node.phase import Phase, of_all
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from kwaainet_bridge.hivemind.client import SurveyedModel
    from kwaainet_bridge.net import Libp2pHost
    from kwaainet_bridge.node.bootstrap import BootstrapWatch
    from kwaainet_bridge.node.generating import TextModels
    from kwaainet_bridge.node.log_ring import LogRing
    from kwaainet_bridge.node.openai.sharing import SharedApp

__all__ = ["CLOCK", "NodeState", "Phase"]

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

CLOCK: Final = "clock"
"""The condition that this machine's clock is that of most bootstrap peers."""


class NodeState:
    """The node's phase and what is wrong with it, if anything; ``models`` has the same of each model, by its key.

    ``degraded`` maps the name of a condition of the whole node to its reason; the node serves on beside it.
    ``reachability`` is the verdict on whether others can dial it, and the evidence for that. ``averaging`` tells of
    each run that it helps, by its name. ``host`` and the watches of ``bootstrap``, by network, are there as long as
    they live; they are asked, not copied, when somebody wants to know. ``lag`` is how late the event loop was.
    ``surveys`` read, by network, which servers have which blocks; that asks other peers. ``events`` is what happened
    lately. ``pausing`` says whether the node is to take no work. ``openai`` is the OpenAI endpoint while there is one,
    ``texts`` are the models with which it generates text. ``logs`` keeps the newest records of the process' log, where
    that is wanted.
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
        self.pausing = Pausing()
        self.reloads_begun = self.reloads_ended = 0
        self.began = self.since = clock()
        self.facts: dict[str, object] = {}
        self.degraded: dict[str, str] = {}
        self.averaging: dict[str, Callable[[], Status]] = {}
        self.reachability = (Verdict.UNKNOWN, "no peer has tried to dial it yet")
        self.host: Libp2pHost | None = None
        self.bootstrap: dict[str, BootstrapWatch] = {}
        self.models: dict[str, ModelState] = {}
        self.openai: SharedApp | None = None
        self.texts: TextModels | None = None
        self.logs: LogRing | None = None
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

    @property
    def announces(self) -> tuple[str, ...]:
        """The networks in which blocks are to be announced."""
        return tuple(dict.fromkeys(name for model in self.models.values() for name in model.announces))

    def degradations(self) -> Iterator[tuple[ModelState | None, str, str]]:
        """All that degrades the node: of which model, None for the whole node; the condition, and the reason."""
        yield from ((None, condition, reason) for condition, reason in self.degraded.items())
        for model in self.models.values():
            yield from ((model, condition, reason) for condition, reason in model.degraded.items())

    def add_model(self, key: str, announces: Sequence[str]) -> ModelState:
        """A model that is to be served, in the networks ``announces``. ValueError if there is one with this key."""
        if key in self.models:
            raise ValueError(f"the model {key} is there already")
        self.models[key] = model = ModelState(key, self, announces=announces)
        return model

    def remove_model(self, model: ModelState) -> None:
        """A model that is served no longer; a node without any goes on."""
        del self.models[model.key]
        log.info("model removed", model=model.key)
        self.note("model", f"{model.key} is served no longer")
        self._follow({"removed": model.key})

    def follow(self, model: ModelState) -> None:
        """Be in the phase that follows from those of the models, of which ``model`` is in another; log both."""
        if len(self.models) == 1:
            self.enter(model.phase, **model.facts)
            return
        facts = {**model.facts, "model": model.key}
        log.info("model", event_kind="phase", phase=model.phase.value, **facts)
        self.note("model", f"{model.key}: {model.phase.value}")
        self._follow(facts)

    def _follow(self, facts: dict[str, object]) -> None:
        phase = of_all((model.phase for model in self.models.values()), paused=self.pausing.asked)
        if phase is self.phase:
            self.notify()
        else:
            self.enter(phase, **facts)

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
        self.notify()

    def judge(self, verdict: Verdict, evidence: str) -> None:
        """Note whether others can dial the node. Logged when the verdict is new."""
        before, self.reachability = self.reachability[0], (verdict, evidence)
        if verdict is not before:
            log.info("reachability", verdict=verdict.value, before=before.value, evidence=evidence)
            self.note("reachability", f"{verdict.value}: {evidence}")
            self.notify()

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
            self.notify()

    def recover(self, condition: str) -> None:
        if self.degraded.pop(condition, None) is not None:
            log.info("recovered", condition=condition)
            self.note("recovered", condition)
            self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Return once the phase, a condition or the reachability is another."""
        await self._changed.wait()

    async def wait_for(self, phase: Phase) -> None:
        """Return once the node is in ``phase``."""
        while self.phase is not phase:
            await self._changed.wait()
