"""Dialling a peer from a host that it has never met: a connection that the peer opened proves nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kwaainet_bridge.errors import PeerUnreachable
from kwaainet_bridge.net.addresses import Address, parse_binary_address
from kwaainet_bridge.net.identify import IDENTIFY
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.libp2p_host import HostConfig, Libp2pHost, open_host
from kwaainet_bridge.wire.peer_id import PeerId


@asynccontextmanager
async def stranger_to(peer: PeerId, addresses: Sequence[Address]) -> AsyncIterator[Libp2pHost]:
    """Run a host with a throw-away identity that has connected to ``peer`` at one of ``addresses``.

    Nobody is asked for others, and relayed ones are left out. Raises NetworkError or RemoteError if ``peer`` cannot be
    reached there, proves another identity, or does not speak. The caller brings the deadline.
    """
    direct = [address for address in addresses if address.relay is None]
    config = HostConfig(Identity.generate("ed25519"), listen=(), kad_mode="client")  # to be in nobody's table
    async with open_host(config) as host:
        stream = await host.open_stream_at(peer, direct, IDENTIFY)  # spoken by every libp2p host
        await stream.reset()
        yield host


async def dial_anew(peer: PeerId, addresses: Sequence[Address]) -> Address:
    """Dial ``peer`` from a host that it has never met; return the address that it was reached at.

    Raises what :func:`stranger_to` raises. The caller brings the deadline. Cancelled: nothing stays open.
    """
    async with stranger_to(peer, addresses) as host:
        connection = host.connections.find(peer)
        address = None if connection is None else parse_binary_address(connection.remote_address)
        if address is None:
            raise PeerUnreachable(f"{peer} was reached and has left", hop="protocol")
        return address
