"""Who peers are and who this host is: identify asked and answered, and pushed when something changes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.connection import Connection
from kwaainet_bridge.net.connections import Connections
from kwaainet_bridge.net.identify import (
    IDENTIFY,
    IDENTIFY_PUSH,
    PeerDescription,
    encode_identify,
    read_identify,
)
from kwaainet_bridge.net.identify_push import IdentifyPush
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

Negotiate = Callable[[Connection, str], Awaitable[Stream]]
"""Opens a stream of a protocol on a connection."""


class Introductions:
    """Exchanges descriptions with every connected peer.

    ``own_addresses`` and ``protocols`` tell what this host says of itself; whoever changes them calls
    :meth:`changed`. ``described`` is told what a connected peer has said. :meth:`run` must be running.
    """

    def __init__(
        self,
        connections: Connections,
        public_key: bytes,
        *,
        own_addresses: Callable[[], Sequence[Address]],
        protocols: Callable[[], Iterable[str]],
        negotiate: Negotiate,
        described: Callable[[Connection, PeerDescription], None],
    ) -> None:
        self._connections = connections
        self._public_key = public_key
        self._own_addresses = own_addresses
        self._protocols = protocols
        self._negotiate = negotiate
        self._described = described
        self._descriptions: dict[PeerId, PeerDescription] = {}
        self._push = IdentifyPush(self._push_listeners, self._send_push)

    def of(self, peer: PeerId) -> PeerDescription | None:
        """What a connected peer has said of itself; None before it has."""
        return self._descriptions.get(peer)

    def changed(self) -> None:
        """Note that this host's description has changed: peers are told soon."""
        self._push.changed()

    async def run(self) -> None:
        """Tell connected peers of changes, until cancelled."""
        await self._push.run()

    def forget(self, peer: PeerId) -> None:
        """Note that the last connection to ``peer`` has ended."""
        self._descriptions.pop(peer, None)
        self._push.forget(peer)

    async def greet(self, connection: Connection) -> None:
        """Ask a new connection's peer who it is. Raises nothing but cancellation."""
        try:
            with trio.fail_after(defaults.NEGOTIATION_SECONDS):
                stream = await self._negotiate(connection, IDENTIFY)
                try:
                    self._take(connection, await read_identify(stream))
                finally:
                    await stream.close()
        except (NetworkError, RemoteError, trio.TooSlowError) as e:
            log.debug("no identify from %s: %s", connection.remote, e)
        except Exception:
            # this runs on a stranger's behalf: whatever it says must not end the host
            log.exception("identify of %s failed", connection.remote)
        finally:
            connection.identified.set()

    # --- serving

    async def answer(self, stream: Stream) -> None:
        """Serve ``/ipfs/id/1.0.0``."""
        if self._connections.find(stream.remote) is not None:
            self._push.told(stream.remote)
        said = self._introduction(self._connection_of(stream))
        with trio.move_on_after(defaults.NEGOTIATION_SECONDS) as waiting:
            await stream.write(said)
        if waiting.cancelled_caught:
            await stream.reset()

    async def hear(self, stream: Stream) -> None:
        """Serve ``/ipfs/id/push/1.0.0``."""
        with trio.move_on_after(defaults.NEGOTIATION_SECONDS) as waiting:
            self._take(self._connection_of(stream), await read_identify(stream))
        if waiting.cancelled_caught:
            await stream.reset()

    def _connection_of(self, stream: Stream) -> Connection | None:
        # of several to one peer the very one: what both sides see of each other is different on each
        connection = stream.connection if isinstance(stream, YamuxStream) else None
        return connection if isinstance(connection, Connection) else self._connections.find(stream.remote)

    def _take(self, connection: Connection | None, description: PeerDescription) -> None:
        if connection is not None and self._connections.find(connection.remote) is not None:
            self._descriptions[connection.remote] = description
            self._push.described(connection.remote)
            self._described(connection, description)

    def _introduction(self, connection: Connection | None) -> bytes:
        observed = connection.remote_address if connection is not None else b""
        return encode_identify(self._public_key, self._own_addresses(), self._protocols(), observed)

    # --- pushing

    def _push_listeners(self) -> list[PeerId]:
        return [
            peer
            for peer in self._connections.peers()
            if (described := self._descriptions.get(peer)) is not None
            and IDENTIFY_PUSH in described.protocols
        ]

    async def _send_push(self, peer: PeerId) -> None:
        connection = self._connections.find(peer)
        if connection is None:
            return
        try:
            with trio.fail_after(defaults.NEGOTIATION_SECONDS):
                stream = await self._negotiate(connection, IDENTIFY_PUSH)
                try:
                    await stream.write(self._introduction(connection))
                finally:
                    await stream.close()
        except (NetworkError, RemoteError, trio.TooSlowError) as e:
            log.debug("%s does not hear of changes: %s", peer, e)
