"""The Petals side of a node: its DHT, its reachability checks, and how blocks are served there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.config import ModelConfig, NodeConfig
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import ClientModel, Engine, ModelInfo, ModelOutline
from kwaainet_bridge.hivemind.client import SurveyedModel, survey
from kwaainet_bridge.hivemind.client.directory import Directory, Span
from kwaainet_bridge.hivemind.client.part import OtherNetwork
from kwaainet_bridge.hivemind.client.swarm import Swarm
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts.reachability import ReachabilityService
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.hivemind.experts.server import ExpertCalls, ExpertServer
from kwaainet_bridge.hivemind.experts.span import ServedSpan
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.announcing import PetalsPublisher, Publisher
from kwaainet_bridge.node.averaging import AveragingService
from kwaainet_bridge.node.bootstrap import BootstrapWatch
from kwaainet_bridge.node.models import swarm_prefix
from kwaainet_bridge.node.networks import is_of_kwaainet_alone
from kwaainet_bridge.node.probe import dial_back
from kwaainet_bridge.node.reachability import ReachabilityWatch
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.surveying import models_to_show
from kwaainet_bridge.rpc import RpcClient, RpcServer


class PetalsSide:
    """What a node does in a Petals swarm. Made by :func:`open_petals`."""

    name = "petals"

    def __init__(
        self,
        config: NodeConfig,
        peer: Peer,
        watch: BootstrapWatch,
        state: NodeState,
        reachability: ReachabilityWatch,
        *,
        is_auto: bool,
    ) -> None:
        self.watch = watch
        self.serves_blocks = config.protocols.petals_inference
        self._config = config
        self._peer = peer
        self._state = state
        self._reachability = reachability
        self._is_auto = is_auto
        self._calls = ExpertCalls(peer.server, peer.client)
        self._counts: dict[str, ServingCounts] = {}

    async def run(self) -> None:
        """Keep in touch with the swarm, and help its averagers, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._is_auto:
                nursery.start_soon(_follow_verdict, self._peer.dht, self._reachability)
            nursery.start_soon(self.watch.run)
            service = AveragingService("petals", self._config.averaging, self._peer, self._state)
            if service.runs:
                await self.watch.first_round()
                nursery.start_soon(service.run)

    def publisher(self, config: ModelConfig, model: ModelInfo) -> PetalsPublisher:
        return PetalsPublisher(self._peer.dht, swarm_prefix(config.name, model.family, config.dht_prefix))

    async def spans(self, config: ModelConfig, model: ModelOutline) -> list[Span]:
        self.watch.check_reached()
        prefix = swarm_prefix(config.name, model.family, config.dht_prefix)
        own = self._peer.dht.peer_id
        directory = Directory(self._peer.dht, prefix, model.num_blocks, blocked=[own])
        return await directory.read(states=(ServerState.JOINING, ServerState.ONLINE))

    async def survey(self) -> list[SurveyedModel]:
        """Read who serves which blocks of the swarm's models. Raises NetworkError without a bootstrap peer."""
        self.watch.check_reached()
        return await survey(self._peer.dht, await models_to_show(self.name, self._peer.dht, self._state))

    def text_swarm(self, name: str, weights: ClientModel, others: Sequence[OtherNetwork]) -> Swarm:
        prefix = swarm_prefix(name, weights.family, self._given_prefix(name))
        directory = Directory(self._peer.dht, prefix, weights.num_blocks)
        return Swarm(self._peer.client, directory, ping=self._peer.dht.ping, others=others)

    def text_servers(self, name: str, weights: ClientModel) -> None:
        """This network's servers are those of its own swarm."""

    def _given_prefix(self, name: str) -> str | None:
        return next((m.dht_prefix for m in self._config.served_models if m.name == name), None)

    def check_blocks(self, model: ModelInfo, blocks: range) -> None:
        """Any can be served."""

    def serve(
        self, config: ModelConfig, engine: Engine, publisher: Publisher
    ) -> AbstractAsyncContextManager[ExpertServer]:
        span = ServedSpan(publisher.prefix, engine, CompressionType[config.compression])
        counts = self._counts.setdefault(span.prefix, ServingCounts())
        return self._calls.serving(span, counts=counts)


@asynccontextmanager
async def open_petals(
    config: NodeConfig, host: Libp2pHost, state: NodeState, reachability: ReachabilityWatch
) -> AsyncIterator[PetalsSide]:
    """Serve and use the swarm's DHT within the block; who is in KwaaiNet alone gets no part in it."""
    network = config.networks.petals
    assert network is not None
    server, client = RpcServer(host), RpcClient(host)
    kwaai = set() if config.networks.kwaainet is None else config.networks.kwaainet.peers
    dht = DhtNode(
        host,
        server,
        client,
        client_mode=network.dht == "client",
        admits=lambda peer: peer not in kwaai and not is_of_kwaainet_alone(host.spoken(peer)),
    )
    async with dht.running():
        if config.listen:
            ReachabilityService(host.peer_id, lambda peer: dial_back(host, peer)).mount(server)
        watch = BootstrapWatch("petals", host, network.bootstrap, state, join=dht.bootstrap)
        peer = Peer(host, server, client, dht)
        yield PetalsSide(config, peer, watch, state, reachability, is_auto=network.dht == "auto")


async def _follow_verdict(dht: DhtNode, reachability: ReachabilityWatch) -> None:
    """Keep no records for others while nobody gets through to this node without a relay, as stock servers do."""
    while True:
        dht.set_mode(client_mode=reachability.verdict in (Verdict.RELAYED, Verdict.UNREACHABLE))
        await reachability.wait_changed()
