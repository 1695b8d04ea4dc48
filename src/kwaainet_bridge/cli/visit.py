"""What commands share that look at a swarm from outside, as a DHT client under a throw-away identity."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio
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
    """A host that only dials, and its DHT client, which has joined through ``reached``.

    ``kwaainet`` is a client of KwaaiNet's DHT, if that was asked for and is configured. ``networks`` are those of which
    a peer was reached.
    """

    host: Libp2pHost
    rpc: RpcClient
    dht: DhtNode
    reached: tuple[PeerId, ...]
    kwaainet: DhtNode | None = None
    networks: frozenset[str] = frozenset()


@asynccontextmanager
async def visit_swarm(config: NodeConfig, *, join: bool = True, both: bool = False) -> AsyncIterator[Visit]:
    """Connect to all bootstrap peers of the Petals network at once and, with ``join``, join its DHT as a client.

    With ``both`` the same of KwaaiNet, if it is configured; then one of the networks is enough. Those that fail are
    told on standard error as long as there is another one. Raises ConfigError without an address, NetworkError naming
    the hop that failed for each if all do. Cancelled: its connections are closed.
    """
    configure_logging("warning", config.log.format)
    petals, kwaainet = config.networks.petals, config.networks.kwaainet if both else None
    bootstrap = () if petals is None else petals.bootstrap
    if not bootstrap and kwaainet is None:
        raise ConfigError(
            "no swarm to ask: give an address of one of its peers with --initial-peers, "
            "or networks.petals.bootstrap in the file"
        )
    async with (
        open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host,
        AsyncExitStack() as stack,
    ):
        rpc, server = RpcClient(host), RpcServer(host)
        # records that name an owner are signed, as hivemind's averagers do it; others pass as they are
        dht = DhtNode(host, server, rpc, client_mode=True, validator=RsaSignatureValidator())
        await stack.enter_async_context(dht.running())
        networks = [("petals", dht, bootstrap)]
        other = None
        if kwaainet is not None:
            other = DhtNode(host, server, rpc, client_mode=True)
            await stack.enter_async_context(other.running())
            networks.append(("kwaainet", other, kwaainet.bootstrap))
        with spinner("joining the swarm"):
            reached, failures = await _reach(host, networks, join=join)
        if not reached:
            raise NetworkError("the swarm cannot be reached:\n  " + "\n  ".join(failures))
        for failure in failures:
            typer.echo(f"not reached: {failure}", err=True)
        peers = dict.fromkeys(peer for found in reached.values() for peer in found)
        yield Visit(host, rpc, dht, tuple(peers), other, frozenset(reached))


async def _reach(
    host: Libp2pHost, networks: Sequence[tuple[str, DhtNode, Sequence[str]]], *, join: bool
) -> tuple[dict[str, list[PeerId]], list[str]]:
    """By network the peers that were reached, where there are any, and what failed for the others."""
    reached: dict[str, list[PeerId]] = {}
    failures: list[str] = []

    async def attempt(name: str, dht: DhtNode, bootstrap: Sequence[str]) -> None:
        peers, failed = await reach(host, dht if join else None, bootstrap)
        if peers:
            reached[name] = peers
        failures.extend(map(printable, failed))

    async with trio.open_nursery() as nursery:
        for network in networks:
            nursery.start_soon(attempt, *network)
    return reached, failures
