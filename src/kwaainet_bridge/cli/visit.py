"""What commands share that look at a swarm from outside, as a DHT client under a throw-away identity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import typer

from kwaainet_bridge.cli.printing import printable, spinner
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.dht import DhtNode, RsaSignatureValidator
from kwaainet_bridge.hivemind.peer import reach
from kwaainet_bridge.net import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.logs import configure_logging
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True)
class Visit:
    """A host that only dials, and its DHT client, which has joined through ``reached``."""

    host: Libp2pHost
    rpc: RpcClient
    dht: DhtNode
    reached: tuple[PeerId, ...]


@asynccontextmanager
async def visit_swarm(config: NodeConfig, *, join: bool = True) -> AsyncIterator[Visit]:
    """Connect to all bootstrap peers of the Petals network at once and, with ``join``, join its DHT as a client.

    Those that fail are told on standard error as long as there is another one. Raises ConfigError without an
    address, NetworkError naming the hop that failed for each if all do. Cancelled: its connections are closed.
    """
    configure_logging("warning", config.log.format)
    network = config.networks.petals
    if network is None or not network.bootstrap:
        raise ConfigError(
            "no swarm to ask: give an address of one of its peers with --initial-peers, "
            "or networks.petals.bootstrap in the file"
        )
    async with open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host:
        rpc = RpcClient(host)
        # records that name an owner are signed, as hivemind's averagers do it; others pass as they are
        validator = RsaSignatureValidator()
        dht = DhtNode(host, RpcServer(host), rpc, client_mode=True, validator=validator)
        async with dht.running():
            with spinner("joining the swarm"):
                reached, failures = await reach(host, dht if join else None, network.bootstrap)
            failures = [printable(failure) for failure in failures]
            if not reached:
                raise NetworkError("the swarm cannot be reached:\n  " + "\n  ".join(failures))
            for failure in failures:
                typer.echo(f"not reached: {failure}", err=True)
            yield Visit(host, rpc, dht, tuple(dict.fromkeys(reached)))
