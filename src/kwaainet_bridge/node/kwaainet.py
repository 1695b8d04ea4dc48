"""The KwaaiNet side of a node: its bootstrap peers, its view of their DHT, and how blocks are served there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from kwaainet_bridge.bridge.kwaai_directory import spans_for_choice, survey_kwaainet
from kwaainet_bridge.bridge.kwaai_servers import KwaaiServers
from kwaainet_bridge.config import ModelConfig, NodeConfig
from kwaainet_bridge.counting import ServingCounts
from kwaainet_bridge.engine import ClientModel, Engine, ModelInfo, ModelOutline, load_client_weights
from kwaainet_bridge.hivemind.client import SurveyedModel
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.client.part import OtherNetwork
from kwaainet_bridge.hivemind.client.swarm import Swarm
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.kwaai.model import ServedModel, check_ends
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.kwaai.server import KwaaiProtocols, KwaaiServer, serve_kwaai
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.node.announcing import KwaaiPublisher, Publisher
from kwaainet_bridge.node.averaging import AveragingService
from kwaainet_bridge.node.bootstrap import BootstrapWatch
from kwaainet_bridge.node.generating import nothing_to_read
from kwaainet_bridge.node.models import kwaainet_prefix, storage_of
from kwaainet_bridge.node.pausing import keep_paused
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.surveying import models_to_show
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


class KwaaiSide:
    """What a node does in a KwaaiNet swarm. Made by :func:`open_kwaainet`."""

    name = "kwaainet"

    def __init__(
        self, config: NodeConfig, peer: Peer, server: KwaaiServer, watch: BootstrapWatch, state: NodeState
    ) -> None:
        assert config.networks.kwaainet is not None
        self.watch = watch
        self._averaging = AveragingService("kwaainet", config.averaging, peer, state)
        self.serves_blocks = mounts_inference(config)
        self._counts: dict[str, ServingCounts] = {}
        self._network = config.networks.kwaainet
        self._leases = config.protocols.kwaai_lease
        self._dht = peer.dht
        self._client = peer.client
        self._server = server
        self._state = state

    async def run(self) -> None:
        """Keep in touch with the swarm, and help its averagers, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch.run)
            # whoever serves blocks does so, too; leases and the local endpoint are there without any
            nursery.start_soon(keep_paused, [self._server], self._state.pausing)
            if self._averaging.runs:
                await self.watch.first_round()
                nursery.start_soon(self._averaging.run)

    def publisher(self, config: ModelConfig, model: ModelInfo) -> KwaaiPublisher:  # noqa: ARG002 - one rule for all
        prefix = kwaainet_prefix(config.name, self._network.dht_prefix)
        return KwaaiPublisher(self._dht, prefix, self._bootstrap, leases=self._leases)

    async def spans(self, config: ModelConfig, model: ModelOutline) -> list[Span]:
        self.watch.check_reached()
        prefix = kwaainet_prefix(config.name, self._network.dht_prefix)
        spans = await spans_for_choice(self._dht, prefix, model.num_blocks)
        return [span for span in spans if span.peer != self._dht.peer_id]

    def _bootstrap(self) -> Sequence[PeerId]:
        return sorted(self._network.peers - {self._dht.peer_id})

    async def survey(self) -> list[SurveyedModel]:
        """Read who serves which blocks of the swarm's models. Raises NetworkError without a bootstrap peer."""
        self.watch.check_reached()
        return await survey_kwaainet(self._dht, await models_to_show(self.name, self._dht, self._state))

    def text_swarm(self, name: str, weights: ClientModel, others: Sequence[OtherNetwork]) -> Swarm:
        """Without the Petals network; ``others`` are further ones, none so far."""
        servers = self.text_servers(name, weights)
        directory = nothing_to_read(servers.prefix, weights.num_blocks)
        return Swarm(self._client, directory, others=[servers, *others])

    def text_servers(self, name: str, weights: ClientModel) -> KwaaiServers:
        prefix = kwaainet_prefix(name, self._network.dht_prefix)
        client = KwaaiClient(self._client)
        return KwaaiServers(self._dht, client, prefix, weights.num_blocks, vocab_size=weights.vocab_size)

    def check_blocks(self, model: ModelInfo, blocks: range) -> None:
        check_ends(model, blocks)

    def serve(
        self, config: ModelConfig, engine: Engine, publisher: Publisher
    ) -> AbstractAsyncContextManager[KwaaiServer]:
        load = partial(load_client_weights, storage=storage_of(config))
        counts = self._counts.setdefault(config.key, ServingCounts())
        model = ServedModel(engine, names=[config.name, publisher.prefix], load=load)
        return self._server.serving(model, counts=counts)


def mounts_inference(config: NodeConfig) -> bool:
    """Whether requests for blocks are answered: not by a node that was not to have any when it started."""
    return config.protocols.kwaai_inference and any("kwaainet" in m.networks for m in config.served_models)


@asynccontextmanager
async def open_kwaainet(config: NodeConfig, host: Libp2pHost, state: NodeState) -> AsyncIterator[KwaaiSide]:
    """Serve the network's protocols and use its DHT as a client within the block.

    Only bootstrap peers keep records there, and nobody else is asked. As a client this node is in nobody's table: no
    record of another network comes to it, and none of its own gets out.
    """
    network, protocols = config.networks.kwaainet, config.protocols
    assert network is not None
    server, client = RpcServer(host), RpcClient(host)
    mux = protocols.kwaai_mux
    mounted = KwaaiProtocols(
        inference=mounts_inference(config),
        lease=protocols.kwaai_lease and bool(config.served_models),
        hello=protocols.kwaai_hello,
        mux=None if mux is None else MuxEndpoint(url=mux.endpoint, paths=mux.paths, remote=mux.remote),
    )
    dht = DhtNode(host, server, client, client_mode=True, admits=network.peers.__contains__)
    async with serve_kwaai(host, server, mounted) as kwaai, dht.running():
        watch = BootstrapWatch("kwaainet", host, network.bootstrap, state, join=dht.bootstrap)
        yield KwaaiSide(config, Peer(host, server, client, dht), kwaai, watch, state)
