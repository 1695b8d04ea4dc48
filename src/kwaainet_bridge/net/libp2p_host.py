"""The one host of a node: its listeners, its connections, and the protocols it serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from kwaainet_bridge import defaults
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
    reachable_forms,
    split_peer_address,
)
from kwaainet_bridge.net.connections import Connection, Connections
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
from kwaainet_bridge.net.listener import FamilyUnavailable, accept, bind
from kwaainet_bridge.net.ping import PING, answer_pings
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

HOUSEKEEPING: Final = frozenset({IDENTIFY, IDENTIFY_PUSH, KAD, PING})
"""Protocols that every libp2p node speaks unasked: a connection with no other stream is idle."""


@dataclass(frozen=True)
class HostConfig:
    """What a host needs.

    ``listen``: multiaddrs, ``/ip4/0.0.0.0/tcp/31330``; port 0 picks a free one; empty for a host that
    only dials. ``announce``: what others are told instead, for instance a router's forwarded address.
    """

    identity: Identity
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce: Sequence[str] = field(default=())
    limits: Limits = field(default=Limits())


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncIterator[Libp2pHost]:
    """Run a host until the end of the block; then its connections are closed and its handlers cancelled.

    Serves identify, ping and Kademlia. Raises ConfigError for an address that cannot be listened on or
    announced.
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
        own = announce or reachable_forms(address for _, address in bound)
        async with trio.open_nursery() as nursery:
            host = Libp2pHost(config, own, nursery)
            nursery.start_soon(host.connections.tend)
            nursery.start_soon(host.introductions.run)
            if not announce:
                nursery.start_soon(host.follow_interfaces, [address for _, address in bound])
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

    def __init__(self, config: HostConfig, own: Sequence[Address], nursery: trio.Nursery) -> None:
        self.peer_id = config.identity.peer_id
        self._memory = FairPool(config.limits.buffer_bytes)
        self.connections = Connections(
            nursery,
            config.identity.peer_id,
            noise_transport(config.identity),
            accept=self._accept,
            greet=self._greet,
            gone=self._forget,
            limits=config.limits,
            memory=self._memory,
            housekeeping=HOUSEKEEPING,
        )
        self._own = tuple(own)
        self._nursery = nursery
        self._book = AddressBook()
        self._vicinity = Vicinity.here()
        self._dialer = Dialer(nursery, self.connections.upgrade_outbound, misplaced=self._book.remove)
        self.introductions = Introductions(
            self.connections,
            config.identity.public_key,
            own_addresses=lambda: self._own,
            protocols=lambda: self._handlers,
            negotiate=self._negotiate,
            described=self._described,
        )
        self._inbound = InboundStreams(config.limits)
        self.kademlia = Kademlia(self)
        self._handlers: dict[str, StreamHandler] = {}
        self.serve(IDENTIFY, self.introductions.answer)
        self.serve(IDENTIFY_PUSH, self.introductions.hear)
        self.serve(KAD, self.kademlia.serve)
        self.serve(PING, answer_pings)

    # --- peers

    def addresses(self) -> list[str]:
        return [f"{address.transport}/p2p/{self.peer_id}" for address in self._own]

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
        return list(self._own) if peer == self.peer_id else self._book.get(peer)

    def dialable(self, addresses: Sequence[Address], told_by: PeerId) -> list[Address]:
        """Those of a third peer's ``addresses`` that can be dialled from here, as far as one can tell."""
        teller = self.connections.find(told_by)
        host = "" if teller is None else teller.remote_host
        return [address for address in addresses if self._vicinity.has(address, told_by=host)]

    def dial_results(self, peer: PeerId) -> list[DialResult]:
        """How the last dial of each address of ``peer`` ended."""
        return self._dialer.history.of(peer)

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
            self._refuse_self(peer)
            await self._dialer.dial(peer, [parsed], anyway=True)
        self._book.add(peer, [parsed])
        return peer

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        return await self._negotiate(await self._connection(peer), protocol)

    async def open_stream_at(self, peer: PeerId, addresses: Sequence[Address], protocol: str) -> Stream:
        """:meth:`open_stream`, dialling only at ``addresses`` and asking nobody for others."""
        self._refuse_self(peer)
        connection: YamuxConnection | None = self.connections.find(peer)
        if connection is None:
            connection = await self._dialer.dial(peer, addresses)
        return await self._negotiate(connection, protocol)

    async def _connection(self, peer: PeerId) -> YamuxConnection:
        connection = self.connections.find(peer)
        if connection is not None:
            return connection
        self._refuse_self(peer)
        known = self._book.dialable(peer)
        try:
            return await self._dialer.dial(peer, known)
        except PeerUnreachable as unreachable:
            found = [a for a in await self.kademlia.find_peer(peer) if a not in known]
            if not found:
                raise
            log.debug("%s; found %d more addresses", unreachable, len(found))
        # What others say is tried and not kept: once connected, the peer itself says where it is.
        return await self._dialer.dial(peer, found)

    def _refuse_self(self, peer: PeerId) -> None:
        if peer == self.peer_id:
            raise PeerUnreachable(f"{peer} is this host itself", hop="address")

    async def _negotiate(self, connection: YamuxConnection, protocol: str) -> Stream:
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

    # --- protocols

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is served already")
        self._handlers[protocol] = limited(handler)
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

    async def follow_interfaces(self, listening: Sequence[Address]) -> None:
        """Look every minute which addresses this machine has, and tell connected peers of changes."""
        while True:
            await trio.sleep(defaults.INTERFACES_SECONDS)
            own = tuple(reachable_forms(listening))
            if own != self._own:
                log.info("this machine's addresses are now: %s", ", ".join(map(str, own)))
                self._own, self._vicinity = own, Vicinity.here()
                self.introductions.changed()

    async def _greet(self, connection: Connection) -> None:
        await self.introductions.greet(connection)

    def _forget(self, peer: PeerId) -> None:
        self.introductions.forget(peer)

    def _described(self, connection: Connection, description: PeerDescription) -> None:
        told_by = connection.remote_host
        self._book.add(
            connection.remote,
            description.addresses,
            here=lambda address: self._vicinity.has(address, told_by=told_by),
        )
