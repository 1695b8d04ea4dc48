"""Dialling a peer back over a connection of its own, and asking a peer for that."""

from __future__ import annotations

from dataclasses import dataclass

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.experts.methods import RPC_CHECK
from kwaainet_bridge.net import Host, Libp2pHost
from kwaainet_bridge.net.addresses import Address, split_peer_address
from kwaainet_bridge.net.autonat import AUTONAT, ask
from kwaainet_bridge.net.probe import stranger_to
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire.pb.dht_pb2 import NodeInfo, PingRequest
from kwaainet_bridge.wire.peer_id import PeerId


async def dial_back(host: Host, peer: PeerId) -> bool:
    """Dial the addresses that ``host`` knows of ``peer`` from a throw-away identity; ask it for itself.

    A connection that the peer itself opened proves nothing, hence the second host. Raises NetworkError when
    it cannot be reached.
    """
    addresses = [split_peer_address(text)[1] for text in host.known_addresses(peer)]
    async with stranger_to(peer, addresses) as probe:
        request = PingRequest(peer=NodeInfo(node_id=peer.raw))
        answer = await RpcClient(probe).call(
            peer, RPC_CHECK, request, timeout=defaults.REACHABILITY_CHECK_SECONDS
        )
    return answer.available


@dataclass(frozen=True, slots=True)
class DialledBack:
    """Whether a peer got through to this host, how it was asked, and where it got through if it says so."""

    method: str
    reachable: bool
    address: Address | None = None


async def ask_to_dial(host: Libp2pHost, peer: PeerId) -> DialledBack | None:
    """Have a connected peer dial this host over a connection of its own; None if it cannot or would not.

    By AutoNAT, else by Petals' own check: stock daemons dial no private address by AutoNAT. For the latter this host
    has to serve that check itself. Raises NetworkError or RemoteError.
    """
    described = host.description(peer)
    protocols = frozenset() if described is None else described.protocols
    if AUTONAT in protocols:
        found = await ask(host, peer, host.own.for_checks())
        if found.reachable is not None:
            return DialledBack("AutoNAT", found.reachable, found.address)
    if RPC_CHECK.name in protocols:
        request = PingRequest(peer=NodeInfo(node_id=host.peer_id.raw))
        answer = await RpcClient(host).call(peer, RPC_CHECK, request, timeout=defaults.RPC_CHECK_SECONDS)
        return DialledBack("Petals' check", answer.available)
    return None
