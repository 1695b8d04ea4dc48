"""What commands share that look at a swarm from outside, as a DHT client under a throw-away identity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.printing import printable, spinner
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError
from kwaainet_bridge.hivemind.dht import DhtNode, RsaSignatureValidator
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
                reached, failures = await _reach(host, dht if join else None, network.bootstrap)
            if not reached:
                raise NetworkError("the swarm cannot be reached:\n  " + "\n  ".join(failures))
            for failure in failures:
                typer.echo(f"not reached: {failure}", err=True)
            yield Visit(host, rpc, dht, tuple(dict.fromkeys(reached)))


async def _reach(
    host: Libp2pHost, dht: DhtNode | None, addresses: tuple[str, ...]
) -> tuple[list[PeerId], list[str]]:
    """The peers that were reached, and for each of the other addresses what failed."""
    reached: list[PeerId] = []
    failures: list[str] = []

    async def attempt(address: str) -> None:
        try:
            with trio.fail_after(defaults.BOOTSTRAP_ROUND_SECONDS):
                peer = await host.connect(address)
                if dht is not None and (error := (await dht.bootstrap([peer]))[0].error) is not None:
                    raise error
        except NetworkError as e:
            failures.append(printable(f"{address}: {e}"))
        except trio.TooSlowError:
            failures.append(f"{address}: no answer within {defaults.BOOTSTRAP_ROUND_SECONDS:g} s")
        else:
            reached.append(peer)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(attempt, address)
    return reached, failures
