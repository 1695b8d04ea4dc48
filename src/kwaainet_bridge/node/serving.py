"""The blocks on a node: loaded once, served in every network whose inference protocol is on, announced in those.

A node that chose its blocks itself moves to others when its networks need those more (:mod:`.moving`). One span is
served at a time: the calls of a network do not say which of two engines they mean. The next one is loaded beforehand if
memory allows.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial

import structlog
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import (
    Choose,
    Engine,
    EngineConfig,
    LoadProgress,
    ModelInfo,
    ModelOutline,
    cache_of,
    names_of,
)
from kwaainet_bridge.errors import BridgeError, ConfigError, EngineError
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.throughput import Throughput, measure_throughput
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.announcing import Announcer, AnnounceReport, Offer, Publisher
from kwaainet_bridge.node.choosing import choose_blocks
from kwaainet_bridge.node.memory import available_bytes, release
from kwaainet_bridge.node.models import model_source, shown, storage_of
from kwaainet_bridge.node.moving import Placement
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.readiness import announced_in
from kwaainet_bridge.node.served import BlockServer, ServedBlocks, ServingNetwork, withdraw
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.watching import watch_engine
from kwaainet_bridge.wire.peer_id import PeerId

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_LOAD_ERRORS = (BridgeError, OSError, MemoryError)


class ModelService:
    """Loads a span of blocks, serves it in these networks, and keeps their records of it true.

    ``drain_seconds`` is how long sessions may go on when their blocks are to go. ``load``, ``memory`` and ``rng`` are
    what loads an engine, tells the memory that is left, and draws when to look for better blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Sequence[ServingNetwork],
        state: NodeState,
        *,
        reachability: ReachabilityWatch,
        drain_seconds: float,
        load: Callable[..., Awaitable[Engine]] = Engine.load,
        memory: Callable[[str], int | None] = available_bytes,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._networks = networks
        self._state = state
        self._reachability = reachability
        self._drain_seconds = drain_seconds
        self._load_engine = load
        self._weights = cache_of(storage_of(config))
        self._joined = trio.Event()
        self._placement = Placement(config, networks, state, rng=rng or random.Random(), memory=memory)
        self._publishers: list[Publisher] = []
        self._announcer: Announcer | None = None
        self._throughput: Throughput | None = None
        self._loaded: Engine | None = None
        """An engine that is loaded and not served yet."""

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
                        on_described=partial(self._announce_joining, nursery),
                        choose=self._chooser(),
                    )
                while (move := await self._stay(stop)) is not None:
                    release(self._config.device)
                    await self._load_one_of(move)
            finally:
                await self._drop_loaded()
                if self._announcer is not None:
                    await withdraw(self._announcer)
                self._weights.close()
                nursery.cancel_scope.cancel()

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
        announcer = self._announcer
        assert engine is not None
        assert announcer is not None  # loading has described the model
        is_first = self._throughput is None
        async with aclosing(engine), AsyncExitStack() as serving:
            await self._complete(announcer, engine)
            servers: list[BlockServer] = [
                await serving.enter_async_context(network.serve(self._config, engine, publisher))
                for network, publisher in zip(self._networks, self._publishers, strict=True)
            ]
            if is_first:
                await self._reachability.settle()
            self._take_verdict(announcer)
            await announcer.announce(ServerState.ONLINE)
            prefixes = {publisher.network: publisher.prefix for publisher in self._publishers}
            served = ServedBlocks(engine, prefixes, servers, announcer)
            try:
                goal = await self._serve(served, stop)
            finally:
                self._state.served = None
                announcer.offer.cache_tokens = lambda: None  # or it would keep the engine in memory
        return None if goal is None or stop.is_set() else (goal, engine.blocks)

    async def _serve(self, served: ServedBlocks, stop: trio.Event) -> range | None:
        """Stay in the phase of serving until told to stop or until other blocks are needed more; drain."""
        engine = served.engine
        self._state.served = served
        self._state.enter(
            Phase.SERVING,
            blocks=shown(engine.blocks),
            model_blocks=engine.model.num_blocks,
            prefix=", ".join(dict.fromkeys(served.prefixes.values())),
        )
        async with trio.open_nursery() as watching:
            watching.start_soon(watch_engine, engine.check, self._state)
            goal = await self._wait_for_goal(served, stop)
            facts = {} if goal is None else {"moves_to": shown(goal)}
            self._state.enter(Phase.DRAINING, sessions=served.open_sessions, **facts)
            await served.drain(self._drain_seconds)
            watching.cancel_scope.cancel()
        return goal

    # --- moving

    async def _wait_for_goal(self, served: ServedBlocks, stop: trio.Event) -> range | None:
        """The blocks to move to, loaded if there is room for both; None once told to stop."""
        if not self._placement.may_change(served.engine.blocks, served.engine.model):
            await stop.wait()
            return None
        goal: range | None = None
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal goal
                goal = await self._find_goal(served)
                nursery.cancel_scope.cancel()

            nursery.start_soon(look)
            await stop.wait()
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
            except _LOAD_ERRORS as e:
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
                    self._loaded = await self._load(
                        goal, on_described=partial(self._announce_joining, joining)
                    )
                except _LOAD_ERRORS as e:
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
            assert self._announcer is not None
            await withdraw(self._announcer)

    async def _drop_loaded(self) -> None:
        engine, self._loaded = self._loaded, None
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
        config = self._config
        engine_config = EngineConfig(
            model=model_source(config.name),
            blocks=blocks,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device=config.device,
            cache_tokens=config.cache_tokens,
            max_length=config.max_length,
            max_batch_tokens=config.max_batch_tokens,
            threads=config.threads,
            tensor_parallel=config.tensor_parallel,
            quantization=config.quantization,
            shares={PeerId.parse(peer): share for peer, share in config.shares.items()},
            adapters=config.adapters,
            share_prefixes=config.share_prefixes,
            storage=storage_of(config),
            offload_idle_seconds=config.offload_idle_seconds,
            offload_bytes=config.offload_mib * defaults.MIB,
        )
        return await self._load_engine(
            engine_config,
            progress=self._report_loading,
            on_described=on_described,
            choose=choose,
            weights=self._weights,
        )

    def _chooser(self) -> Choose | None:
        """Who decides which blocks are served at first, None if the configuration does."""
        config, count = self._config, self._config.blocks_to_choose
        if count is None:
            return None

        async def choose(model: ModelOutline) -> range:
            await self._joined.wait()
            return await choose_blocks(config, self._networks, model, count)

        return choose

    def _report_loading(self, progress: LoadProgress) -> None:
        self._state.note_loading(progress)

    async def _complete(self, announcer: Announcer, engine: Engine) -> None:
        """Have the records tell of these blocks, with what only a loaded engine tells.

        The throughput is measured once, before anybody is served: all spans of this length are as fast.
        """
        if announcer.offer.blocks != engine.blocks:
            announcer.replace(self._offer(engine.model, engine.blocks))
        if self._throughput is None:
            self._throughput = await self._measure(engine)
        announcer.offer.throughput = self._throughput
        announcer.offer.cache_tokens = lambda: engine.cache_bytes_left // engine.cache_bytes_per_token

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

    # --- announcing

    def _announce_joining(self, nursery: trio.Nursery, model: ModelInfo, blocks: range) -> None:
        offer = self._offer(model, blocks)
        if self._announcer is not None:
            self._announcer.replace(offer)
            nursery.start_soon(self._announcer.announce, ServerState.JOINING)
            return
        self._publishers = [network.publisher(self._config, model) for network in self._networks]
        self._announcer = Announcer(offer, self._publishers, on_report=self._judge)
        nursery.start_soon(self._keep_announced, self._announcer, nursery)

    def _offer(self, model: ModelInfo, blocks: range) -> Offer:
        offer = Offer(
            blocks=blocks,
            model_blocks=model.num_blocks,
            repository=model.repository,
            torch_dtype=str(model.dtype).removeprefix("torch."),
            public_name=self._config.public_name,
            adapters=names_of(self._config.adapters),
            quantization=self._config.quantization,
        )
        if self._throughput is not None:
            offer.throughput = self._throughput
        elif self._config.throughput != "auto":
            offer.throughput = Throughput(self._config.throughput)
        return offer

    async def _keep_announced(self, announcer: Announcer, nursery: trio.Nursery) -> None:
        """Announce JOINING, unless the blocks are ready by now; renew the records, and follow the verdict."""
        await self._joined.wait()
        await self._reachability.settle()
        self._take_verdict(announcer)
        if announcer.wanted is ServerState.OFFLINE:
            await announcer.announce(ServerState.JOINING)
        nursery.start_soon(announcer.run)
        while True:
            if self._take_verdict(announcer):
                await announcer.announce(announcer.wanted)
            else:
                await self._reachability.wait_changed()

    def _take_verdict(self, announcer: Announcer) -> bool:
        """Have the records say how this node is reached; whether that is new."""
        verdict = self._reachability.verdict
        dialable, relayed = verdict is not Verdict.UNREACHABLE, verdict is Verdict.RELAYED
        if (announcer.dialable, announcer.offer.using_relay) == (dialable, relayed):
            return False
        announcer.dialable = dialable
        announcer.offer.using_relay = relayed
        return True

    def _judge(self, report: AnnounceReport) -> None:
        """A swarm of which no other node keeps the records does not know of these blocks."""
        self._state.note_announced(report)
        condition = announced_in(report.network)
        if not report.peers or report.by_others or report.state is ServerState.OFFLINE:
            self._state.recover(condition)
        else:
            self._state.degrade(
                condition, f"no other node keeps the records of blocks: {report.told_by_peers}"
            )
