"""The blocks on a node: loaded once, served in every network whose inference protocol is on, announced in those."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import Choose, Engine, EngineConfig, LoadProgress, ModelInfo
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.throughput import Throughput, measure_throughput
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.announcing import Announcer, AnnounceReport, Offer, Publisher
from kwaainet_bridge.node.choosing import ReadableNetwork, choose_blocks
from kwaainet_bridge.node.models import model_source
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.readiness import announced_in
from kwaainet_bridge.node.state import NodeState, Phase

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BlockServer(Protocol):
    """Serves loaded blocks in one network."""

    counts: ServingCounts

    @property
    def open_sessions(self) -> int: ...

    async def drain(self, *, timeout: float = math.inf) -> int:
        """Take no new sessions and wait for the others; how many are left after ``timeout`` seconds."""
        ...


class ServingNetwork(ReadableNetwork, Protocol):
    """A network in which blocks can be served."""

    def publisher(self, config: ModelConfig, model: ModelInfo) -> Publisher:
        """What writes the records of this model there. Raises ConfigError for a name that they cannot have."""
        ...

    def serve(
        self, config: ModelConfig, engine: Engine, publisher: Publisher
    ) -> AbstractAsyncContextManager[BlockServer]:
        """Serve these blocks under the name that the records give. Raises ConfigError."""
        ...


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """Blocks that are loaded, served and announced."""

    engine: Engine
    prefixes: dict[str, str]
    """What the blocks are called, by network."""
    servers: Sequence[BlockServer]
    announcer: Announcer

    @property
    def cache_tokens(self) -> tuple[int, int]:
        """Room of the KV cache, and what is left of it, in tokens of one sequence through all of these blocks."""
        engine = self.engine
        each = engine.cache_bytes_per_token * len(engine.blocks)
        return engine.cache_bytes_total // each, engine.cache_bytes_left // each

    @property
    def by_network(self) -> dict[str, BlockServer]:
        """The servers by their networks."""
        return dict(zip(self.prefixes, self.servers, strict=True))

    @property
    def open_sessions(self) -> int:
        return sum(server.open_sessions for server in self.servers)

    async def drain(self, seconds: float) -> None:
        """Refuse new sessions, withdraw the records, and give what is under way ``seconds`` to end."""
        left: list[int] = []

        async def drain(server: BlockServer) -> None:
            left.append(await server.drain(timeout=seconds))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_withdraw, self.announcer)
            for server in self.servers:
                nursery.start_soon(drain, server)
        if sum(left):
            log.warning("sessions are cut off", sessions=sum(left), after_seconds=seconds)


async def _withdraw(announcer: Announcer) -> None:
    """Store OFFLINE, unless that was done, and wait a limited time for what the swarm answers. Shielded."""
    if announcer.wanted is ServerState.OFFLINE:
        return
    deadline = trio.current_time() + defaults.OFFLINE_STORE_SECONDS
    with trio.CancelScope(deadline=deadline, shield=True) as limit:
        await announcer.announce(ServerState.OFFLINE)
    if limit.cancelled_caught:
        log.warning("the swarm did not acknowledge that this node leaves; its records expire by themselves")


class ModelService:
    """Loads a span of blocks, serves it in these networks, and keeps their records of it true."""

    def __init__(
        self,
        config: ModelConfig,
        networks: Sequence[ServingNetwork],
        state: NodeState,
        *,
        reachability: ReachabilityWatch,
    ) -> None:
        self._config = config
        self._networks = networks
        self._state = state
        self._reachability = reachability

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ServedBlocks]:
        """Load, announce JOINING, serve, announce ONLINE; serve on until the end of the block.

        Blocks are announced once it is known whether others can dial this node, and only while they can, through a
        relay at least. However it ends, the records are withdrawn. Raises CheckpointError or ConfigError for a
        model that cannot be served as configured.
        """
        config = self._config
        self._state.enter(Phase.LOADING, model=config.name, blocks=config.blocks or "all")
        announcer: Announcer | None = None
        publishers: list[Publisher] = []
        async with trio.open_nursery() as nursery:

            def announce_joining(model: ModelInfo, blocks: range) -> None:
                nonlocal announcer, publishers
                publishers = [network.publisher(config, model) for network in self._networks]
                announcer = self._announcer(model, blocks, publishers)
                nursery.start_soon(self._keep_announced, announcer, nursery)

            try:
                engine = await Engine.load(
                    self._engine_config(),
                    progress=self._report_loading,
                    on_described=announce_joining,
                    choose=self._chooser(),
                )
                async with aclosing(engine), AsyncExitStack() as serving:
                    assert announcer is not None  # load() has described the model
                    await self._complete(announcer.offer, engine)
                    servers = [
                        await serving.enter_async_context(network.serve(config, engine, publisher))
                        for network, publisher in zip(self._networks, publishers, strict=True)
                    ]
                    await self._reachability.settle()
                    self._take_verdict(announcer)
                    await announcer.announce(ServerState.ONLINE)
                    prefixes = {publisher.network: publisher.prefix for publisher in publishers}
                    yield ServedBlocks(engine, prefixes, servers, announcer)
            finally:
                if announcer is not None:
                    await _withdraw(announcer)
                nursery.cancel_scope.cancel()

    async def _keep_announced(self, announcer: Announcer, nursery: trio.Nursery) -> None:
        """Announce JOINING, unless the blocks are ready by now; renew the records, and follow the verdict."""
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

    def _engine_config(self) -> EngineConfig:
        config = self._config
        return EngineConfig(
            model=model_source(config.name),
            blocks=config.block_range,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device=config.device,
            cache_tokens=config.cache_tokens,
            max_length=config.max_length,
            max_batch_tokens=config.max_batch_tokens,
            threads=config.threads,
        )

    def _chooser(self) -> Choose | None:
        """Who decides which blocks are served, None if the configuration does."""
        config, count = self._config, self._config.blocks_to_choose
        if count is None:
            return None
        return lambda model: choose_blocks(config, self._networks, model, count)

    def _report_loading(self, progress: LoadProgress) -> None:
        if progress.file is not None:
            log.info("weights file", file=progress.file)
        else:
            log.debug("loading", blocks=f"{progress.blocks_done}/{progress.blocks_total}")

    def _announcer(self, model: ModelInfo, blocks: range, publishers: Sequence[Publisher]) -> Announcer:
        offer = Offer(
            blocks=blocks,
            model_blocks=model.num_blocks,
            repository=model.repository,
            torch_dtype=str(model.dtype).removeprefix("torch."),
            public_name=self._config.public_name,
        )
        if self._config.throughput != "auto":
            offer.throughput = Throughput(self._config.throughput)
        return Announcer(offer, publishers, on_report=self._judge)

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

    async def _complete(self, offer: Offer, engine: Engine) -> None:
        """Fill in what only a loaded engine tells."""
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
        offer.throughput = measured
        offer.cache_tokens = lambda: engine.cache_bytes_left // engine.cache_bytes_per_token
