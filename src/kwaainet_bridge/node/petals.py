"""The Petals network on a node: its DHT, and the blocks served there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import structlog
import torch
import trio

from kwaainet_bridge import __version__, defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import Engine, EngineConfig, LoadProgress, ModelInfo
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.announcer import Announcer
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.hivemind.experts.server import ExpertServer, serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.throughput import Throughput, measure_throughput
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.models import model_source, swarm_prefix
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.rpc import RpcClient, RpcServer

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """Blocks that are loaded, served and announced."""

    span: ServedSpan
    server: ExpertServer
    announcer: Announcer

    async def drain(self, seconds: float) -> None:
        """Refuse new sessions, withdraw the records, and give what is under way ``seconds`` to end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_withdraw, self.announcer)
            left = await self.server.drain(timeout=seconds)
        if left:
            log.warning("sessions are cut off", sessions=left, after_seconds=seconds)


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
    """Loads a span of blocks, serves it, and keeps the swarm's records of it true."""

    def __init__(
        self,
        config: ModelConfig,
        dht: DhtNode,
        server: RpcServer,
        client: RpcClient,
        state: NodeState,
        *,
        reachability: ReachabilityWatch,
    ) -> None:
        self._config = config
        self._dht = dht
        self._server = server
        self._client = client
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
        async with trio.open_nursery() as nursery:

            def announce_joining(model: ModelInfo, blocks: range) -> None:
                nonlocal announcer
                announcer = self._announcer(model, blocks)
                nursery.start_soon(self._keep_announced, announcer, nursery)

            try:
                engine = await Engine.load(
                    self._engine_config(), progress=self._report_loading, on_described=announce_joining
                )
                async with aclosing(engine):
                    assert announcer is not None  # load() has described the model
                    span = ServedSpan(announcer.prefix, engine, CompressionType[config.compression])
                    await self._complete(announcer, engine)
                    async with serve_span(span, self._server, self._client) as server:
                        await self._reachability.settle()
                        self._take_verdict(announcer)
                        await announcer.announce(ServerState.ONLINE)
                        yield ServedBlocks(span, server, announcer)
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
        if (announcer.dialable, announcer.info.using_relay) == (dialable, relayed):
            return False
        announcer.dialable = dialable
        announcer.info = replace(announcer.info, using_relay=relayed)
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

    def _report_loading(self, progress: LoadProgress) -> None:
        if progress.file is not None:
            log.info("weights file", file=progress.file)
        else:
            log.debug("loading", blocks=f"{progress.blocks_done}/{progress.blocks_total}")

    def _announcer(self, model: ModelInfo, blocks: range) -> Announcer:
        config = self._config
        info = ServerInfo(
            state=ServerState.JOINING,
            throughput=0.0,
            start_block=blocks.start,
            end_block=blocks.stop,
            public_name=config.public_name,
            version=f"kwaainet-bridge {__version__}",
            torch_dtype=str(model.dtype).removeprefix("torch."),
            quant_type="none",
            using_relay=False,
        )
        return Announcer(
            self._dht,
            swarm_prefix(config.name, model.family, config.dht_prefix),
            info,
            model_blocks=model.num_blocks,
            repository=model.repository,
        )

    async def _complete(self, announcer: Announcer, engine: Engine) -> None:
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
        announcer.set_throughput(measured)
        announcer.cache_tokens = lambda: engine.cache_bytes_left // engine.cache_bytes_per_token
