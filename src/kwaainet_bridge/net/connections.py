"""The live connections of a host: made here from TCP streams, kept here until they end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.channel import SecureChannel, TcpSocket, WrongPeer, secure_inbound, secure_outbound
from kwaainet_bridge.net.dialer import HostFull, Progress
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.origins import Origins, origin_of
from kwaainet_bridge.net.pruning import Protection, expendable, preferred
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_frames import GO_AWAY, INITIAL_WINDOW, NORMAL_TERMINATION
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from libp2p.security.noise.transport import Transport as NoiseTransport

log = logging.getLogger(__name__)

YAMUX = "/yamux/1.0.0"


class Connection(YamuxConnection):
    """A yamux connection, and what is known of its other end.

    ``remote_address`` is the binary multiaddr it came from or goes to, ``remote_host`` the IP address in it,
    ``origin`` who answers for an inbound one; ``identified`` is set once the peer has said who it is, or has
    failed to. Streams of ``housekeeping`` protocols do not count as use.
    """

    security: Final = "/noise (X25519, ChaCha20-Poly1305, SHA-256)"
    """The only one that is offered or accepted, with its only cipher."""
    muxer: Final = YAMUX

    def __init__(
        self,
        channel: SecureChannel,
        *,
        initiator: bool,
        accept: Callable[[Connection, YamuxStream], None],
        memory: FairPool,
        housekeeping: AbstractSet[str] = frozenset(),
        origin: str | None = None,
    ) -> None:
        super().__init__(
            channel, channel.remote, initiator=initiator, accept=lambda stream: accept(self, stream)
        )
        self.identified = trio.Event()
        self.remote_address = bytes(channel.socket.get_transport_addresses()[0].to_bytes())
        self.remote_host = channel.socket.get_remote_address()[0]
        self.origin = origin
        self.retired_at: float | None = None
        self._memory = memory
        self._promised: set[YamuxStream] = set()
        self._housekeeping = housekeeping
        self._used_at = self.opened_at

    @property
    def in_use(self) -> bool:
        """Whether a stream is open that is more than housekeeping, or is about to be."""
        return any(self._is_use(stream) for stream in self._streams.values())

    @property
    def used_at(self) -> float:
        """When the last stream that was more than housekeeping ended; before the first, when it was opened."""
        return self._used_at

    @property
    def leaving(self) -> bool:
        """Whether this side is closing it.

        Not if the peer has asked for no more streams: it may stay for ever.
        """
        return self.retired_at is not None or self.ending

    @property
    def usable(self) -> bool:
        return self.retired_at is None and super().usable

    def retire(self) -> None:
        """Ask the peer to open no more streams; those that are open go on."""
        if self.retired_at is None:
            self.retired_at = trio.current_time()
            self.send_frame(GO_AWAY, 0, 0, NORMAL_TERMINATION)

    def forget(self, stream: YamuxStream) -> None:
        if self._is_use(stream):
            self._used_at = trio.current_time()
        known = self._streams.get(stream.stream_id) is stream
        super().forget(stream)
        if known and stream not in self._promised:
            self._memory.release(self.remote, stream.window_growth)

    def reserve_window(self, growth: int) -> bool:
        """Take ``growth`` bytes from the connection's budget and from the host's."""
        if not self._memory.reserve(self.remote, growth):
            return False
        if super().reserve_window(growth):
            return True
        self._memory.release(self.remote, growth)
        return False

    def promise_window(self, stream: YamuxStream) -> bool:
        """Reserve memory for an inbound stream, until :meth:`withdraw_window`; False if there is none."""
        if not self._memory.reserve(self.remote, INITIAL_WINDOW):
            return False
        self._promised.add(stream)
        return True

    def withdraw_window(self, stream: YamuxStream) -> None:
        """Give the memory back: what arrives for ``stream`` from now on is not kept.

        A peer's reset does not do that, since what came before can still be read.
        """
        self._promised.discard(stream)
        over = self._streams.get(stream.stream_id) is not stream
        self._memory.release(self.remote, INITIAL_WINDOW + (stream.window_growth if over else 0))

    def _is_use(self, stream: YamuxStream) -> bool:
        if not stream.protocol:
            return stream.outbound  # what a peer only announces costs it nothing
        return stream.protocol not in self._housekeeping


class Connections:
    """Upgrades TCP streams to yamux connections and runs them.

    ``accept`` is given each inbound stream with its connection; the windows of streams are reserved from
    ``memory``. ``greet`` runs beside each new connection, and is cancelled when that ends; ``gone`` is told of
    a peer whose last connection ended. A connection counts against the limit from the first byte of its
    handshake until it ends. :meth:`tend` must be running.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        own: PeerId,
        noise: NoiseTransport,
        *,
        accept: Callable[[Connection, YamuxStream], None],
        greet: Callable[[Connection], Awaitable[None]],
        gone: Callable[[PeerId], None],
        limits: Limits,
        memory: FairPool,
        housekeeping: AbstractSet[str] = frozenset(),
    ) -> None:
        self._nursery = nursery
        self._own = own
        self._noise = noise
        self._accept = accept
        self._greet = greet
        self._gone = gone
        self._limits = limits
        self._memory = memory
        self._housekeeping = housekeeping
        self._handshakes = 0
        self._count = 0
        self._live: dict[PeerId, list[Connection]] = {}
        self._origins = Origins(
            connections=limits.connections_per_address, handshakes=defaults.MAX_HANDSHAKES_PER_ADDRESS
        )
        self._protection = Protection()
        self._retired: set[Connection] = set()
        self._shared: set[PeerId] = set()  # peers with more than one connection
        self._attention = trio.Event()

    @property
    def count(self) -> int:
        """Live connections and handshakes under way."""
        return self._count + self._handshakes

    def peers(self) -> list[PeerId]:
        """Peers with a connection that can open streams."""
        return [peer for peer in self._live if self.find(peer) is not None]

    def find(self, peer: PeerId) -> Connection | None:
        """Return the usable connection to ``peer`` that new streams should use."""
        usable = (c for c in self._live.get(peer, ()) if c.usable)
        return preferred(self._own, usable, simultaneous=defaults.DIAL_SECONDS)

    def __iter__(self) -> Iterator[Connection]:
        return iter([c for siblings in self._live.values() for c in siblings])

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer`` when idle ones are closed, until ``tag`` is unprotected as often."""
        self._protection.add(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo one :meth:`protect`. ValueError if there was none."""
        self._protection.remove(peer, tag)

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""
        while still_open := [c for c in self._live.get(peer, ()) if not c.closed.is_set()]:
            await still_open[0].closed.wait()

    # --- new connections

    async def upgrade_outbound(
        self, stream: trio.SocketStream, peer: PeerId, progress: Progress
    ) -> YamuxConnection:
        """Secure, multiplex and run a stream that this host opened to ``peer``.

        Raises RemoteError or a NetworkError with ``progress.hop`` at the hop that failed; the stream is then
        closed, as it is when cancelled.
        """
        progress.enter("noise")
        socket = TcpSocket(stream, initiator=True)
        self._handshakes += 1
        try:
            channel = await self._secure_outbound(socket, peer)
            progress.enter("yamux")
            await multistream.propose(channel, YAMUX)
            self._demand_room()
        except BaseException:
            socket.abort()
            raise
        finally:
            self._handshakes -= 1
        connection = self._connection(channel, initiator=True, origin=None)
        self._add(connection)
        self._nursery.start_soon(self._run, connection)
        return connection

    async def _secure_outbound(self, socket: TcpSocket, peer: PeerId) -> SecureChannel:
        try:
            return await secure_outbound(socket, self._noise, peer)
        except WrongPeer as e:
            if e.found == self._own:
                raise WrongPeer(e.found, "this host itself answers at this address") from e
            raise

    async def serve(self, stream: trio.SocketStream) -> None:
        """Secure, multiplex and run a stream that a peer opened; returns when the connection has ended."""
        try:
            socket = TcpSocket(stream, initiator=False)
        except OSError:  # the peer has gone already
            return
        try:
            await self._serve(socket)
        finally:
            socket.abort()

    async def _serve(self, socket: TcpSocket) -> None:
        # What has no session yet is closed without a word: saying one would take the handshake.
        if (
            self._handshakes >= defaults.MAX_HANDSHAKES
            or self.count >= self._limits.connections + defaults.OVERFLOW_HANDSHAKES
        ):
            log.debug("refused a connection: %d are open, %d of them unproven", self.count, self._handshakes)
            return
        origin = origin_of(socket.get_remote_address()[0])
        if not self._origins.begin(origin, free=self._limits.connections - self.count):
            log.debug("refused a connection: %s has too many", origin)
            return
        self._handshakes += 1
        connection = None
        try:
            connection = await self._admit(socket, origin)
        finally:
            self._handshakes -= 1
            self._origins.end(origin)
        if connection is not None:
            self._add(connection)
            await self._run(connection)

    async def _admit(self, socket: TcpSocket, origin: str | None) -> Connection | None:
        """Shake hands with who has connected; None if that fails, or if there is no room."""
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
        if channel is None:
            return None
        connection = self._connection(channel, initiator=False, origin=origin)
        if (
            channel.remote == self._own
        ):  # one of our own dials, to an address that another peer was said to have
            connection.stop("this host has dialled itself")
        elif self._make_room():
            return connection
        else:
            connection.stop("this host is full")
        log.debug("refused %s: %s; %d connections", connection.remote, connection.close_reason, self._count)
        await connection.run()  # says so to the peer, and ends
        return None

    def _connection(self, channel: SecureChannel, *, initiator: bool, origin: str | None) -> Connection:
        return Connection(
            channel,
            initiator=initiator,
            accept=self._accept,
            memory=self._memory,
            housekeeping=self._housekeeping,
            origin=origin,
        )

    def _make_room(self) -> bool:
        """Whether one more connection fits; an idle one is closed for it, however young."""
        if self._count < self._limits.connections:
            return True
        if sum(not c.leaving for c in self) < self._limits.connections:
            return True
        idle = expendable(self, self._protection, opened_before=trio.current_time())
        if not idle:
            return False
        idle[0].stop("idle, and this host is full")
        return True

    def _demand_room(self) -> None:
        if not self._make_room():
            raise HostFull(f"this host has {self._count} connections, all in use: raise limits.connections")

    def _add(self, connection: Connection) -> None:
        siblings = self._live.setdefault(connection.remote, [])
        siblings.append(connection)
        self._count += 1
        self._origins.connected(connection.origin)
        log.debug("connected to %s", connection.remote)
        if len(siblings) > defaults.MAX_CONNECTIONS_PER_PEER:
            idle = (c for c in siblings if not c.in_use)
            next(idle, siblings[0]).stop("too many connections to one peer")
        if len(siblings) > 1:
            self._shared.add(connection.remote)
            self._attention.set()
        if self._count > self._limits.high:
            self._attention.set()

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
            self._origins.disconnected(connection.origin)
            self._retired.discard(connection)
            siblings = self._live[connection.remote]
            siblings.remove(connection)
            if len(siblings) < 2:
                self._shared.discard(connection.remote)
            if not siblings:
                del self._live[connection.remote]
                self._gone(connection.remote)

    # --- connections that are not needed

    async def tend(self) -> None:
        """Close what is idle: above the high watermark, and beside another connection to the same peer.

        Runs until cancelled. Peers are asked first to open no more streams, and streams that are open are
        waited for.
        """
        while True:
            await self._attention.wait()
            self._prune()
            self._close_surplus()
            self._finish_retired()
            if not self._retired and not self._shared and self._count <= self._limits.high:
                self._attention = trio.Event()
            await trio.sleep(defaults.TEND_SECONDS)

    def _prune(self) -> None:
        if self._count <= self._limits.high:
            return
        staying = sum(not c.leaving for c in self)
        if staying <= self._limits.high:
            return
        oldest = trio.current_time() - defaults.CONNECTION_GRACE_SECONDS
        chosen = expendable(self, self._protection, opened_before=oldest)[: staying - self._limits.low]
        for connection in chosen:
            self._retire(connection)
        log.debug("%d connections: closing %d idle ones", staying, len(chosen))

    def _close_surplus(self) -> None:
        now = trio.current_time()
        for peer in self._shared:
            kept = self.find(peer)
            # One side decides, so that two who disagree do not close both; the other clears up after peers
            # that never close any.
            idle = defaults.SURPLUS_SECONDS if self._own < peer else defaults.SURPLUS_OF_OTHERS_SECONDS
            for connection in self._live[peer]:
                if (
                    connection is not kept
                    and connection.usable
                    and not connection.open_streams
                    and now - connection.used_at >= idle
                ):
                    self._retire(connection)

    def _retire(self, connection: Connection) -> None:
        connection.retire()
        self._retired.add(connection)

    def _finish_retired(self) -> None:
        latest = trio.current_time() - defaults.RETIREMENT_SECONDS
        for connection in self._retired:
            if (connection.retired_at or 0) <= latest and not connection.in_use:
                connection.stop("idle")

    async def close(self) -> None:
        """Close all connections, side by side."""
        async with trio.open_nursery() as nursery:
            for connection in self:
                nursery.start_soon(connection.close)
