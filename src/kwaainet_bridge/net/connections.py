"""The live connections of a host: made here from TCP streams, kept here until they end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.channel import TcpSocket, secure_inbound, secure_outbound
from kwaainet_bridge.net.dialer import Progress
from kwaainet_bridge.net.library import YAMUX, MuxedConnection
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from libp2p.network.swarm import Swarm
    from libp2p.security.noise.transport import Transport as NoiseTransport

log = logging.getLogger(__name__)


class Connections:
    """Upgrades TCP streams to yamux connections and runs them in ``nursery``.

    A connection counts against ``limit`` from the first byte of its handshake until it ends, and no
    longer: what py-libp2p would hold until the host stops is not used.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        noise: NoiseTransport,
        swarm: Swarm,
        accept: Callable[[YamuxStream], None],
        *,
        limit: int,
    ) -> None:
        self._nursery = nursery
        self._noise = noise
        self._swarm = swarm
        self._accept = accept
        self._limit = limit
        self._handshakes = 0
        self._count = 0
        self._live: dict[PeerId, list[tuple[YamuxConnection, TcpSocket]]] = {}

    @property
    def count(self) -> int:
        """Live connections and handshakes under way."""
        return self._count + self._handshakes

    def peers(self) -> list[PeerId]:
        """Peers with a connection that can open streams."""
        return [peer for peer in self._live if self.find(peer) is not None]

    def find(self, peer: PeerId) -> YamuxConnection | None:
        """Return the newest usable connection to ``peer``."""
        for connection, _ in reversed(self._live.get(peer, ())):
            if connection.usable:
                return connection
        return None

    def remote_address(self, connection: YamuxConnection) -> bytes:
        """The binary multiaddr at the other end of a connection; empty if it has ended."""
        for live, socket in self._live.get(connection.remote, ()):
            if live is connection:
                return bytes(socket.get_transport_addresses()[0].to_bytes())
        return b""

    async def upgrade_outbound(
        self, stream: trio.SocketStream, peer: PeerId, progress: Progress
    ) -> YamuxConnection:
        """Secure and multiplex a stream that this host opened to ``peer``.

        Raises RemoteError or a NetworkError with ``progress.hop`` at the hop that failed; the stream is then
        closed, as it is when cancelled.
        """
        socket = TcpSocket(stream, initiator=True)
        self._handshakes += 1
        try:
            progress.hop = "noise"
            channel = await secure_outbound(socket, self._noise, peer)
            progress.hop = "yamux"
            await multistream.propose(channel, YAMUX)
        except BaseException:
            socket.abort()
            raise
        finally:
            self._handshakes -= 1
        connection = YamuxConnection(channel, channel.remote, initiator=True, accept=self._accept)
        self._nursery.start_soon(self._run, connection, channel.socket)
        await trio.lowlevel.cancel_shielded_checkpoint()  # it is running when the caller gets it
        return connection

    async def serve(self, stream: trio.SocketStream) -> None:
        """Secure and multiplex a stream that a peer opened; returns when the connection has ended."""
        if self.count >= self._limit:
            stream.socket.close()
            log.warning("refused a connection: %d are open", self.count)
            return
        try:
            socket = TcpSocket(stream, initiator=False)
        except OSError:  # the peer is gone already
            stream.socket.close()
            return
        self._handshakes += 1
        channel = None
        try:
            with trio.move_on_after(defaults.HANDSHAKE_SECONDS):
                secured = await secure_inbound(socket, self._noise)
                await multistream.answer(secured, lambda protocol: True if protocol == YAMUX else None)
                channel = secured
        except (NetworkError, RemoteError) as e:
            log.debug("inbound handshake with %s: %s", socket.get_remote_address(), e)
        finally:
            self._handshakes -= 1
            if channel is None:
                socket.abort()
        if channel is not None:
            connection = YamuxConnection(channel, channel.remote, initiator=False, accept=self._accept)
            await self._run(connection, socket)

    async def _run(self, connection: YamuxConnection, socket: TcpSocket) -> None:
        entry = (connection, socket)
        siblings = self._live.setdefault(connection.remote, [])
        siblings.append(entry)
        self._count += 1
        log.debug("connected to %s", connection.remote)
        if len(siblings) > defaults.MAX_CONNECTIONS_PER_PEER:
            siblings[0][0].stop("too many connections to one peer")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_library, connection, socket)
                await connection.run()
                log.debug("disconnected from %s: %s", connection.remote, connection.close_reason)
        finally:
            self._count -= 1
            siblings.remove(entry)
            if not siblings and self._live.get(connection.remote) is siblings:
                del self._live[connection.remote]

    async def _tell_library(self, connection: YamuxConnection, socket: TcpSocket) -> None:
        """Give py-libp2p the connection: its identify then asks the peer what it serves, and where it
        listens."""
        from libp2p.network.exceptions import SwarmException

        try:
            await self._swarm.add_conn(
                MuxedConnection(connection, socket),
                direction="outbound" if connection.initiator else "inbound",
            )
        except SwarmException as e:
            log.debug("py-libp2p did not take the connection to %s: %s", connection.remote, e)

    async def close(self) -> None:
        """Close all connections, side by side."""
        async with trio.open_nursery() as nursery:
            for siblings in list(self._live.values()):
                for connection, _ in siblings:
                    nursery.start_soon(connection.close)
