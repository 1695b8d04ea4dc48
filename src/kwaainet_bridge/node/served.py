"""Blocks that are served: what the networks must offer for that, and what is known of them meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import Engine, ModelInfo, ServedSession
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.announcing import Announcer, Publisher
from kwaainet_bridge.node.choosing import ReadableNetwork

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BlockServer(Protocol):
    """Serves loaded blocks in one network."""

    counts: ServingCounts

    @property
    def open_sessions(self) -> int: ...

    def sessions(self) -> Sequence[ServedSession]:
        """Those that are open or about to be; times are of trio's clock."""
        ...

    def pause(self) -> None:
        """Take no new sessions and requests, until :meth:`resume`; those that run go on."""
        ...

    def resume(self) -> None:
        """Take them again."""
        ...

    async def end_sessions(self) -> None:
        """End those that are open, each once its running step has ended. Cancelled: some may be open."""
        ...

    async def drain(self, *, timeout: float = math.inf) -> int:
        """Take no new sessions and wait for the others; how many are left after ``timeout`` seconds."""
        ...


class ServingNetwork(ReadableNetwork, Protocol):
    """A network in which blocks can be served."""

    def publisher(self, config: ModelConfig, model: ModelInfo) -> Publisher:
        """What writes the records of this model there. Raises ConfigError for a name that they cannot have."""
        ...

    def check_blocks(self, model: ModelInfo, blocks: range) -> None:
        """Raise ConfigError for blocks that cannot be served there: before they are loaded for a move."""
        ...

    def serve(
        self, config: ModelConfig, engine: Engine, publisher: Publisher
    ) -> AbstractAsyncContextManager[BlockServer]:
        """Serve these blocks, alone, under the name that the records give. Raises ConfigError.

        Sessions that are open at the end of the block are cut off, so that nothing uses the engine then.
        """
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
            nursery.start_soon(withdraw, self.announcer)
            for server in self.servers:
                nursery.start_soon(drain, server)
        if sum(left):
            log.warning("sessions are cut off", sessions=sum(left), after_seconds=seconds)


async def withdraw(announcer: Announcer) -> None:
    """Store OFFLINE, unless that was done, and wait a limited time for what the swarm answers. Shielded."""
    if announcer.wanted is ServerState.OFFLINE:
        return
    deadline = trio.current_time() + defaults.OFFLINE_STORE_SECONDS
    with trio.CancelScope(deadline=deadline, shield=True) as limit:
        await announcer.announce(ServerState.OFFLINE)
    if limit.cancelled_caught:
        log.warning("the swarm did not acknowledge that blocks are left; their records expire by themselves")
