"""The live connections of a host: made here from TCP streams, kept here until they end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.channel import SecureChannel, TcpSocket, secure_inbound, secure_outbound
from kwaainet_bridge.net.dialer import Progress
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from libp2p.security.noise.transport import Transport as NoiseTransport

log = logging.getLogger(__name__)

YAMUX = "/yamux/1.0.0"


class Connection(YamuxConnection):
    """A yamux connection, and what is known of its other end.

    ``remote_address`` is the binary multiaddr it came from or goes to; ``identified`` is set once the
    peer has said who it is, or has failed to.
    """

    security: Final = "/noise (X25519, ChaCha20-Poly1305, SHA-256)"
    """The only one that is offered or accepted, with its only cipher."""
    muxer: Final = YAMUX

    def __init__(
        self, channel: SecureChannel, *, initiator: bool, accept: Callable[[YamuxStream], None]
    ) -> None:
        super().__init__(channel, channel.remote, initiator=initiator, accept=accept)
        self.identified = trio.Event()
        self.remote_address = bytes(channel.socket.get_transport_addresses()[0].to_bytes())


class Connections:
    """Upgrades TCP streams to yamux connections and runs them.

    ``accept`` is given each inbound stream. ``greet`` runs beside each new connection, and is cancelled
    when that ends; ``gone`` is told of a peer whose last connection ended. A connection counts against
    ``limit`` from the first byte of its handshake until it ends.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        noise: NoiseTransport,
        *,
        accept: Callable[[YamuxStream], None],
        greet: Callable[[Connection], Awaitable[None]],
        gone: Callable[[PeerId], None],
        limit: int,
    ) -> None:
        self._nursery = nursery
        self._noise = noise
        self._accept = accept
        self._greet = greet
        self._gone = gone
        self._limit = limit
        self._handshakes = 0
        self._count = 0
        self._live: dict[PeerId, list[Connection]] = {}

    @property
    def count(self) -> int:
        """Live connections and handshakes under way."""
        return self._count + self._handshakes

    def peers(self) -> list[PeerId]:
        """Peers with a connection that can open streams."""
        return [peer for peer in self._live if self.find(peer) is not None]

    def find(self, peer: PeerId) -> Connection | None:
        """Return the newest usable connection to ``peer``."""
        usable = (c for c in reversed(self._live.get(peer, ())) if c.usable)
        return next(usable, None)

    def __iter__(self) -> Iterator[Connection]:
        return iter([c for siblings in self._live.values() for c in siblings])

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""
        while still_open := [c for c in self._live.get(peer, ()) if not c.closed.is_set()]:
            await still_open[0].closed.wait()

    async def upgrade_outbound(
        self, stream: trio.SocketStream, peer: PeerId, progress: Progress
    ) -> YamuxConnection:
        """Secure, multiplex and run a stream that this host opened to ``peer``.

        Raises RemoteError or a NetworkError with ``progress.hop`` at the hop that failed; the stream is then
        closed, as it is when cancelled.
        """
        self._handshakes += 1
        try:
            progress.hop = "noise"
            socket = TcpSocket(stream, initiator=True)
            channel = await secure_outbound(socket, self._noise, peer)
            progress.hop = "yamux"
            await multistream.propose(channel, YAMUX)
        except BaseException:
            stream.socket.close()
            raise
        finally:
            self._handshakes -= 1
        connection = Connection(channel, initiator=True, accept=self._accept)
        self._add(connection)
        self._nursery.start_soon(self._run, connection)
        return connection

    async def serve(self, stream: trio.SocketStream) -> None:
        """Secure, multiplex and run a stream that a peer opened; returns when the connection has ended."""
        if self.count >= self._limit or self._handshakes >= defaults.MAX_HANDSHAKES:
            log.debug("refused a connection: %d are open, %d of them unproven", self.count, self._handshakes)
            return
        try:
            socket = TcpSocket(stream, initiator=False)
        except OSError:  # the peer has gone already
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
        except Exception:
            log.exception("inbound handshake with %s failed", socket.get_remote_address())
        finally:
            self._handshakes -= 1
        if channel is not None:
            connection = Connection(channel, initiator=False, accept=self._accept)
            self._add(connection)
            await self._run(connection)

    def _add(self, connection: Connection) -> None:
        siblings = self._live.setdefault(connection.remote, [])
        siblings.append(connection)
        self._count += 1
        log.debug("connected to %s", connection.remote)
        if len(siblings) > defaults.MAX_CONNECTIONS_PER_PEER:
            siblings[0].stop("too many connections to one peer")

    async def _run(self, connection: Connection) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._greet, connection)
                await connection.run()
                nursery.cancel_scope.cancel()
        except Exception:
            log.exception("connection to %s failed", connection.remote)
        finally:
            log.debug("disconnected from %s: %s", connection.remote, connection.close_reason)
            self._count -= 1
            siblings = self._live[connection.remote]
            siblings.remove(connection)
            if not siblings:
                del self._live[connection.remote]
                self._gone(connection.remote)

    async def close(self) -> None:
        """Close all connections, side by side."""
        async with trio.open_nursery() as nursery:
            for connection in self:
                nursery.start_soon(connection.close)
