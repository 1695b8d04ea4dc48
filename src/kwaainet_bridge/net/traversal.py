"""Ways to a host that cannot simply be dialled, and from it: relays in all roles, and hole punching."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.channel import RawChannel
from kwaainet_bridge.net.circuit import CircuitListener, connect_through
from kwaainet_bridge.net.connection import Connection
from kwaainet_bridge.net.dialer import Progress
from kwaainet_bridge.net.hole_punching import HolePuncher
from kwaainet_bridge.net.host import StreamHandler
from kwaainet_bridge.net.origins import origin_of
from kwaainet_bridge.net.relay_service import RelayLimits, RelayService
from kwaainet_bridge.net.relays import RelayKeeper
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.tcp import Connector
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import DCUTR, HOP, STOP
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from kwaainet_bridge.net.libp2p_host import Libp2pHost


class Traversal:
    """The relays of one host, its own service as one, and its hole punching.

    ``relays`` are full addresses of those that are preferred. ``connector`` dials as the host does.
    """

    def __init__(
        self,
        host: Libp2pHost,
        nursery: trio.Nursery,
        connector: Connector,
        *,
        relays: Sequence[str],
        limits: RelayLimits,
    ) -> None:
        self.keeper = RelayKeeper(self, preferred=relays, changed=self._moved)
        self.service = RelayService(self, nursery, limits)
        self.peer_id = host.peer_id
        self._host = host
        self._connector = connector
        self._puncher = HolePuncher(self)
        self._offered = False
        listener = CircuitListener(self.keeper.holds, host.connections.serve_channel)
        host.serve(STOP, _over_yamux(listener.take))
        host.serve(DCUTR, _over_yamux(self._puncher.serve))

    def offer(self, offered: bool) -> None:
        """Be a relay for others, or no longer; circuits that are open go on."""
        if offered and not self._offered:
            self._host.serve(HOP, _over_yamux(self.service.serve))
        elif self._offered and not offered:
            self._host.unserve(HOP)
        self._offered = offered

    async def connect_through(self, address: Address, peer: PeerId) -> RawChannel:
        """Have the relay of a relayed address connect to ``peer``.

        Raises PeerUnreachable if the relay is not reached, RelayRefused, RemoteError or another NetworkError.
        """
        relay = address.relay
        if relay is None or relay == peer:
            raise PeerUnreachable(f"{address} does not lead to {peer} through another peer", hop="address")
        stream = await self.open_direct_stream(relay, [address.of_relay()], HOP)
        try:
            return await connect_through(stream, peer)
        except BaseException:
            stream.reset_now()
            raise

    async def improve(self, connection: Connection) -> None:
        """Find a direct way to a peer that a relay has brought, if there is any. Raises nothing for peers."""
        if connection.relay is not None and not connection.initiator:
            await self._puncher.upgrade(connection)

    def _moved(self) -> None:
        self._host.own.relay(self.keeper.addresses)

    # --- what the parts ask of the host

    async def connect(self, address: str) -> PeerId:
        return await self._host.connect(address)

    async def open_direct_stream(
        self, peer: PeerId, addresses: Sequence[Address], protocol: str
    ) -> YamuxStream:
        connection = await self._host.direct_connection(peer, addresses)
        return await self._host.open_stream_on(connection, protocol)

    async def open_stream_on(self, connection: Connection, protocol: str) -> YamuxStream:
        return await self._host.open_stream_on(connection, protocol)

    async def dial_at(
        self, peer: PeerId, address: Address, *, responder: bool | None = False, punch: bool = True
    ) -> None:
        target = (address.host, address.port)
        channel = await self._connector.connect(address.family, target, from_any_port=not punch)
        if responder is None:
            responder = await _is_spoken_to(channel)
        await self._host.connections.upgrade_outbound(channel, peer, Progress(), responder=responder)

    def has_direct_connection(self, peer: PeerId) -> bool:
        connection = self._host.connections.find(peer)
        return connection is not None and connection.relay is None

    def direct_peers(self, protocol: str) -> list[PeerId]:
        return [
            peer
            for peer in self._host.connected_peers()
            if self.has_direct_connection(peer)
            and (described := self._host.description(peer)) is not None
            and protocol in described.protocols
        ]

    async def wait_disconnected(self, peer: PeerId) -> None:
        await self._host.wait_disconnected(peer)

    def where(self, peer: PeerId) -> list[Address]:
        return self._host.where(peer)

    def direct_addresses(self) -> Sequence[Address]:
        return self._host.own.direct

    def punching_addresses(self) -> Sequence[Address]:
        return self._host.own.for_punching()

    @staticmethod
    def relay_of(stream: YamuxStream) -> PeerId | None:
        return stream.connection.relay if isinstance(stream.connection, Connection) else None

    @staticmethod
    def origin_of(stream: YamuxStream) -> str | None:
        host = stream.connection.remote_host if isinstance(stream.connection, Connection) else ""
        return origin_of(host) if host else None

    def protect(self, peer: PeerId, tag: str) -> None:
        self._host.protect(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        self._host.unprotect(peer, tag)


async def _is_spoken_to(channel: RawChannel) -> bool:
    """Whether the other end begins the handshake, which initiators do at once."""
    try:
        with trio.move_on_after(defaults.HOLE_PUNCH_TURN_SECONDS) as waiting:
            await channel.wait_readable()
    except BaseException:
        channel.abort()
        raise
    return not waiting.cancelled_caught


def _over_yamux(handler: Callable[[YamuxStream], Awaitable[None]]) -> StreamHandler:
    async def serve(stream: Stream) -> None:
        if not isinstance(stream, YamuxStream):
            raise NetworkError("only connections of this host are relayed")
        await handler(stream)

    return serve
