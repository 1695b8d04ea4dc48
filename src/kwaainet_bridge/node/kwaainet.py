"""The KwaaiNet side of a node: its bootstrap peers, its view of their DHT, and how blocks are served there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net import Libp2pHost
from kwaainet_bridge.node.bootstrap import BootstrapWatch
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.rpc import RpcClient, RpcServer


class KwaaiSide:
    """What a node does in a KwaaiNet swarm. Made by :func:`open_kwaainet`."""

    name = "kwaainet"

    def __init__(self, watch: BootstrapWatch) -> None:
        self.watch = watch

    async def run(self) -> None:
        """Keep in touch with the swarm until cancelled."""
        await self.watch.run()


@asynccontextmanager
async def open_kwaainet(config: NodeConfig, host: Libp2pHost, state: NodeState) -> AsyncIterator[KwaaiSide]:
    """Use the swarm's DHT as a client within the block.

    Only bootstrap peers keep records there. As a client this node is in nobody's table, so that no record of another
    network comes to it, and none of its own gets out.
    """
    network = config.networks.kwaainet
    assert network is not None
    dht = DhtNode(host, RpcServer(host), RpcClient(host), client_mode=True)
    async with dht.running():
        yield KwaaiSide(BootstrapWatch("kwaainet", host, network.bootstrap, state, join=dht.bootstrap))
