"""Servers of both networks in one process, which can be killed one by one, and a client of both."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio
from node_support import PREFIX
from node_support import TINY as MODEL
from simulator import TINY, SimulatedServer, simulated_bootstrap, simulated_server

from kwaainet_bridge import defaults
from kwaainet_bridge.bridge.kwaai_servers import KwaaiServers
from kwaainet_bridge.engine import ClientModel, Engine, EngineConfig
from kwaainet_bridge.hivemind.client import Directory, InferenceSession, Swarm, generate, open_session
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.methods import RPC_INFERENCE
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.server import serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.hivemind.peer import Peer, open_peer
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.methods import INFERENCE
from kwaainet_bridge.kwaai.model import ServedModel
from kwaainet_bridge.kwaai.server import KwaaiProtocols, serve_kwaai
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.announcing import Announcer, KwaaiPublisher, Offer, PetalsPublisher, Publisher
from kwaainet_bridge.rpc import RpcClient, RpcServer

BLOCKS = 8
VOCABULARY = 384
PROMPT = [1, 42, 99, 7, 300]
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@dataclass(frozen=True)
class OurServer:
    """A server of ours, which can be made to refuse one network's sessions."""

    peer: Peer

    @property
    def peer_id(self) -> str:
        return str(self.peer.peer_id)

    async def refuse_petals(self) -> None:
        """Break all connections, and begin no session when the client is back."""
        self.peer.host.unserve(RPC_INFERENCE.name)
        await self.peer.host.connections.close()

    async def refuse_kwaainet(self) -> None:
        self.peer.host.unserve(INFERENCE.name)


