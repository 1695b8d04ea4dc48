"""One peer of a Hivemind swarm as a library gives it: a host, with calls and the DHT on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.dht import DhtNode, RecordValidator
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.bootstrap import parse_bootstrap_addresses
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import RpcClient, RpcServer
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Peer:
    """What averagers and optimizers are built on. ``dht`` is running."""

    host: Host
    server: RpcServer
    client: RpcClient
    dht: DhtNode

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id


@asynccontextmanager
async def open_peer(
    initial_peers: Sequence[str] = (),
    *,
    identity: Identity | None = None,
    listen: Sequence[str] = defaults.LISTEN_ADDRESSES,
    client_mode: bool = False,
    validator: RecordValidator | None = None,
    records_at_initial: bool = False,
) -> AsyncIterator[Peer]:
    """Join the swarm of ``initial_peers`` (full addresses), or begin one, under a new identity unless one is given.

    In ``client_mode`` it listens nowhere, and nobody calls it. With ``records_at_initial`` it keeps no records for
    others and asks only initial peers for any, as KwaaiNet's nodes do with its bootstrap peers; then it raises
    ConfigError for an address that is none. Raises NetworkError, naming what failed for each, if no initial peer is
    reached. Cancelled: everything of it ends.
    """
    config = HostConfig(identity or Identity.generate("rsa"), listen=() if client_mode else tuple(listen))
    async with open_host(config) as host:
        server, client = RpcServer(host), RpcClient(host)
        dht = DhtNode(
            host,
            server,
            client,
            client_mode=client_mode or records_at_initial,
            validator=validator,
            admits=_members(initial_peers) if records_at_initial else lambda _peer: True,
        )
        async with dht.running():
            reached, failures = await reach(host, dht, initial_peers)
            if initial_peers and not reached:
                raise NetworkError("the swarm cannot be reached:\n  " + "\n  ".join(failures))
            yield Peer(host, server, client, dht)


def _members(addresses: Sequence[str]) -> Callable[[PeerId], bool]:
    return {peer for peer, _ in parse_bootstrap_addresses(addresses)}.__contains__


async def reach(host: Host, dht: DhtNode | None, addresses: Sequence[str]) -> tuple[list[PeerId], list[str]]:
    """Connect to all of these peers at once and join ``dht``, if given, through them.

    Returns those that were reached, and for each of the other addresses what failed.
    """
    reached: list[PeerId] = []
    failures: list[str] = []

    async def attempt(address: str) -> None:
        try:
            with trio.fail_after(defaults.BOOTSTRAP_ROUND_SECONDS):
                peer = await host.connect(address)
                if dht is not None and (error := (await dht.bootstrap([peer]))[0].error) is not None:
                    raise error
        except NetworkError as e:
            failures.append(f"{address}: {e}")
        except trio.TooSlowError:
            failures.append(f"{address}: no answer within {defaults.BOOTSTRAP_ROUND_SECONDS:g} s")
        else:
            reached.append(peer)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(attempt, address)
    return reached, failures
