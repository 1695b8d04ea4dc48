"""The models of a node: each loaded, served, moved, drained and tried again on its own."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig, check_together
from kwaainet_bridge.engine import Engine
from kwaainet_bridge.errors import ConfigError, EngineDied
from kwaainet_bridge.node.memory import available_bytes, release
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.phase import Phase, of_all
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.readiness import BLOCKS
from kwaainet_bridge.node.served import ServingNetwork
from kwaainet_bridge.node.serving import LOAD_ERRORS, ModelService
from kwaainet_bridge.node.state import NodeState

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


_HAVE_SERVED: Final = (Phase.SERVING, Phase.PAUSED, Phase.DRAINING)


@dataclass(slots=True, eq=False)
class _Model:
    config: ModelConfig
    state: ModelState
    networks: Sequence[ServingNetwork]
    service: ModelService | None = None
    stop: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)
    died: bool = False
    """Whether its engine did, once."""

    def end(self) -> None:
        """Drain it if it serves; else there is nothing to drain."""
        self.stop.set()
        if self.state.phase not in _HAVE_SERVED:
            self.scope.cancel()


class NodeModels:
    """Serves models in ``networks``, none of them in the way of another.

    Those of the configuration are given at the beginning, and are in ``state`` from then on; :meth:`add` and
    :meth:`remove` change which there are while :meth:`run` runs. ``drain_seconds``, ``load``, ``memory`` and ``rng``
    are as in :class:`.ModelService`; what models will still take is subtracted from what ``memory`` tells.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        networks: Sequence[ServingNetwork],
        state: NodeState,
        *,
        reachability: ReachabilityWatch,
        drain_seconds: float,
        load: Callable[..., Awaitable[Engine]] = Engine.load,
        memory: Callable[[str], int | None] = available_bytes,
        rng: random.Random | None = None,
    ) -> None:
        self._networks = networks
        self._state = state
        self._reachability = reachability
        self._drain_seconds = drain_seconds
        self._load = load
        self._memory = memory
        self._rng = rng or random.Random()
        self._models: dict[str, _Model] = {}
        self._nursery: trio.Nursery | None = None
        self._joined = trio.Event()
        self._stopping = False
        for config in configs:
            self._prepare(config)
        self._alone = next(iter(self._models.values())) if len(self._models) == 1 else None

    async def run(self, stop: trio.Event, *, join: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve the models until told to stop, then drain all at once.

        ``join`` returns once the networks can be asked and told, as in :meth:`.ModelService.run`. The only model of a
        configuration must load, and go on: else this raises what that raises. One of several that fails, and one whose
        engine died, is tried again after a pause, and degrades the node meanwhile.
        Cancelled: all records are withdrawn, sessions are not waited for.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            joining = trio.CancelScope()
            nursery.start_soon(self._join, join, joining)
            for model in self._models.values():
                nursery.start_soon(self._keep, model)
            await stop.wait()
            self._stopping = True
            joining.cancel()
            if not self._models and self._state.phase in _HAVE_SERVED:
                self._state.enter(Phase.DRAINING)
            for model in self._models.values():
                model.end()

    def add(self, config: ModelConfig) -> ModelState:
        """Begin to load another model, and serve it then; its state tells how that goes.

        Raises ConfigError for one that cannot be served beside the others or in any network. Nothing changes then.
        ValueError unless the node runs.
        """
        if self._nursery is None or self._stopping:
            raise ValueError("models can be added while the node runs")
        if config.key in self._models:
            raise ConfigError(
                f"{config.key} is served here already: remove it first, or give it another dht_prefix"
            )
        kwaainet = any(network.name == "kwaainet" for network in self._networks)
        try:
            check_together([*(model.config for model in self._models.values()), config], kwaainet=kwaainet)
        except ValueError as e:
            raise ConfigError(str(e)) from e
        model = self._prepare(config)
        self._nursery.start_soon(self._keep, model)
        return model.state

    async def remove(self, key: str) -> None:
        """Serve a model no longer; return once its sessions have ended, its records say so, and its memory is free.

        A model that does not serve yet is dropped at once. Raises ConfigError if there is no such model. Cancelled: it
        goes all the same.
        """
        model = self._models.get(key)
        if model is None:
            raise ConfigError(f"no model {key} is served here, but {', '.join(self._models) or 'none'}")
        model.end()
        await model.gone.wait()

    def rename(self, key: str, public_name: str | None) -> None:
        """Have monitors of the networks show another name for a model, from now on; nothing happens if it has it."""
        model = self._models.get(key)
        if model is None or model.config.public_name == public_name:
            return
        model.config = model.config.model_copy(update={"public_name": public_name})
        if model.service is not None:
            model.service.rename(public_name)

    def _prepare(self, config: ModelConfig) -> _Model:
        networks = [network for network in self._networks if network.name in config.networks]
        if not networks:
            there = ", ".join(network.name for network in self._networks) or "none"
            raise ConfigError(
                f"{config.key} has no network to be served in: its networks are {', '.join(config.networks)}, and "
                f"those in which this node has served blocks since its start are {there}"
            )
        state = self._state.add_model(config.key, [network.name for network in networks])
        self._models[config.key] = model = _Model(config, state, networks)
        return model

    async def _join(self, join: Callable[[], Awaitable[None]] | None, scope: trio.CancelScope) -> None:
        with scope:
            if join is not None:
                await join()
            self._rest()
            self._joined.set()
            pausing = self._state.pausing
            while True:
                await pausing.wait_until(asked=not pausing.asked)
                self._rest()

    def _rest(self) -> None:
        """Be in the phase of a node without models, if this is one: those that there are do so themselves."""
        if not self._models:
            reason = self._state.pausing.reason
            facts = {} if reason is None else {"reason": reason}
            self._state.enter(of_all((), paused=reason is not None), **facts)

    async def _keep(self, model: _Model) -> None:
        """Serve a model until it is to end, again and again if it fails."""
        failures = 0
        try:
            with model.scope:
                while not model.stop.is_set() and (error := await self._serve(model)) is not None:
                    # whoever served has shown that it can
                    has_served = model.state.phase in _HAVE_SERVED
                    failures = 1 if has_served else failures + 1
                    await self._pause(model, error, failures)
        finally:
            model.state.served = None
            if not self._stopping:
                del self._models[model.config.key]
                self._state.remove_model(model.state)
            release(model.config.device)
            model.gone.set()

    async def _serve(self, model: _Model) -> Exception | None:
        """What went wrong, None if it was told to end. Raises it if the node has nothing else to do."""
        errors: list[Exception] = []
        try:
            model.service = ModelService(
                model.config,
                model.networks,
                model.state,
                reachability=self._reachability,
                drain_seconds=self._drain_seconds,
                load=self._load,
                memory=self._left,
                rng=self._rng,
                pausing=self._state.pausing,
                others=lambda: [other.state for other in self._models.values() if other is not model],
            )
            await model.service.run(model.stop, join=self._joined.wait)
        except* Exception as group:
            errors.extend(_leaves(group))
            model.died |= any(isinstance(error, EngineDied) for error in errors)
            if model is self._alone and len(self._models) == 1 and not model.died:
                raise
        finally:
            model.service = None
        for error in errors:
            if not isinstance(error, LOAD_ERRORS):
                log.error("a model failed", model=model.config.key, exc_info=error)
        return _bare(errors[0]) if errors else None

    async def _pause(self, model: _Model, error: Exception, failures: int) -> None:
        doubled = defaults.MODEL_RETRY_SECONDS * 2.0 ** min(failures - 1, 32)
        usual = min(doubled, defaults.MODEL_RETRY_MAX_SECONDS)
        seconds = usual * self._rng.uniform(0.75, 1.25)
        release(model.config.device)
        model.state.loading = None
        told = str(error) or repr(error)
        model.state.degrade(BLOCKS, f"{told}; tried again every {_span(usual)}")
        await self._joined.wait()
        model.state.enter(Phase.LOADING, retry_in_seconds=round(seconds, 1))
        with trio.move_on_after(seconds):
            await model.stop.wait()

    def _left(self, device: str) -> int | None:
        """Memory that no model has or will take."""
        left = self._memory(device)
        if left is None:
            return None
        services = [m.service for m in self._models.values() if _same(m.config.device, device)]
        return left - sum(service.claimed_bytes for service in services if service is not None)


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _bare(error: Exception) -> Exception:
    """Without what keeps the engine that it came from in memory: the frames of its traceback and of its causes."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _same(one: str, other: str) -> bool:
    return one == other or _numbered(one) == _numbered(other)


def _numbered(device: str) -> tuple[str, int]:
    parsed = torch.device(device)
    return parsed.type, parsed.index or 0


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
