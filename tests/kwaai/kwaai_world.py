"""KwaaiNet servers of the tiny model on an in-memory network, and the whole model to compare with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import trio

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.server import KwaaiProtocols, KwaaiServer, serve_kwaai
from kwaainet_bridge.net.memory import MemoryHost, MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

MODEL = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama" / "model"
BLOCKS, HIDDEN, VOCABULARY = 8, 64, 384


def peer(number: int) -> PeerId:
    return PeerId(bytes([0x12, 0x20, number]) + bytes(31))


@dataclass
class Node:
    """One server of blocks."""

    host: MemoryHost
    model: ServedModel
    server: KwaaiServer

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id


@dataclass
class World:
    network: MemoryNetwork
    nodes: list[Node] = field(default_factory=list)

    def host(self, number: int = 100) -> MemoryHost:
        """A client's host; the same one for the same number."""
        return self.network.hosts.get(peer(number)) or self.network.host(peer(number))

    def client(self, number: int = 100) -> KwaaiClient:
        return KwaaiClient(RpcClient(self.host(number)))


@asynccontextmanager
async def tiny_world(
    *spans: range, protocols: KwaaiProtocols | None = None, **settings: object
) -> AsyncIterator[World]:
    """One server per span of blocks; ``settings`` go to EngineConfig."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        world = World(MemoryNetwork(nursery))
        for number, blocks in enumerate(spans, start=1):
            engine = await Engine.load(EngineConfig(str(MODEL), blocks=blocks, threads=1, **settings))
            stack.push_async_callback(engine.aclose)
            host = world.network.host(peer(number))
            model = ServedModel(engine, names=("tiny-llama-hf",))
            server = await stack.enter_async_context(
                serve_kwaai(host, RpcServer(host), protocols or KwaaiProtocols())
            )
            await stack.enter_async_context(server.serving(model))
            world.nodes.append(Node(host, model, server))
        yield world
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def bare_server(
    protocols: KwaaiProtocols, *, clock: object = trio.current_time, **options: object
) -> AsyncIterator[tuple[World, KwaaiServer, PeerId]]:
    """A server without a model."""
    async with trio.open_nursery() as nursery:
        world = World(MemoryNetwork(nursery))
        host = world.network.host(peer(1))
        async with serve_kwaai(host, RpcServer(host), protocols, clock=clock, **options) as server:
            yield world, server, host.peer_id
        nursery.cancel_scope.cancel()


def round_half(values: torch.Tensor) -> torch.Tensor:
    """What values are after they travelled."""
    return values.clamp(-65504, 65504).half().to(values.dtype)


class WholeModel:
    """The model in transformers, with hidden states rounded as if they travelled behind some blocks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(1)  # quicker for matrices this small, and where others compute too
        self.model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()

    @torch.no_grad()
    def logits(self, ids: list[int], rounded_behind: tuple[int, ...] = ()) -> torch.Tensor:
        """float32 [vocabulary] of the last token, as they travel."""

        def travel(_layer, _args, output):
            if isinstance(output, tuple):
                return round_half(output[0]), *output[1:]
            return round_half(output)

        hooks = [self.model.model.layers[block].register_forward_hook(travel) for block in rounded_behind]
        try:
            found = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            return round_half(found)
        finally:
            for hook in hooks:
                hook.remove()

    def generate(self, ids: list[int], count: int, rounded_behind: tuple[int, ...] = ()) -> list[int]:
        new: list[int] = []
        for _ in range(count):
            new.append(int(self.logits(ids + new, rounded_behind).argmax()))
        return new


async def through(world: World, session: int, position: int, ids: list[int], number: int = 100):
    """Logits [vocabulary] of the last of ``ids``, through all nodes in their order."""
    client = world.client(number)
    first, *others = world.nodes
    values = await client.step_ids(first.peer, session, position, ids)
    for node in others:
        values = await client.step_hidden(node.peer, session, position, values)
    assert tuple(values.shape) == (1, 1, VOCABULARY)
    return values[0, 0]


async def generate(world: World, ids: list[int], count: int, session: int = 7) -> list[int]:
    new: list[int] = []
    position, given = 0, list(ids)
    for _ in range(count):
        scores = await through(world, session, position, given)
        position += len(given)
        given = [int(scores.argmax())]
        new += given
    return new
