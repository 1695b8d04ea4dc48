"""Text that goes on, unchanged, while servers of both networks are killed one after the other."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
from node_support import PREFIX
from node_support import TINY as MODEL
from simulator import TINY, SimulatedServer, simulated_bootstrap, simulated_server

from kwaainet_bridge.bridge.kwaai_servers import KwaaiServers
from kwaainet_bridge.engine import ClientModel, Engine, EngineConfig, load_client_weights
from kwaainet_bridge.hivemind.client import Directory, InferenceSession, Swarm, generate, open_session
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.server import serve_span
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.experts.throughput import Throughput
from kwaainet_bridge.hivemind.peer import Peer, open_peer
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.announcing import Announcer, Offer, PetalsPublisher
from kwaainet_bridge.rpc import RpcClient, RpcServer

pytestmark = pytest.mark.slow

BLOCKS = 8
VOCABULARY = 384
PROMPT = [1, 42, 99, 7, 300]
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class World:
    """Both networks, without servers at first."""

    def __init__(self, nursery: trio.Nursery, engine: Engine, boot: Peer, kwaai_boot: Any) -> None:
        self.boot = boot
        self.kwaai_boot = kwaai_boot
        self._nursery = nursery
        self._engine = engine
        self._kill: dict[str, Callable[[], Awaitable[None]]] = {}

    @property
    def alive(self) -> list[str]:
        return list(self._kill)

    async def kill(self, peer: str) -> None:
        """As a process is killed: its connections break, its records stay."""
        await self._kill.pop(peer)()

    async def add_petals(self, blocks: range = range(BLOCKS), *, rps: float = 100.0) -> str:
        peer_id: str = await self._nursery.start(self._live_petals, blocks, rps)
        return peer_id

    async def _live_petals(
        self, blocks: range, rps: float, task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            async with (
                open_peer(
                    self.boot.host.addresses(), listen=LOOPBACK, identity=Identity.generate("ed25519")
                ) as peer,
                serve_span(ServedSpan(PREFIX, self._engine), peer.server, peer.client),
            ):
                offer = Offer(blocks, BLOCKS, None, "float32", throughput=Throughput(rps, inference_rps=rps))
                await Announcer(offer, [PetalsPublisher(peer.dht, PREFIX)]).announce(ServerState.ONLINE)

                async def kill() -> None:
                    scope.cancel()
                    await self.boot.host.wait_disconnected(peer.peer_id)

                self._kill[str(peer.peer_id)] = kill
                task_status.started(str(peer.peer_id))
                await trio.sleep_forever()

    async def add_kwaai(self, blocks: range = range(BLOCKS), **options: Any) -> SimulatedServer:
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
    async def client(self) -> AsyncIterator[Swarm]:
        async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
            rpc, server = RpcClient(host), RpcServer(host)
            petals, kwaai = (DhtNode(host, server, rpc, client_mode=True) for _ in range(2))
            async with petals.running(), kwaai.running():
                await petals.bootstrap([await host.connect(self.boot.host.addresses()[0])])
                await kwaai.bootstrap([await host.connect(self.kwaai_boot.address)])
                others = [
                    KwaaiServers(kwaai, KwaaiClient(rpc), TINY.prefix, BLOCKS, vocab_size=VOCABULARY)
                ]
                yield Swarm(
                    rpc,
                    Directory(petals, PREFIX, BLOCKS),
                    ping=petals.ping,
                    others=others,
                    rng=random.Random(1),
                )


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    engine = await Engine.load(EngineConfig(model=str(MODEL), threads=1, dtype=torch.float32))
    try:
        async with (
            open_peer(listen=LOOPBACK) as boot,
            simulated_bootstrap() as kwaai_boot,
            trio.open_nursery() as nursery,
        ):
            yield World(nursery, engine, boot, kwaai_boot)
            nursery.cancel_scope.cancel()
    finally:
        await engine.aclose()


@pytest.fixture(scope="module")
def weights() -> ClientModel:
    return load_client_weights(str(MODEL), dtype=torch.float32)


def peers_in(session: InferenceSession) -> list[str]:
    return [str(part.hop.peer) for part in session._parts]


def networks_in(session: InferenceSession) -> list[str]:
    return [part.hop.network for part in session._parts]


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


async def test_a_server_killed_every_twenty_tokens_changes_nothing(
    weights: ClientModel, record_property: Callable[[str, Any], None]
) -> None:
    """Three servers in two networks, one of them new whenever one has died."""
    async with world() as networks, networks.client() as swarm:
        await networks.add_petals(rps=50.0)
        undisturbed = await tokens_of(swarm, weights, 200)
        await networks.add_kwaai()
        await networks.add_kwaai()
        used: list[str] = []
        pauses: list[float] = []
        last = trio.current_time()

        async def kill_in_turn(done: int, session: InferenceSession) -> None:
            nonlocal last
            pauses.append(trio.current_time() - last)
            if done % 20 == 0:
                (victim,) = peers_in(session)
                (network,) = networks_in(session)
                used.append(network)
                await networks.kill(victim)
                await (networks.add_petals(rps=50.0) if network == "petals" else networks.add_kwaai())
            last = trio.current_time()

        tokens = await tokens_of(swarm, weights, 200, at=kill_in_turn)
        assert tokens == undisturbed
        assert len(used) == 10
        assert set(used) == {"petals", "kwaainet"}
        worst = sorted(pauses[1:])
        record_property("worst_pause_seconds", worst[-1])
        print(f"pauses: median {worst[100] * 1000:.0f} ms, p99 {worst[-3]:.2f} s, worst {worst[-1]:.2f} s")