class World:
    """Both networks, without servers at first."""

    def __init__(self, nursery: trio.Nursery, boot: Peer, kwaai_boot: Any) -> None:
        self.boot = boot
        self.kwaai_boot = kwaai_boot
        self._nursery = nursery
        self._kill: dict[str, Callable[[], Awaitable[None]]] = {}

    async def kill(self, peer: str) -> None:
        """As a process is killed: its connections break, its records stay."""
        await self._kill.pop(peer)()

    async def add_petals(self, blocks: range = range(BLOCKS), *, rps: float = 100.0) -> str:
        """A server of ours in Petals alone; its peer id."""
        return (await self.add_ours(blocks, rps=rps, kwaainet=False)).peer_id

    async def add_ours(
        self,
        blocks: range = range(BLOCKS),
        *,
        rps: float = 100.0,
        overall: float | None = None,
        kwaainet: bool = True,
    ) -> OurServer:
        """A server of ours in Petals, and as the same peer in KwaaiNet.

        Petals' clients judge its speed by ``rps``, KwaaiNet's by ``overall``, which is ``rps`` unless given.
        """
        throughput = Throughput(rps if overall is None else overall, inference_rps=rps)
        server: OurServer = await self._nursery.start(self._live, blocks, throughput, kwaainet)
        return server

    async def _live(self, blocks: range, throughput: Throughput, kwaainet: bool, task_status: Any) -> None:
        engine = await Engine.load(
            EngineConfig(model=str(MODEL), threads=1, dtype=torch.float32, blocks=blocks)
        )
        try:
            with trio.CancelScope() as scope:
                async with (
                    open_peer(
                        self.boot.host.addresses(), listen=LOOPBACK, identity=Identity.generate("ed25519")
                    ) as peer,
                    serve_span(ServedSpan(PREFIX, engine), peer.server, peer.client),
                    serve_kwaai(peer.host, peer.server, KwaaiProtocols(lease=False)) as kwaai,
                    kwaai.serving(ServedModel(engine, names=[TINY.prefix])),
                    DhtNode(peer.host, peer.server, peer.client, client_mode=True).running() as kwaai_dht,
                ):
                    publishers: list[Publisher] = [PetalsPublisher(peer.dht, PREFIX)]
                    if kwaainet:
                        boot = await peer.host.connect(self.kwaai_boot.address)
                        publishers.append(
                            KwaaiPublisher(kwaai_dht, TINY.prefix, lambda: [boot], leases=False)
                        )
                    offer = Offer(blocks, BLOCKS, None, "float32", throughput=throughput)
                    await Announcer(offer, publishers).announce(ServerState.ONLINE)

                    async def kill() -> None:
                        scope.cancel()
                        await self.boot.host.wait_disconnected(peer.peer_id)

                    server = OurServer(peer)
                    self._kill[server.peer_id] = kill
                    task_status.started(server)
                    await trio.sleep_forever()
        finally:
            await engine.aclose()

    async def add_kwaai(self, blocks: range = range(BLOCKS), **options: Any) -> SimulatedServer:
        """A simulated server of KwaaiNet; ``options`` as ``simulated_server`` takes them."""
        server: SimulatedServer = await self._nursery.start(self._live_kwaai, blocks, options)
        return server

    async def _live_kwaai(
        self, blocks: range, options: dict[str, Any], task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with simulated_server(blocks=blocks, bootstrap=[self.kwaai_boot], **options) as server:
            self._kill[server.peer_id] = server.kill
            task_status.started(server)
            await trio.sleep_forever()

    @asynccontextmanager
    async def client(self, *, step_seconds: float = defaults.CLIENT_STEP_SECONDS) -> AsyncIterator[Swarm]:
        """``step_seconds``: how long a KwaaiNet server may take for one answer."""
        async with both_networks(
            self.boot.host.addresses()[0], self.kwaai_boot.address, step_seconds=step_seconds
        ) as swarm:
            yield swarm


@asynccontextmanager
async def both_networks(
    petals_boot: str, kwaai_boot: str, *, step_seconds: float = defaults.CLIENT_STEP_SECONDS
) -> AsyncIterator[Swarm]:
    """A client of the tiny model in both networks."""
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        rpc, server = RpcClient(host), RpcServer(host)
        petals, kwaai = (DhtNode(host, server, rpc, client_mode=True) for _ in range(2))
        async with petals.running(), kwaai.running():
            await petals.bootstrap([await host.connect(petals_boot)])
            await kwaai.bootstrap([await host.connect(kwaai_boot)])
            others = KwaaiServers(
                kwaai,
                KwaaiClient(rpc),
                TINY.prefix,
                BLOCKS,
                vocab_size=VOCABULARY,
                step_seconds=step_seconds,
            )
            yield Swarm(
                rpc,
                Directory(petals, PREFIX, BLOCKS),
                ping=petals.ping,
                others=[others],
                rng=random.Random(1),
            )


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with (
        open_peer(listen=LOOPBACK) as boot,
        simulated_bootstrap() as kwaai_boot,
        trio.open_nursery() as nursery,
    ):
        yield World(nursery, boot, kwaai_boot)
        nursery.cancel_scope.cancel()


def peers_in(session: InferenceSession) -> list[str]:
    return [str(part.hop.peer) for part in session._parts]


def chain_of(session: InferenceSession) -> list[tuple[str, int, int]]:
    """(network, first block, end) of each server in use."""
    hops = [part.hop for part in session._parts]
    return [(hop.network, hop.blocks.start, hop.blocks.stop) for hop in hops]


async def tokens_of(
    swarm: Swarm,
    weights: ClientModel,
    count: int,
    *,
    at: Callable[[int, InferenceSession], Awaitable[None]] | None = None,
) -> list[int]:
    """Greedy tokens; ``at`` is told after each one."""
    tokens: list[int] = []
    async with open_session(swarm, max_length=len(PROMPT) + count, ends=True) as session:
        async for (token,) in generate(weights, session, torch.tensor([PROMPT]), max_new_tokens=count):
            tokens.append(token)
            if at is not None:
                await at(len(tokens), session)
    return tokens
