"""The live connections of a host: made here from TCP streams, kept here until they end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Refusals
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.admission import Admission
from kwaainet_bridge.net.channel import (
    RawChannel,
    SecureChannel,
    TcpSocket,
    WrongPeer,
    secure_inbound,
    secure_outbound,
)
from kwaainet_bridge.net.connection import YAMUX, Connection
from kwaainet_bridge.net.dialer import HostFull, Progress
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.membership import Membership
from kwaainet_bridge.net.origins import Origins, origin_of
from kwaainet_bridge.net.pruning import Pruning, preferred
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from libp2p.security.noise.transport import Transport as NoiseTransport

log = logging.getLogger(__name__)

_KEPT_OUT: Final = "this host is not for this peer"


class Connections:
    """Upgrades TCP streams to yamux connections and runs them.

    ``accept`` is given each inbound stream with its connection; the windows of streams are reserved from
    ``memory``. ``greet`` runs beside each new connection, and is cancelled when that ends; ``gone`` is told of
    a peer whose last connection ended. ``membership`` says whose connections are worth keeping. A connection
    counts against the limit from the first byte of its handshake until it ends. :meth:`tend` must be running.
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
        membership: Membership,
        housekeeping: AbstractSet[str] = frozenset(),
        refused: Refusals | None = None,
    ) -> None:
        self._refused = refused or Refusals()
        self._nursery = nursery
        self._own = own
        self._noise = noise
        self._accept = accept
        self._greet = greet
        self._gone = gone
        self._limits = limits
        self.admission = Admission()
        """Whom connections are had with: see :meth:`admit`."""
        self._memory = memory
        self._housekeeping = housekeeping
        self._handshakes = 0
        self._count = 0
        self._live: dict[PeerId, list[Connection]] = {}
        self._origins = Origins(
            connections=limits.connections_per_address, handshakes=defaults.MAX_HANDSHAKES_PER_ADDRESS
        )
        self._pruning = Pruning(limits, membership)
        self._retired: set[Connection] = set()
        self._shared: set[PeerId] = set()  # peers with more than one connection
        self._attention = trio.Event()

    @property
    def count(self) -> int:
        """Live connections and handshakes under way."""
        return self._count + self._handshakes

    @property
    def limit(self) -> int:
        """How many there may be at one time."""
        return self._limits.connections

    def admit(self, admission: Admission) -> None:
        """Have connections with peers that it lets in alone; those with others end now."""
        self.admission = admission
        for connection in list(self):
            if not admission.admits(connection.remote):
                connection.stop(_KEPT_OUT)

    def set_limits(self, limits: Limits) -> None:
        """Hold to these from now on: idle connections beyond them are closed soon, those in use stay."""
        self._limits = limits
        self._pruning.limits = limits
        self._origins.most_connections = limits.connections_per_address
        self._attention.set()

    def peers(self) -> list[PeerId]:
        """Peers with a connection that can open streams."""
        return [peer for peer in self._live if self.find(peer) is not None]

    def find(self, peer: PeerId) -> Connection | None:
        """Return the usable connection to ``peer`` that new streams should use: a direct one if there is any."""
        usable = [c for c in self._live.get(peer, ()) if c.usable]
        usable = [c for c in usable if c.relay is None] or usable
        return preferred(self._own, usable, simultaneous=defaults.DIAL_SECONDS)

    def __iter__(self) -> Iterator[Connection]:
        return iter([c for siblings in self._live.values() for c in siblings])

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to ``peer`` when idle ones are closed, until ``tag`` is unprotected as often."""
        self._pruning.protection.add(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Undo one :meth:`protect`. ValueError if there was none."""
        self._pruning.protection.remove(peer, tag)

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open."""
        while still_open := [c for c in self._live.get(peer, ()) if not c.closed.is_set()]:
            await still_open[0].closed.wait()

    # --- new connections

    async def upgrade_outbound(
        self, channel: RawChannel, peer: PeerId, progress: Progress, *, responder: bool = False
    ) -> Connection:
        """Secure, multiplex and run a channel that this host opened to ``peer``.

        As ``responder`` it plays the part of the side that was dialled: of two that dial each other at the same
        time, one has to. Raises RemoteError or a NetworkError with ``progress.hop`` at the hop that failed; the
        channel is then closed, as it is when cancelled.
        """
        progress.enter("noise")
        self._handshakes += 1
        try:
            secured = await self._secure(channel, peer, responder=responder)
            progress.enter("yamux")
            if responder:
                await multistream.answer(secured, lambda protocol: True if protocol == YAMUX else None)
            else:
                await multistream.propose(secured, YAMUX)
            self.admission.check(peer)
            self._demand_room()
        except BaseException:
            channel.abort()
            raise
        finally:
            self._handshakes -= 1
        connection = self._connection(secured, initiator=not responder, origin=None)
        self._add(connection)
        self._nursery.start_soon(self._run, connection)
        return connection

    async def _secure(self, channel: RawChannel, peer: PeerId, *, responder: bool) -> SecureChannel:
        try:
            secure = secure_inbound if responder else secure_outbound
            return await secure(channel, self._noise, peer)
        except WrongPeer as e:
            if e.found == self._own:
                raise WrongPeer(e.found, "this host itself answers at this address") from e
            raise

    async def serve(self, stream: trio.SocketStream) -> None:
        """Secure, multiplex and run a TCP stream that a peer opened; returns when the connection has ended."""
        try:
            socket = TcpSocket(stream, initiator=False)
        except OSError:  # the peer has gone already
            return
        await self.serve_channel(socket)

    async def serve_channel(self, channel: RawChannel) -> None:
        """The same for any channel, as one that a relay brings."""
        try:
            await self._serve(channel)
        finally:
            channel.abort()

    async def _serve(self, channel: RawChannel) -> None:
        # What has no session yet is closed without a word: saying one would take the handshake.
        if (
            self._handshakes >= defaults.MAX_HANDSHAKES
            or self.count >= self._limits.connections + defaults.OVERFLOW_HANDSHAKES
        ):
            self._refuse("connections", _whence(channel), "this host is full")
            log.debug("refused a connection: %d are open, %d of them unproven", self.count, self._handshakes)
            return
        # a relay answers for those whom it brings: nobody else knows where they are
        origin = origin_of(channel.remote_host) if channel.relay is None else str(channel.relay)
        if not self._origins.begin(origin, free=self._limits.connections - self.count):
            self._refuse("address", str(origin), "too many connections from this address")
            log.debug("refused a connection: %s has too many", origin)
            return
        self._handshakes += 1
        connection = None
        try:
            connection = await self._admit(channel, origin)
        finally:
            self._handshakes -= 1
            self._origins.end(origin)
        if connection is not None:
            self._add(connection)
            await self._run(connection)

    def _refuse(self, scope: str, who: str, reason: str) -> None:
        self._refused.note(scope, who, reason, trio.current_time())

    async def _admit(self, raw: RawChannel, origin: str | None) -> Connection | None:
        """Shake hands with who has connected; None if that fails, or if there is no room."""
        channel = None
        try:
            with trio.move_on_after(defaults.HANDSHAKE_SECONDS):
                secured = await secure_inbound(raw, self._noise)
                await multistream.answer(secured, lambda protocol: True if protocol == YAMUX else None)
                channel = secured
        except (NetworkError, RemoteError) as e:
            log.debug("inbound handshake with %s: %s", _whence(raw), e)
        except Exception:
            log.exception("inbound handshake with %s failed", _whence(raw))
        if channel is None:
            return None
        connection = self._connection(channel, initiator=False, origin=origin)
        if (
            channel.remote == self._own
        ):  # one of our own dials, to an address that another peer was said to have
            connection.stop("this host has dialled itself")
        elif not self.admission.admits(connection.remote):
            self._refuse("denied", str(connection.remote), _KEPT_OUT)
            connection.stop(_KEPT_OUT)
        elif self._make_room():
            return connection
        else:
            self._refuse("connections", str(connection.remote), "this host is full")
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
        idle = self._pruning.expendable(self, opened_before=trio.current_time())
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
        if self._count > self._pruning.few:
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
        """Close what is idle: above the high watermark, beside another connection to the same peer, and strangers'
        beyond their number.

        Runs until cancelled. Peers are asked first to open no more streams, and streams that are open are
        waited for.
        """
        while True:
            await self._attention.wait()
            self._prune()
            self._close_surplus()
            self._finish_retired()
            if not self._retired and not self._shared and self._count <= self._pruning.few:
                self._attention = trio.Event()
            await trio.sleep(defaults.TEND_SECONDS)

    def _prune(self) -> None:
        oldest = trio.current_time() - defaults.CONNECTION_GRACE_SECONDS
        chosen = self._pruning.surplus(self, opened_before=oldest)
        for connection in chosen:
            self._retire(connection)
        if chosen:
            log.debug("%d connections: closing %d idle ones", self._count, len(chosen))

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


def _whence(channel: RawChannel) -> str:
    return channel.remote_host if channel.relay is None else f"somebody behind relay {channel.relay}"
