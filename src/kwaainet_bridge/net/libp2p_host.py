"""The one host of a node: its listeners, its connections, and the protocols it serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Refusals
from kwaainet_bridge.errors import (
    NetworkError,
    PeerUnreachable,
    RemoteError,
)
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.addresses import (
    Address,
    AddressBook,
    Vicinity,
    parse_address,
    parse_announce_address,
    parse_listen_address,
    split_peer_address,
)
from kwaainet_bridge.net.admission import Admission
from kwaainet_bridge.net.autonat import AUTONAT
from kwaainet_bridge.net.channel import RawChannel
from kwaainet_bridge.net.connection import Connection
from kwaainet_bridge.net.connections import Connections
from kwaainet_bridge.net.dial_history import DialResult
from kwaainet_bridge.net.dialer import Dialer
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.host import Host, StreamHandler
from kwaainet_bridge.net.identify import IDENTIFY, IDENTIFY_PUSH, PeerDescription
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.inbound_streams import InboundStreams, limited
from kwaainet_bridge.net.introductions import Introductions
from kwaainet_bridge.net.kademlia import KAD, Kademlia
from kwaainet_bridge.net.library import check_library, noise_transport
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.membership import Membership
from kwaainet_bridge.net.memory import open_to_self
from kwaainet_bridge.net.own_addresses import OwnAddresses
from kwaainet_bridge.net.ping import PING, answer_pings
from kwaainet_bridge.net.relay_service import RelayLimits
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.tcp import Connector, FamilyUnavailable, accept, bind
from kwaainet_bridge.net.traversal import Traversal
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

HOUSEKEEPING: Final = frozenset({AUTONAT, IDENTIFY, IDENTIFY_PUSH, KAD, PING})
"""Protocols that every libp2p node speaks unasked: a connection with no other stream is idle."""


@dataclass(frozen=True)
class HostConfig:
    """What a host needs.

    ``listen``: multiaddrs, ``/ip4/0.0.0.0/tcp/31330``; port 0 picks a free one; empty for a host that
    only dials. ``announce``: what others are told instead, for instance a router's forwarded address.
    ``relays``: full addresses of relays that are preferred when this host cannot be dialled; ``relay_limits``: what it
    carries for others as a relay.

    ``kad_protocol``: the Kademlia network to look peers up in; in ``kad_mode`` "client" it is asked and not served, so
    that this host is in nobody's table. ``networks``: how the protocols of the networks begin that this host takes part
    in, by their names (``{"petals": ("DHTProtocol.",)}``); peers that speak none of them are strangers, of which
    ``limits`` allow few. Without networks there are no strangers.
    """

    identity: Identity
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce: Sequence[str] = field(default=())
    limits: Limits = field(default=Limits())
    relays: Sequence[str] = ()
    relay_limits: RelayLimits = field(default=RelayLimits())
    kad_protocol: str = KAD
    kad_mode: Literal["server", "client"] = "server"
    networks: Mapping[str, Sequence[str]] = field(default_factory=dict)


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncIterator[Libp2pHost]:
    """Run a host until the end of the block; then its connections are closed and its handlers cancelled.

    Serves identify, ping and, unless told otherwise, Kademlia. Raises ConfigError for an address that cannot be
    listened on or announced.
    """
    check_library()
    announce = [parse_announce_address(text) for text in config.announce]
    bound: list[tuple[trio.SocketListener, Address]] = []
    try:
        unavailable: FamilyUnavailable | None = None
        for text in config.listen:
            try:
                bound.append(await bind(parse_listen_address(text)))
            except FamilyUnavailable as e:
                unavailable = e  # many machines have IPv4 only: one family is enough
                log.warning("%s", e)
        if unavailable is not None and not bound:
            raise unavailable
        async with trio.open_nursery() as nursery:
            host = Libp2pHost(config, [address for _, address in bound], announce, nursery)
            nursery.start_soon(host.connections.tend)
            nursery.start_soon(host.introductions.run)
            nursery.start_soon(host.traversal.keeper.run)
            nursery.start_soon(host.follow_interfaces)
            listening = trio.CancelScope()
            if bound:
                listeners = [listener for listener, _ in bound]
                nursery.start_soon(accept, listeners, host.connections.serve, nursery, listening)
            try:
                yield host
            finally:
                listening.cancel()
                with trio.CancelScope(shield=True):
                    await host.connections.close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _single(group) from None
    finally:
        for listener, _ in bound:
            listener.socket.close()


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Take a lone exception of the block out of the group that the nursery around it put it in."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class Libp2pHost(Host):
    """See :class:`Host`. Made by :func:`open_host` only."""

    def __init__(
        self,
        config: HostConfig,
        listening: Sequence[Address],
        announced: Sequence[Address],
        nursery: trio.Nursery,
    ) -> None:
        self.peer_id = config.identity.peer_id
        self._memory = FairPool(config.limits.buffer_bytes)
        self._membership = Membership(config.networks)
        self.refused = Refusals()
        self.connections = Connections(
            nursery,
            config.identity.peer_id,
            noise_transport(config.identity),
            accept=self._accept,
            greet=self._greet,
            gone=self._forget,
            limits=config.limits,
            memory=self._memory,
            membership=self._membership,
            housekeeping=HOUSEKEEPING | {config.kad_protocol},
            refused=self.refused,
        )
        self._nursery = nursery
        self._book = AddressBook()
        self._vicinity = Vicinity.here()
        connector = Connector(listening)
        self._dialer = Dialer(
            nursery,
            self.connections.upgrade_outbound,
            misplaced=self._book.remove,
            connect=connector.connect,
            connect_through=self._connect_through,
        )
        self.introductions = Introductions(
            self.connections,
            config.identity.public_key,
            own_addresses=lambda: self.own.told,
            protocols=lambda: self._handlers,
            negotiate=self.open_stream_on,
            described=self._described,
        )
        self.own = OwnAddresses(listening, announced, self.introductions.changed)
        self._inbound = InboundStreams(config.limits, self.refused)
        self.kademlia = Kademlia(self, config.kad_protocol)
        self._handlers: dict[str, StreamHandler] = {}
        self.serve(IDENTIFY, self.introductions.answer)
        self.serve(IDENTIFY_PUSH, self.introductions.hear)
        if config.kad_mode == "server":
            self.serve(config.kad_protocol, self.kademlia.serve)
        self.serve(PING, answer_pings)
        self.traversal = Traversal(self, nursery, connector, relays=config.relays, limits=config.relay_limits)

    # --- peers

    def addresses(self) -> list[str]:
        return [f"{address.transport}/p2p/{self.peer_id}" for address in self.own.told]

    def admit(self, admission: Admission) -> None:
        """Have connections with peers that it lets in alone; those with others end now."""
        self.connections.admit(admission)

    def set_limits(self, limits: Limits) -> None:
        """Hold to these from now on; what is in use and beyond them stays until it ends."""
        self.connections.set_limits(limits)
        self._inbound.set_limits(limits)
        self._memory.limit = limits.buffer_bytes

    def connected_peers(self) -> list[PeerId]:
        return self.connections.peers()

    async def wait_disconnected(self, peer: PeerId) -> None:
        """Return once no connection to ``peer`` is open; at once if there is none."""
        await self.connections.wait_disconnected(peer)

    def protect(self, peer: PeerId, tag: str) -> None:
        self.connections.protect(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        self.connections.unprotect(peer, tag)

    def add_addresses(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self._book.add(peer, [a for a in map(parse_address, addresses) if a is not None])

    def known_addresses(self, peer: PeerId) -> list[str]:
        if peer == self.peer_id:
            return self.addresses()
        return [f"{address.transport}/p2p/{peer}" for address in self._book.dialable(peer)]

    def where(self, peer: PeerId) -> list[Address]:
        """All addresses that ``peer`` is said to have, those in other private networks too; this host's own
        for itself."""
        return list(self.own.told) if peer == self.peer_id else self._book.get(peer)

    def dialable(self, addresses: Sequence[Address], told_by: PeerId) -> list[Address]:
        """Those of a third peer's ``addresses`` that can be dialled from here, as far as one can tell."""
        teller = self.connections.find(told_by)
        host = "" if teller is None else teller.remote_host
        return [address for address in addresses if self._vicinity.has(address, told_by=host)]

    def dial_results(self, peer: PeerId) -> list[DialResult]:
        """How the last dial of each address of ``peer`` ended."""
        return self._dialer.history.of(peer)

    def unreachable(self) -> list[tuple[PeerId, DialResult]]:
        """Peers that could not be dialled at any address, the latest first."""
        return self._dialer.history.unreachable()

    def description(self, peer: PeerId) -> PeerDescription | None:
        """What a connected peer has said of itself; None before it has."""
        return self.introductions.of(peer)

    async def wait_identified(self) -> None:
        """Return once every peer that is connected now has said who it is, or has failed to within 10 s."""
        for connection in self.connections:
            await connection.identified.wait()

    async def connect(self, address: str) -> PeerId:
        peer, parsed = split_peer_address(address)
        if self.connections.find(peer) is None:
            await self._dial(peer, [parsed], anyway=True)
        self._book.add(peer, [parsed])
        return peer

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        if peer == self.peer_id:  # a client in this process that uses what this host serves
            await trio.lowlevel.checkpoint()
            return open_to_self(peer, protocol, self._handlers, self._nursery)
        return await self.open_stream_on(await self._connection(peer), protocol)

    async def open_stream_at(self, peer: PeerId, addresses: Sequence[Address], protocol: str) -> Stream:
        """:meth:`open_stream`, dialling only at ``addresses`` and asking nobody for others."""
        connection = self.connections.find(peer) or await self._dial(peer, addresses)
        return await self.open_stream_on(connection, protocol)

    async def direct_connection(self, peer: PeerId, addresses: Sequence[Address]) -> YamuxConnection:
        """The connection to ``peer`` without a relay, dialling at those of ``addresses`` that have none.

        Raises PeerUnreachable.
        """
        direct = [address for address in addresses if address.relay is None]
        for dial in (False, True, True):
            if dial:  # again if somebody else's dial was under way and has led through a relay
                await self._dial(peer, direct)
            connection = self.connections.find(peer)
            if connection is not None and connection.relay is None:
                return connection
        raise PeerUnreachable(f"{peer} is reached through a relay only", hop="tcp")

    async def _connection(self, peer: PeerId) -> YamuxConnection:
        connection = self.connections.find(peer)
        if connection is not None:
            return connection
        known = self._book.dialable(peer)
        try:
            return await self._dial(peer, known)
        except PeerUnreachable as unreachable:
            found = [a for a in await self.kademlia.find_peer(peer) if a not in known]
            if not found:
                raise
            log.debug("%s; found %d more addresses", unreachable, len(found))
        # What others say is tried and not kept: once connected, the peer itself says where it is.
        return await self._dial(peer, found)

    async def _dial(
        self, peer: PeerId, addresses: Sequence[Address], *, anyway: bool = False
    ) -> YamuxConnection:
        if peer == self.peer_id:
            raise PeerUnreachable(f"{peer} is this host itself", hop="address")
        self.connections.admission.check(peer)
        return await self._dialer.dial(peer, addresses, anyway=anyway)

    async def _connect_through(self, address: Address, peer: PeerId) -> RawChannel:
        return await self.traversal.connect_through(address, peer)

    async def open_stream_on(self, connection: YamuxConnection, protocol: str) -> YamuxStream:
        """:meth:`open_stream` on this very connection."""
        stream = await connection.open_stream()
        stream.propose(protocol)
        if not self._serves(connection, protocol):
            try:
                await stream.agreed()
            except BaseException:
                stream.reset_now()
                raise
            connection.agreed.add(protocol)
        return stream

    def _serves(self, connection: YamuxConnection, protocol: str) -> bool:
        """Whether ``protocol`` can be spoken without waiting for consent, as stock daemons do it too.

        Never a guess: a peer that does not know the protocol reads the payload as the next proposal. Daemons
        reset the stream then; an unmodified py-libp2p host can end.
        """
        described = self.introductions.of(connection.remote)
        return protocol in connection.agreed or (described is not None and protocol in described.protocols)

    @property
    def inbound(self) -> InboundStreams:
        """The streams that peers have opened and that are served now."""
        return self._inbound

    # --- protocols

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is served already")
        self._handlers[protocol] = limited(handler, self.refused)
        self.introductions.changed()

    def unserve(self, protocol: str) -> None:
        if self._handlers.pop(protocol, None) is not None:
            self.introductions.changed()

    def _accept(self, connection: Connection, stream: YamuxStream) -> None:
        if self._inbound.begin(connection, stream):
            self._nursery.start_soon(self._serve_counted, connection, stream)
        else:
            stream.reset_now()

    async def _serve_counted(self, connection: Connection, stream: YamuxStream) -> None:
        try:
            await self._serve_stream(stream)
        finally:
            self._inbound.end(connection, stream)

    async def _serve_stream(self, stream: YamuxStream) -> None:
        # Whatever a peer sends, or a handler raises, ends here and touches no other stream.
        try:
            with trio.fail_after(defaults.NEGOTIATION_SECONDS):
                stream.protocol, handler = await multistream.answer(stream, self._handlers.get)
        except (RemoteError, NetworkError, trio.TooSlowError) as e:
            log.debug("no protocol with %s: %s", stream.remote, e)
            stream.reset_now()
            return
        if self.connections.find(stream.remote) is not None:  # the peer may have left meanwhile
            self._membership.speaks(stream.remote, [stream.protocol])
        try:
            await handler(stream)
        except (RemoteError, NetworkError) as e:
            log.debug("%s from %s: %s", stream.protocol, stream.remote, e)
            stream.reset_now()
        except Exception:
            log.exception("handler of %s failed, called by %s", stream.protocol, stream.remote)
            stream.reset_now()
        else:
            stream.close_now()
        finally:
            if stream.closed_at is None:  # cancelled
                stream.reset_now()

    # --- who is who

    def spoken(self, peer: PeerId) -> frozenset[str]:
        """With which of the networks' beginnings protocols of a connected peer begin, as far as is known."""
        return self._membership.spoken(peer)

    def network_of(self, peer: PeerId) -> str | None:
        """The network that a connected peer is in by the protocols it speaks; None as long as none is known."""
        return self._membership.of(peer)

    def networks_of(self, peer: PeerId) -> list[str]:
        """All networks that a connected peer is in by the protocols it speaks."""
        return self._membership.all_of(peer)

    async def follow_interfaces(self) -> None:
        """Look every minute which addresses this machine has, and tell connected peers of changes."""
        await self.own.follow_interfaces(self._look_around)

    def _look_around(self) -> None:
        self._vicinity = Vicinity.here()

    async def _greet(self, connection: Connection) -> None:
        await self.introductions.greet(connection)
        await self.traversal.improve(connection)

    def _forget(self, peer: PeerId) -> None:
        self.introductions.forget(peer)
        self._membership.forget(peer)
        self.own.unseen(peer)

    def _described(self, connection: Connection, description: PeerDescription) -> None:
        self._membership.speaks(connection.remote, description.protocols)
        told_by = connection.remote_host
        self._book.add(
            connection.remote,
            description.addresses,
            here=lambda address: self._vicinity.has(address, told_by=told_by),
        )
        if description.observed is not None and connection.relay is None:
            self.own.seen(connection.remote, description.observed, local_port=connection.local_port)
