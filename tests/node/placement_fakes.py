# ruff: noqa: ARG002 - the fakes have the arguments of what they stand for
"""A node's blocks without a model and without networks: what the placement of blocks is tested with."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trio

from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import LoadProgress, ModelInfo, ModelOutline
from kwaainet_bridge.errors import CheckpointError, ConfigError
from kwaainet_bridge.hivemind.client import Span
from kwaainet_bridge.hivemind.dht import StoreResult
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.serving import ModelService
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.wire.peer_id import PeerId

ME, A, B, C = (PeerId(b"\x12\x20" + bytes([number]) * 32) for number in range(1, 5))
MIB = 1 << 20
MODEL = ModelInfo("toy", None, "llama", 8, 8, torch.float32, 2, 2, 4, 16)


def span(start: int, end: int, peer: PeerId, throughput: float = 1.0) -> Span:
    return Span(peer, range(start, end), ServerInfo(ServerState.ONLINE, throughput))


class FakeEngine:
    cache_bytes_total = 100 * MIB
    cache_bytes_left = 100 * MIB
    cache_bytes_untaken = 100 * MIB
    cache_bytes_per_token = 1024
    weights_bytes = 400 * MIB

    def __init__(self, blocks: range, told: Callable[[str], None]) -> None:
        self.model, self.blocks, self._told = MODEL, blocks, told

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._told(f"close {self.blocks.start}:{self.blocks.stop}")
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()


@dataclass
class FakeServer:
    """One network's serving; ``sessions`` are open until the test sets it to 0 by :meth:`all_end`."""

    counts: ServingCounts = field(default_factory=ServingCounts)
    open_sessions: int = 0
    accepting: bool = True
    paused: bool = False
    idle: trio.Event = field(default_factory=trio.Event)

    def begin_sessions(self, number: int) -> None:
        self.open_sessions, self.idle = number, trio.Event()

    def all_end(self) -> None:
        self.open_sessions = 0
        self.idle.set()

    async def end_sessions(self) -> None:
        await trio.lowlevel.checkpoint()
        self.all_end()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    async def drain(self, *, timeout: float) -> int:
        self.accepting = False
        with trio.move_on_after(timeout):
            if self.open_sessions:
                await self.idle.wait()
        return self.open_sessions


@dataclass
class FakeNetwork:
    """One that has ``others``, and keeps what is announced: ``records`` say what readers see of this node now."""

    name: str
    told: Callable[[str], None]
    others: list[Span] = field(default_factory=list)
    error: Exception | None = None
    refuses: Sequence[range] = ()
    readings: int = 0
    server: FakeServer | None = None
    rounds: list[tuple[str, str]] = field(default_factory=list)
    prefix: str = "toy"
    own: PeerId = ME
    lifetime: float = 360.0

    @property
    def network(self) -> str:
        return self.name

    async def spans(self, config: ModelConfig, model: ModelOutline) -> list[Span]:
        assert (model.family, model.num_blocks) == (MODEL.family, MODEL.num_blocks)
        self.readings += 1
        await trio.sleep(0.1)
        if self.error is not None:
            raise self.error
        return list(self.others)

    def check_blocks(self, model: ModelInfo, blocks: range) -> None:
        if blocks in self.refuses:
            raise ConfigError(f"{self.name} has no use for {blocks.start}:{blocks.stop}")

    def publisher(self, config: ModelConfig, model: ModelInfo) -> FakeNetwork:
        return self

    def items(self, offer: Any, state: ServerState, expiration: float) -> list[Any]:
        self.rounds.append((state.name, f"{offer.blocks.start}:{offer.blocks.stop}"))
        return []

    async def store(self, items: Any) -> list[StoreResult]:
        await trio.sleep(0.1)
        return []

    @asynccontextmanager
    async def serve(
        self, config: ModelConfig, engine: FakeEngine, publisher: Any
    ) -> AsyncIterator[FakeServer]:
        assert self.server is None
        self.server = FakeServer()
        try:
            yield self.server
        finally:
            self.server = None

    @property
    def changes(self) -> list[tuple[str, str]]:
        """What was announced, without renewals."""
        before: list[tuple[str, str] | None] = [None, *self.rounds]
        return [new for old, new in zip(before, self.rounds, strict=False) if new != old]


class FakeReachability:
    verdict = Verdict.PUBLIC

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_changed(self) -> None:
        await trio.sleep_forever()


class World:
    """A node with 4 of 8 blocks in two networks; ``events`` tells what was loaded and closed, in order.

    ``memory`` is what is left beside blocks that are loaded.
    """

    def __init__(
        self, *, memory: int | None = 10_000 * MIB, drain_seconds: float = 60.0, **config: Any
    ) -> None:
        self.events: list[str] = []
        self._changed = trio.Event()
        self.networks = [
            FakeNetwork("petals", self._tell),
            FakeNetwork("kwaainet", self._tell),
        ]
        self.petals, self.kwaainet = self.networks
        self.node = NodeState()
        self.state = self.node.add_model("toy", ["petals", "kwaainet"])
        self.stop = trio.Event()
        self.load_seconds = 5.0
        self._engines = 0
        self.broken: set[range] = set()
        self.config = ModelConfig(
            **{"name": "toy", "blocks": "auto", "num_blocks": 4, "throughput": 1.0} | config
        )
        self.reachability = FakeReachability()
        self.service = ModelService(
            self.config,
            self.networks,
            self.state,
            reachability=self.reachability,
            drain_seconds=drain_seconds,
            load=self._load,
            memory=lambda _device: memory if self._engines else 10_000 * MIB,
            rng=random.Random(7),
        )

    def _tell(self, event: str) -> None:
        self.events.append(event)
        self._engines += event.startswith("loaded") - event.startswith("close")
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, event: str) -> None:
        """Return once ``event`` is among the events."""
        with trio.fail_after(3600):
            while event not in self.events:
                await self._changed.wait()

    async def _load(
        self, config, *, progress, on_described, choose, admit, weights
    ) -> FakeEngine:  # as an engine is loaded
        blocks = config.blocks if choose is None else await choose(ModelOutline(MODEL.family, 8))
        name = f"{blocks.start}:{blocks.stop}"
        self._tell(f"load {name}")
        admit(MODEL, blocks, 400 * MIB, 100 * MIB)
        if on_described is not None:
            on_described(MODEL, blocks)
        progress(LoadProgress(0, len(blocks), 0, 400 * MIB))
        try:
            await trio.sleep(self.load_seconds)
        except trio.Cancelled:
            self._tell(f"cancelled {name}")
            raise
        if blocks in self.broken:
            raise CheckpointError(f"no block {blocks.start}")
        self._tell(f"loaded {name}")
        return FakeEngine(blocks, self._tell)

    @property
    def blocks(self) -> range | None:
        """Those that are served now."""
        return None if self.state.served is None else self.state.served.engine.blocks

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The service serves its first blocks; at the end it is told to stop, and must."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.service.run, self.stop)
            await self.state.wait_for(Phase.SERVING)
            yield
            self.stop.set()

    async def served(self, blocks: range, *, within: float = 3600.0) -> None:
        """Return once those are served."""
        with trio.fail_after(within):
            while self.blocks != blocks:
                await self.state.wait_changed()
