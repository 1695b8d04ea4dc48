"""The one host of a node: our connections, py-libp2p's handshake and services, our protocols."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
from multiaddr import Multiaddr

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    ConfigError,
    NetworkError,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
)
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.addresses import (
    Address,
    AddressBook,
    parse_address,
    reachable_forms,
    split_peer_address,
)
from kwaainet_bridge.net.connections import Connections
from kwaainet_bridge.net.dialer import Dialer
from kwaainet_bridge.net.host import Host, StreamHandler
from kwaainet_bridge.net.identify import IDENTIFY, identify_message
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.library import as_net_stream, build_host, check_library, noise_transport
from kwaainet_bridge.net.listener import accept, bind, parse_listen_address
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from libp2p.host.basic_host import BasicHost

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostConfig:
    """What a host needs.

    ``listen``: multiaddrs, ``/ip4/0.0.0.0/tcp/31330``; port 0 picks a free one; empty for a host that
    only dials. ``announce``: what others are told instead, for instance a router's forwarded address.
    """

    identity: Identity
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce: Sequence[str] = field(default=())
    max_connections: int = defaults.MAX_CONNECTIONS


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncIterator[Host]:
    """Run a host until the end of the block; then its connections are closed and its handlers cancelled.

    Raises ConfigError for an address that cannot be listened on or announced.
    """
    check_library()
    listen = [parse_listen_address(text) for text in config.listen]
    announce = [_parse_announce_address(text) for text in config.announce]
    bound = [await bind(address) for address in listen]
    own = announce or reachable_forms(address for _, address in bound)
    noise = noise_transport(config.identity)
    library, swarm = build_host(config.identity, noise, lambda: [Multiaddr(a.transport) for a in own])
    try:
        async with library.run([]), trio.open_nursery() as nursery:
            host = Libp2pHost(config, own, library, nursery)
            host.connections = Connections(nursery, noise, swarm, host.dispatch, limit=config.max_connections)
            host.dialer = Dialer(nursery, host.connections.upgrade_outbound)
            listening = trio.CancelScope()
            for listener, _ in bound:
                nursery.start_soon(accept, listener, host.connections.serve, nursery, listening)
            try:
                yield host
            finally:
                listening.cancel()
                with trio.CancelScope(shield=True):
                    await host.connections.close()
                    await library.close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _single(group) from None
    finally:
        for listener, _ in bound:
            listener.socket.close()


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Take a lone exception of the block out of the groups that the nurseries around it put it in."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _parse_announce_address(text: str) -> Address:
    try:
        address = parse_address(text)
    except RemoteError as e:
        raise ConfigError(f"announced address {text!r}: {e}") from e
    if address is None or not address.port:
        raise ConfigError(f"announced address {text!r}: expected /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>")
    return Address(address.protocol, address.host, address.port)


class Libp2pHost(Host):
    """See :class:`Host`. Made by :func:`open_host` only."""

    connections: Connections
    dialer: Dialer

    def __init__(
        self, config: HostConfig, own: Sequence[Address], library: BasicHost, nursery: trio.Nursery
    ) -> None:
        self.peer_id = config.identity.peer_id
        self._own = own
        self._library = library
        self._nursery = nursery
        self._book = AddressBook()
        self._handlers: dict[str, StreamHandler] = {}
        self.serve(IDENTIFY, self._identify)

    def addresses(self) -> list[str]:
        return [f"{address.transport}/p2p/{self.peer_id}" for address in self._own]

    def connected_peers(self) -> list[PeerId]:
        return self.connections.peers()

    def add_addresses(self, peer: PeerId, addresses: Sequence[str]) -> None:
        self._book.add(peer, [a for a in map(parse_address, addresses) if a is not None])

    def known_addresses(self, peer: PeerId) -> list[Address]:
        """Where ``peer`` may be dialled: what this host was told, then what the peer said of itself."""
        from libp2p.peer.id import ID
        from libp2p.peer.peerstore import PeerStoreError

        try:
            own = self._library.get_peerstore().addrs(ID(peer.raw))
        except PeerStoreError:
            own = []
        said = [parse_address(str(a)) for a in own[: defaults.MAX_ADDRESSES_PER_PEER]]
        return list(dict.fromkeys([*self._book.get(peer), *(a for a in said if a is not None and a.port)]))

    async def connect(self, address: str) -> PeerId:
        peer, parsed = split_peer_address(address)
        if self.connections.find(peer) is None:
            self._refuse_self(peer)
            await self.dialer.dial(peer, [parsed])
        self._book.add(peer, [parsed])
        return peer

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        connection = await self._connection(peer)
        stream = await connection.open_stream()
        try:
            await multistream.propose(stream, protocol)
        except ProtocolNotSupported as e:
            stream.reset_now()
            raise ProtocolNotSupported(f"{peer} does not serve {protocol}") from e
        except RemoteError as e:
            stream.reset_now()
            raise PeerUnreachable(f"{peer}: {protocol}: {e}", hop="protocol") from e
        except BaseException:
            stream.reset_now()
            raise
        stream.protocol = protocol
        return stream

    async def _connection(self, peer: PeerId) -> YamuxConnection:
        connection = self.connections.find(peer)
        if connection is not None:
            return connection
        self._refuse_self(peer)
        return await self.dialer.dial(peer, self.known_addresses(peer))

    def _refuse_self(self, peer: PeerId) -> None:
        if peer == self.peer_id:
            raise PeerUnreachable(f"{peer} is this host itself", hop="address")

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is served already")
        self._handlers[protocol] = handler

    def unserve(self, protocol: str) -> None:
        self._handlers.pop(protocol, None)

    # --- inbound streams

    def dispatch(self, stream: YamuxStream) -> None:
        """Negotiate and serve a stream that a peer opened, in a task of its own."""
        self._nursery.start_soon(self._serve_stream, stream)

    async def _serve_stream(self, stream: YamuxStream) -> None:
        # Whatever a peer sends, or a handler raises, ends here and touches no other stream.
        try:
            with trio.fail_after(defaults.NEGOTIATION_SECONDS):
                stream.protocol, handler = await multistream.answer(stream, self._find_handler)
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

    def _find_handler(self, protocol: str) -> StreamHandler | None:
        return self._handlers.get(protocol) or self._library_handler(protocol)

    def _library_handler(self, protocol: str) -> StreamHandler | None:
        handler = self._library.get_mux().handlers.get(protocol)
        if handler is None:
            return None

        async def serve(stream: Stream) -> None:
            assert isinstance(stream, YamuxStream)
            await handler(await as_net_stream(stream))

        return serve

    async def _identify(self, stream: Stream) -> None:
        assert isinstance(stream, YamuxStream)
        library = self._library
        protocols = {*self._handlers, *(str(p) for p in library.get_mux().get_protocols() if p)}
        observed = self.connections.remote_address(stream.connection)
        await stream.write(
            identify_message(library.get_public_key().serialize(), self._own, protocols, observed)
        )
