"""A node in both networks, and who uses it there and over its admin side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from admin_support import asking
from node_support import PREFIX, RunningNode, node_config, running_node

from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.kwaai.client import KwaaiClient
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import encode_tensor

BLOCKS = range(2)
KWAAI_PREFIX = "model"
"""What KwaaiNet calls the tiny model: the name of its folder."""


def step(tokens: int = 1) -> ExpertRequest:
    return ExpertRequest(
        uid=" ".join(f"{PREFIX}.{block}" for block in BLOCKS),
        tensors=[encode_tensor(torch.zeros(1, tokens, 64)), encode_tensor(torch.empty(0))],
        metadata=msgpack.pack({"max_length": 16}),
    )


@dataclass
class User:
    """A host of its own that knows the node and reads its records at the bootstrap peers of both networks."""

    host: Libp2pHost
    node: PeerId
    calls: RpcClient
    kwaai: KwaaiClient
    dht: DhtNode

    def session(self) -> Any:
        return self.calls.stream(self.node, methods.RPC_INFERENCE, open_timeout=5)

    async def forward(self) -> None:
        await self.calls.call(self.node, methods.RPC_FORWARD, step(3), timeout=10)

    async def record(self, prefix: str) -> ServerInfo | None:
        """What a network has of the node's first block."""
        found = await self.dht.get(f"{prefix}.0", latest=True)
        entry = found.value.get(str(self.node)) if found else None
        if entry is None:
            return None
        return ServerInfo.from_value(entry.value)


@asynccontextmanager
async def user_of(*addresses: str, node: PeerId) -> AsyncIterator[User]:
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        calls = RpcClient(host)
        dht = DhtNode(host, RpcServer(host), calls, client_mode=True)
        async with dht.running():
            await dht.bootstrap([await host.connect(address) for address in addresses])
            yield User(host, node, calls, KwaaiClient(calls), dht)


@dataclass
class World:
    node: RunningNode
    admin: httpx.AsyncClient
    petals: User
    kwaainet: User

    async def states(self) -> set[ServerState | None]:
        """Those that the records of both networks tell."""
        records = (await self.petals.record(PREFIX), await self.kwaainet.record(KWAAI_PREFIX))
        return {None if record is None else record.state for record in records}

    async def are(self, state: ServerState) -> bool:
        return await self.states() == {state}


@asynccontextmanager
async def node_in_both(
    folder: Path, *, read: Callable[[], NodeConfig] | None = None, **more: Any
) -> AsyncIterator[World]:
    """A node that serves its blocks in both networks, each with a bootstrap peer of its own."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running_node(node_config(folder, "first")))
        second = await stack.enter_async_context(running_node(node_config(folder, "second")))
        networks = {"petals": {"bootstrap": [first.address]}, "kwaainet": {"bootstrap": [second.address]}}
        config = node_config(folder, "node", blocks="0:2", networks=networks, **more)
        node = await stack.enter_async_context(running_node(config, read=read))
        assert config.admin_address is not None
        admin = await stack.enter_async_context(asking(config.admin_address))
        await node.serving()
        peer = node.contact.peer_id
        petals = await stack.enter_async_context(user_of(node.address, first.address, node=peer))
        kwaainet = await stack.enter_async_context(user_of(second.address, node=peer))
        await kwaainet.host.connect(node.address)
        yield World(node, admin, petals, kwaainet)
