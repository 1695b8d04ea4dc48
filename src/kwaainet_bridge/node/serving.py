"""The blocks of one model: loaded once, served in every network whose inference protocol is on, announced in those.

A node that chose its blocks itself moves to others when its networks need those more (:mod:`.moving`). One span of a
model is served at a time: the calls of a network do not say which of two engines they mean. The next one is loaded
beforehand if memory allows.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import Choose, Engine, LoadProgress, ModelInfo, ModelOutline, cache_of
from kwaainet_bridge.errors import BridgeError, ConfigError, EngineError
from kwaainet_bridge.hivemind.experts.throughput import Throughput, measure_throughput
from kwaainet_bridge.node.choosing import choose_blocks
from kwaainet_bridge.node.engine_settings import engine_settings
from kwaainet_bridge.node.memory import available_bytes, release
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.models import shown, storage_of
from kwaainet_bridge.node.moving import Placement
from kwaainet_bridge.node.pausing import Pausing, end_sessions_when_asked, keep_paused, stay_paused
from kwaainet_bridge.node.phase import Phase
from kwaainet_bridge.node.presence import Others, Presence
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.readiness import BLOCKS
from kwaainet_bridge.node.served import BlockServer, ServedBlocks, ServingNetwork
from kwaainet_bridge.node.watching import watch_engine

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LOAD_ERRORS = (BridgeError, OSError, MemoryError)


class ModelService:
    """Loads a span of blocks, serves it in these networks, and keeps their records of it true.

    ``drain_seconds`` is how long sessions may go on when their blocks are to go. ``load``, ``memory`` and ``rng`` are
    what loads an engine, tells the memory that is left, and draws when to look for better blocks. ``pausing`` says
    when no work is to be taken. ``others`` are the other models of the node.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Sequence[ServingNetwork],
        state: ModelState,
        *,
        reachability: ReachabilityWatch,
        drain_seconds: float,
        load: Callable[..., Awaitable[Engine]] = Engine.load,
        memory: Callable[[str], int | None] = available_bytes,
        rng: random.Random | None = None,
        pausing: Pausing | None = None,
        others: Others = list,
    ) -> None:
        self._config = config
        self._networks = networks
        self._state = state
        self._drain_seconds = drain_seconds
        self._load_engine = load
        self._weights = cache_of(storage_of(config))
        self._joined = trio.Event()
        self._memory = memory
        self._placement = Placement(config, networks, state, rng=rng or random.Random(), memory=memory)
        self._pausing = pausing or Pausing()
        self._presence = Presence(
            config,
            networks,
            state,
            reachability,
            others=others,
            joined=self._joined.wait,
            pausing=self._pausing,
        )
        self._read_bytes = self._coming_bytes = 0
        self._serving: Engine | None = None
        self._loaded: Engine | None = None
        """An engine that is loaded and not served yet."""

    @property
    def claimed_bytes(self) -> int:
        """Memory that will be taken and is not yet: by what is loaded now, and by KV caches, page by page."""
        coming = max(0, self._coming_bytes - self._read_bytes)
        if self._config.device != "cpu":  # there a cache is taken whole when it is made
            return coming
        engines = (self._loaded, self._serving)
        return coming + sum(engine.cache_bytes_untaken for engine in engines if engine is not None)

    async def run(self, stop: trio.Event, *, join: Callable[[], Awaitable[None]] | None = None) -> None:
        """Load, announce JOINING, serve, announce ONLINE; move where blocks are needed more; drain once told to stop.

        ``join`` returns once the networks can be asked and told. It runs beside loading, which waits for it only where
        the blocks have to be chosen; nothing is announced or served before.
        Blocks are announced once it is known whether others can dial this node, and only while they can, through a
        relay at least. However it ends, the records are withdrawn. Raises CheckpointError or ConfigError for a
        model that cannot be served as configured, EngineError if no blocks are left after a move that failed.
        Cancelled: sessions are not waited for.
        """
        async with trio.open_nursery() as nursery:
            try:
                async with trio.open_nursery() as joining:
                    joining.start_soon(self._join, join)
                    self._loaded = await self._load(
                        self._config.block_range,
                        on_described=partial(self._presence.join, nursery),
                        choose=self._chooser(),
                    )
                while (move := await self._stay(stop)) is not None:
                    release(self._config.device)
                    await self._load_one_of(move)
            finally:
                await self._drop_loaded()
                await self._presence.withdraw()
                self._weights.close()
                nursery.cancel_scope.cancel()

    def rename(self, public_name: str | None) -> None:
        """Have the records tell another name for monitors, at once if there are any."""
        self._presence.rename(public_name)

    async def _join(self, join: Callable[[], Awaitable[None]] | None) -> None:
        if join is not None:
            await join()
        self._state.enter(Phase.LOADING, model=self._config.name, blocks=self._config.blocks or "all")
        self._joined.set()

    async def _stay(self, stop: trio.Event) -> tuple[range, range] | None:
        """Serve what is loaded until told to stop, which gives None, or until other blocks are needed more.

        Then it returns those, and those that were served. The former are loaded now, unless there was no room for both.
        """
        engine, self._loaded = self._loaded, None
        presence, announcer = self._presence, self._presence.announcer
        assert engine is not None
        assert announcer is not None  # loading has described the model
        self._serving = engine
        is_first = presence.throughput is None
        async with aclosing(engine), AsyncExitStack() as serving:
            if is_first:  # before anybody is served; all spans of this length are as fast
                presence.throughput = await self._measure(engine)
            presence.tell_of(engine)
            servers: list[BlockServer] = [
                await serving.enter_async_context(network.serve(self._config, engine, publisher))
                for network, publisher in zip(self._networks, presence.publishers, strict=True)
            ]
            async with trio.open_nursery() as announcing:  # which may take a while
                announcing.start_soon(keep_paused, servers, self._pausing)
                await presence.announce_online(settle=is_first)
                announcing.cancel_scope.cancel()
            served = ServedBlocks(engine, self._state.prefixes, servers, announcer)
            try:
                goal = await self._serve(served, stop)
            finally:
                self._state.served = self._serving = None
                announcer.offer.cache_tokens = lambda: None  # or it would keep the engine in memory
        return None if goal is None or stop.is_set() else (goal, engine.blocks)

    async def _serve(self, served: ServedBlocks, stop: trio.Event) -> range | None:
        """Serve, or pause, until told to stop or until other blocks are needed more; drain."""
        engine = served.engine
        self._state.served, self._state.coming = served, None
        self._state.recover(BLOCKS)
        facts = {
            "blocks": shown(engine.blocks),
            "model_blocks": engine.model.num_blocks,
            "prefix": ", ".join(dict.fromkeys(served.prefixes.values())),
        }
        async with trio.open_nursery() as watching:
            watching.start_soon(watch_engine, engine.check, self._state)
            goal: range | None = None
            while goal is None and not stop.is_set():
                if self._pausing.asked:
                    await self._drop_loaded()
                    await stay_paused(served, self._state, self._pausing, stop, **facts)
                else:
                    for server in served.servers:
                        server.resume()
                    self._state.enter(Phase.SERVING, **facts)
                    goal = await self._wait_for_goal(served, stop)
            moves = {} if goal is None else {"moves_to": shown(goal)}
            self._state.enter(Phase.DRAINING, sessions=served.open_sessions, **moves)
            watching.start_soon(end_sessions_when_asked, served, self._pausing)
            await served.drain(self._drain_seconds)
            watching.cancel_scope.cancel()
        return goal

    # --- moving

    async def _wait_for_goal(self, served: ServedBlocks, stop: trio.Event) -> range | None:
        """The blocks to move to, loaded if there is room for both; None once told to stop or to pause."""
        if not self._placement.may_change(served.engine.blocks, served.engine.model):
            await self._pausing.wait_asked_or(stop)
            return None
        goal: range | None = None
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal goal
                goal = await self._find_goal(served)
                nursery.cancel_scope.cancel()

            nursery.start_soon(look)
            await self._pausing.wait_asked_or(stop)
            nursery.cancel_scope.cancel()
        return goal

    async def _find_goal(self, served: ServedBlocks) -> range:
        placement, engine = self._placement, served.engine
        while True:
            goal = await placement.wait_for_better(served)
            try:
                for network in self._networks:
                    network.check_blocks(engine.model, goal)
            except ConfigError as e:  # others' records led here, which must not end the node
                placement.failed(goal, e)
                continue
            if not placement.has_room_for_both(engine.weights_bytes + engine.cache_bytes_total):
                return goal
            try:
                self._loaded = await self._load(goal)
            except LOAD_ERRORS as e:
                placement.failed(goal, e)
                continue
            # loading may have taken long, and others may have been faster
            advice = await placement.look(served)
            if advice is not None and advice.blocks == goal:
                placement.settled()
                return goal
            log.info("the next blocks are needed no longer", blocks=shown(goal))
            await self._drop_loaded()

    async def _load_one_of(self, blocks: Sequence[range]) -> None:
        """Load the first of ``blocks`` that loads, unless it is loaded; nothing is served meanwhile.

        Raises EngineError if none does: another start may succeed, as the first one has.
        """
        if self._loaded is not None:
            return
        for goal in blocks:
            self._state.enter(Phase.LOADING, model=self._config.name, blocks=shown(goal))
            error: Exception | None = None
            async with trio.open_nursery() as joining:
                try:
                    self._loaded = await self._load(goal, on_described=partial(self._presence.join, joining))
                except LOAD_ERRORS as e:
                    error = e
                    joining.cancel_scope.cancel()
            if error is None:
                if goal is blocks[0]:
                    self._placement.settled()
                return
            if goal is blocks[-1]:
                both = " nor ".join(shown(span) for span in blocks)
                raise EngineError(f"neither the blocks {both} load any more: {error}") from error
            self._placement.failed(goal, error)
            await self._presence.withdraw()

    async def _drop_loaded(self) -> None:
        engine, self._loaded = self._loaded, None
        self._state.coming = None
        if engine is not None:
            await engine.aclose()

    # --- loading

    async def _load(
        self,
        blocks: range | None,
        *,
        on_described: Callable[[ModelInfo, range], None] | None = None,
        choose: Choose | None = None,
    ) -> Engine:
        try:
            return await self._load_engine(
                engine_settings(self._config, blocks),
                progress=self._report_loading,
                on_described=on_described,
                choose=choose,
                admit=self._admit,
                weights=self._weights,
            )
        except BaseException:
            self._state.coming = None
            raise
        finally:
            self._coming_bytes = 0

    def _chooser(self) -> Choose | None:
        """Who decides which blocks are served at first, None if the configuration does."""
        config, count = self._config, self._config.blocks_to_choose
        if count is None:
            return None

        async def choose(model: ModelOutline) -> range:
            await self._joined.wait()
            return await choose_blocks(config, self._networks, model, count)

        return choose

    def _admit(self, model: ModelInfo, blocks: range, weights_bytes: int, cache_bytes: int) -> None:
        """Raise ConfigError for what does not fit into memory; before anything of it is fetched or read."""
        self._state.coming = blocks
        config = self._config
        needed, left = weights_bytes + cache_bytes, self._memory(config.device)
        if left is not None and needed > left:
            raise ConfigError(
                f"{config.name}: the blocks {shown(blocks)} need {_mib(needed)} MiB, {_mib(weights_bytes)} for weights "
                f"as {str(model.dtype).removeprefix('torch.')} and {_mib(cache_bytes)} for a KV cache of "
                f"{config.cache_tokens} tokens, and {max(0, left) // defaults.MIB} MiB are left on {config.device}: "
                "serve fewer blocks (blocks), lower cache_tokens, or make room"
            )
        self._coming_bytes, self._read_bytes = needed, 0

    def _report_loading(self, progress: LoadProgress) -> None:
        self._read_bytes = progress.bytes_done
        self._state.note_loading(progress)

    async def _measure(self, engine: Engine) -> Throughput:
        if self._config.throughput == "auto":
            measured = await measure_throughput(engine, network_mbps=self._config.network_mbps)
        else:
            measured = Throughput(self._config.throughput)
        log.info(
            "throughput",
            overall=round(measured.overall, 1),
            inference_rps=measured.inference_rps and round(measured.inference_rps, 1),
            forward_rps=measured.forward_rps and round(measured.forward_rps, 1),
        )
        return measured


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // defaults.MIB)
