"""Dialling a peer back over a connection of its own, for Petals' reachability check."""

from __future__ import annotations

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.experts.methods import RPC_CHECK
from kwaainet_bridge.net import Host
from kwaainet_bridge.net.addresses import split_peer_address
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
