"""The idle rule: a node that pauses while others use the machine's GPU or processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import IdleConfig, NodeConfig
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.state import NodeState

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

IDLE: Final = "idle"
"""Who has paused the node, and the condition that the use can be read."""

Read = Callable[[], float]
"""How much of the device others use now, in percent. Called in a thread; raises OSError where that is not known."""


class IdleRule:
    """Says whether others use the device, from how much they do; no I/O, times are in seconds of any clock."""

    def __init__(self, config: IdleConfig) -> None:
        self._config = config
        self._since: float | None = None
        """Since when the use is on the other side of the bound."""
        self.in_use = False

    def see(self, percent: float, now: float) -> bool:
        """Note how much others use; whether they count as using it from now on."""
        config = self._config
        crossed = percent < config.resume_below if self.in_use else percent > config.pause_above
        if not crossed:
            self._since = None
            return self.in_use
        if self._since is None:
            self._since = now
        if now - self._since >= (config.resume_seconds if self.in_use else config.pause_seconds):
            self.in_use, self._since = not self.in_use, None
        return self.in_use


class IdleWatch:
    """Pauses a node by the rule of its configuration while :meth:`run` runs. ``read`` is None while the rule is off.

    A node that its operator has resumed meanwhile stays so until others have left the device and come again.
    """

    def __init__(self, config: IdleConfig, read: Read | None, state: NodeState) -> None:
        self._state = state
        self._changed = trio.Event()
        self._config, self._read = config, read
        self._rule = IdleRule(config)

    def follow(self, config: IdleConfig, read: Read | None) -> None:
        """Follow another rule from now on; what the former has paused is resumed."""
        self._config, self._read = config, read
        self._rule = IdleRule(config)
        self._state.pausing.lift(IDLE)
        self._state.recover(IDLE)
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                if self._read is not None:
                    nursery.start_soon(self._watch, self._read, self._rule)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def _watch(self, read: Read, rule: IdleRule) -> None:
        while True:
            await self._look(read, rule)
            await trio.sleep(defaults.IDLE_PERIOD_SECONDS)

    async def _look(self, read: Read, rule: IdleRule) -> None:
        try:
            # a driver may hang
            percent = await trio.to_thread.run_sync(read, abandon_on_cancel=True)  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
        except OSError as e:
            if rule is self._rule:
                self._state.degrade(IDLE, f"what others use of the {self._config.watch} cannot be read: {e}")
            return
        if rule is not self._rule:  # another one is to be followed meanwhile
            return
        self._state.recover(IDLE)
        was = rule.in_use
        if rule.see(percent, self._state.now) is was:
            return
        if rule.in_use:
            config = self._config
            reason = (
                f"others use the {config.watch}: {percent:.0f} % (idle.pause_above: {config.pause_above:g})"
            )
            log.info("others use this machine: pauses", percent=round(percent, 1))
            self._state.pausing.ask(IDLE, reason, end_sessions=self._config.end_sessions)
        else:
            log.info("this machine is idle again: resumes", percent=round(percent, 1))
            self._state.pausing.lift(IDLE)


def reader_for(config: NodeConfig) -> Read | None:
    """What reads how much others use of what the rule watches; None if it is off.

    Raises ConfigError where that cannot be read.
    """
    match config.idle.watch:
        case "off":
            return None
        case "gpu":
            from kwaainet_bridge.node.use_of_gpu import GpuReader, uuids_of

            return GpuReader(partial(uuids_of, _gpus(config)))
        case "cpu":
            from kwaainet_bridge.node.use_of_cpu import CpuReader

            return CpuReader()


def missing(package: str, watch: str) -> ConfigError:
    """The error that a library is not there."""
    return ConfigError(
        f"idle.watch: {watch} needs {package}, which is not installed: pip install 'kwaainet-bridge[idle]', or set "
        "idle.watch to off"
    )


def _gpus(config: NodeConfig) -> list[int]:
    """Those that the models are on, by torch's numbers."""
    found: set[int] = set()
    for model in config.served_models:
        kind, _, number = model.device.partition(":")
        if kind == "cuda":
            first = int(number or 0)
            found.update(range(first, first + model.tensor_parallel))
    return sorted(found)
