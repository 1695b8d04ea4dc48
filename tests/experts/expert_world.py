"""Servers of the tiny model on an in-memory network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.hivemind.experts.server import ExpertServer, serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

VECTORS = Path(__file__).parent.parent / "vectors" / "petals-tiny-llama"
MODEL = VECTORS / "model"
PREFIX = "tiny-llama-hf"


def peer(number: int) -> PeerId:
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


@dataclass
class World:
    network: MemoryNetwork
    client: RpcClient
    servers: dict[PeerId, ExpertServer]

    @property
    def client_peer(self) -> PeerId:
        return peer(0)

    def holder(self, block: int) -> PeerId:
        return next(p for p, s in self.servers.items() if block in s.span.engine.blocks)


def client_of(world: World, number: int) -> RpcClient:
    return RpcClient(world.network.host(peer(number)))


@asynccontextmanager
async def tiny_world(
    *spans: range, compression: CompressionType = CompressionType.NONE, **settings: object
) -> AsyncIterator[World]:
    """One server per span of blocks; ``settings`` go to EngineConfig."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        network = MemoryNetwork(nursery)
        servers = {}
        for number, blocks in enumerate(spans or (range(4), range(4, 8)), start=1):
            engine = await Engine.load(EngineConfig(model=str(MODEL), blocks=blocks, threads=1, **settings))
            stack.push_async_callback(engine.aclose)
            host = network.host(peer(number))
            span = ServedSpan(PREFIX, engine, compression)
            servers[host.peer_id] = await stack.enter_async_context(
                serve_span(span, RpcServer(host), RpcClient(host))
            )
        yield World(network, RpcClient(network.host(peer(0))), servers)
        nursery.cancel_scope.cancel()
