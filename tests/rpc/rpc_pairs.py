"""Pairs of hosts that the conformance suite runs over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.memory import MemoryNetwork
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId

CLIENT = PeerId(bytes([0x12, 0x20]) + bytes(32))
SERVER = PeerId(bytes([0x12, 0x20]) + bytes([1] * 32))


@dataclass
class Pair:
    client_host: Host
    server_host: Host

    def __post_init__(self) -> None:
        self.client = RpcClient(self.client_host)
        self.server = RpcServer(self.server_host)
        self.peer = self.server_host.peer_id


@asynccontextmanager
async def memory_pair() -> AsyncIterator[Pair]:
    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        yield Pair(network.host(CLIENT), network.host(SERVER))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def libp2p_pair() -> AsyncIterator[Pair]:
    from kwaainet_bridge.net import HostConfig, open_host
    from kwaainet_bridge.net.identity import Identity

    def config() -> HostConfig:
        return HostConfig(identity=Identity.generate("ed25519"), listen=("/ip4/127.0.0.1/tcp/0",))

    async with open_host(config()) as client, open_host(config()) as server:
        await client.connect(server.addresses()[0])
        yield Pair(client, server)
