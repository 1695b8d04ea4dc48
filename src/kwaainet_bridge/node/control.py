"""What an operator has a running node do: drain, pause, resume, read its configuration again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.idle import IdleWatch, Read, reader_for
from kwaainet_bridge.node.logs import set_level
from kwaainet_bridge.node.reloading import Reloaded, compare, merged
from kwaainet_bridge.node.state import NodeState, Phase

if TYPE_CHECKING:
    from kwaainet_bridge.net import Libp2pHost
    from kwaainet_bridge.net.admission import Admission
    from kwaainet_bridge.net.limits import Limits
    from kwaainet_bridge.node.node_models import NodeModels

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

OPERATOR: Final = "operator"


class Stopping(Exception):
    """The node drains already, so nothing else can be done with it."""


class Control:
    """Has a node do what its operator wants. ``stop`` drains it when it is set.

    ``read`` gives the configuration as it is now in the file, with the command line's values; None if there is no file.
    It may block. Raises ConfigError for an idle rule that cannot be followed here.
    """

    def __init__(
        self,
        config: NodeConfig,
        state: NodeState,
        stop: trio.Event,
        *,
        read: Callable[[], NodeConfig] | None = None,
    ) -> None:
        self.stop = stop
        self.idle = IdleWatch(config.idle, reader_for(config), state)
        self._config = config
        self._state = state
        self._read = read
        self._lock = trio.Lock()
        self._models: NodeModels | None = None
        self._bound: Callable[[NodeConfig], None] | None = None

    @property
    def drain_seconds(self) -> float:
        return self._config.drain_seconds

    def bind(
        self,
        host: Libp2pHost,
        *,
        limits: Callable[[NodeConfig], Limits],
        admission: Callable[[NodeConfig], Admission],
    ) -> None:
        """Hold ``host`` to the configuration, as it was read last and from now on.

        ``limits`` and ``admission`` say what follows from one for a host.
        """

        def apply(config: NodeConfig) -> None:
            host.set_limits(limits(config))
            host.admit(admission(config))

        apply(self._config)
        self._bound = apply

    def name(self, models: NodeModels) -> None:
        """Have ``models`` be called as the configuration says, as it was read last and from now on."""
        self._models = models
        for model in self._config.served_models:
            models.rename(model.key, model.public_name)

    def drain(self) -> None:
        """Begin to end the node: its records are withdrawn, sessions have ``drain_seconds``."""
        if not self.stop.is_set():
            log.info("asked to drain")
            self._state.note("control", "asked to drain")
        self.stop.set()

    def pause(self, *, end_sessions: bool = False) -> None:
        """Take no new work until resumed; sessions that run go on, unless they are to end. Raises Stopping."""
        self._check_runs()
        log.info("asked to pause", end_sessions=end_sessions)
        self._state.note("control", f"asked to pause{', and to end sessions' if end_sessions else ''}")
        self._state.pausing.ask(OPERATOR, "the operator has paused it", end_sessions=end_sessions)

    def resume(self) -> None:
        """Take work again, whoever has paused it; an idle rule begins anew once its bound is met. Raises Stopping."""
        self._check_runs()
        log.info("asked to resume")
        self._state.note("control", "asked to resume")
        self._state.pausing.lift()

    async def reload(self) -> Reloaded:
        """Read the configuration again and apply what can be while the node runs. Raises Stopping.

        Raises ConfigError for one that has a mistake, or that cannot be read: nothing has changed then.
        """
        async with self._lock:
            self._check_runs()
            if self._read is None:
                raise ConfigError(
                    "the node was started without a configuration file, so there is nothing to read: give one with -c"
                )
            self._state.reloads_begun += 1
            self._state.notify()
            try:
                return await self._reload(self._read)
            except ConfigError as e:
                log.warning("configuration not reloaded", reason=str(e))
                self._state.note("control", "configuration not reloaded: it has a mistake")
                raise
            finally:
                self._state.reloads_ended += 1
                self._state.notify()

    async def _reload(self, read: Callable[[], NodeConfig]) -> Reloaded:
        def prepare() -> tuple[NodeConfig, Read | None]:
            wanted = read()
            config = merged(before, wanted)
            return wanted, reader_for(config) if config.idle != before.idle else None

        before = self._config
        wanted, reader = await trio.to_thread.run_sync(prepare, abandon_on_cancel=True)  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
        result = compare(before, wanted)
        self._config = config = merged(before, wanted)
        set_level(config.log.level)
        if self._bound is not None and (config.limits, config.peers) != (before.limits, before.peers):
            self._bound(config)
        if config.idle != before.idle:
            self.idle.follow(config.idle, reader)
        if self._models is not None:
            self.name(self._models)
        log.info("configuration reloaded", applied=list(result.applied), needs_restart=list(result.restart))
        self._state.note(
            "control",
            f"configuration reloaded: {', '.join(result.applied) or 'nothing'} applied"
            + (f"; needs a restart: {', '.join(result.restart)}" if result.restart else ""),
        )
        return result

    def _check_runs(self) -> None:
        if self.stop.is_set() or self._state.phase is Phase.STOPPED:
            raise Stopping("the node drains, and ends then: start it anew")
