"""py-libp2p's host, wired to our connections. All of its interfaces that are used are met here.

Our connections are secured and multiplexed before py-libp2p sees them (it treats them as it treats QUIC),
so its own dialling, accepting, upgrading and stream bookkeeping are not in the way: it contributes the
noise handshake, ping, outgoing identify and its peerstore, and stays a complete ``IHost`` for the
services that need one. The calls that its abstract interfaces do not promise are listed in ``_NEEDED``
and checked before the host starts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Self

import libp2p
import trio
from libp2p.abc import ConnectionType, IMuxedConn, IMuxedStream, INetStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair, PrivateKey
from libp2p.crypto.rsa import RSAPrivateKey
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.io import BaseNoiseMsgReadWriter
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from kwaainet_bridge.errors import ConfigError, StreamClosed, StreamReset
from kwaainet_bridge.net.channel import NOISE, TcpSocket
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.yamux import YamuxConnection
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.pb import keys_pb2

YAMUX = "/yamux/1.0.0"

_READ_BYTES = 64 * 1024
_NO_LIMIT = 1_000_000  # connections are limited where they are made

_NEEDED = (
    (Swarm, "add_conn"),
    (Swarm, "set_resource_manager"),
    (BasicHost, "run"),
    (BasicHost, "close"),
    (BasicHost, "get_mux"),
    (NetStream, "set_state"),
)


def check_library() -> None:
    """Raise ConfigError, naming what is missing, if the installed py-libp2p is not shaped as this module
    needs."""
    missing = [f"{cls.__name__}.{name}" for cls, name in _NEEDED if not hasattr(cls, name)]
    if "noise_state" not in inspect.get_annotations(BaseNoiseMsgReadWriter):
        missing.append("BaseNoiseMsgReadWriter.noise_state")
    if "conn" not in inspect.signature(SecureSession.__init__).parameters:
        missing.append("SecureSession.conn")
    missing += [
        f"IMuxedConn.{name} (new)"
        for name in IMuxedConn.__abstractmethods__
        if not hasattr(MuxedConnection, name)
    ]
    if missing:
        raise ConfigError(
            f"libp2p {libp2p.__version__} lacks {', '.join(sorted(missing))}: "
            "install the pinned version (0.8.1)"
        )


def quiet_libp2p_logs(level: int = logging.ERROR) -> None:
    """Keep py-libp2p's loggers to ``level``: it logs each closed stream and each refused protocol.

    For applications to call; nothing in this package calls it by itself.
    """
    for name in ("libp2p", "multiaddr", "async_service"):
        logging.getLogger(name).setLevel(level)


def noise_transport(identity: Identity) -> NoiseTransport:
    """Make the handshake, under a noise key of its own."""
    return NoiseTransport(_key_pair(identity), noise_privkey=create_x25519_key_pair().private_key)


def _key_pair(identity: Identity) -> KeyPair:
    message = keys_pb2.PrivateKey.FromString(identity.serialized)
    if message.type == keys_pb2.ED25519:
        private_key: PrivateKey = Ed25519PrivateKey.from_bytes(message.data[:32])  # it wants the seed alone
    else:
        private_key = RSAPrivateKey.from_bytes(message.data)
    return KeyPair(private_key, private_key.get_public_key())


def build_host(
    identity: Identity, noise: NoiseTransport, announced: Callable[[], list[Multiaddr]]
) -> tuple[BasicHost, Swarm]:
    """Make py-libp2p's host, which never dials, listens or prunes by itself."""
    host = libp2p.new_host(
        key_pair=_key_pair(identity),
        sec_opt={TProtocol(NOISE): noise},
        transports=[],
        connection_config=ConnectionConfig(
            max_connections=_NO_LIMIT,
            high_watermark=_NO_LIMIT,
            low_watermark=0,
            min_connections=0,
            max_connections_per_peer=_NO_LIMIT,
        ),
        addrs_factory=lambda _candidates: announced(),
        disable_identify_address_discovery=True,
    )
    swarm = host.get_network()
    swarm.retry_config = RetryConfig(max_retries=0)
    # Its stream semaphore and rate limits are shared by all peers: one could use them up for the others.
    swarm.set_resource_manager(None)
    # It would send a signed record that Go peers reject when the key is RSA; ours is served instead.
    host.remove_stream_handler(IDENTIFY)
    return host, swarm


async def as_net_stream(stream: YamuxStream) -> INetStream:
    """Wrap an inbound stream for one of py-libp2p's own handlers."""
    net_stream = NetStream(MuxedStream(stream, None), None, None)
    net_stream.set_protocol(TProtocol(stream.protocol))
    await net_stream.set_state(StreamState.OPEN)
    return net_stream


class MuxedConnection(IMuxedConn):  # type: ignore[misc]  # libp2p is not followed by the type checker
    """A connection as py-libp2p sees it. Inbound streams do not pass through here: the host dispatches
    them."""

    def __init__(self, connection: YamuxConnection, socket: TcpSocket) -> None:
        self.peer_id = ID(connection.remote.raw)
        self.event_started = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None  # set by the library
        self.negotiated_security_protocol = NOISE
        self.negotiated_muxer_protocol = YAMUX
        self._connection = connection
        self._socket = socket

    @property
    def is_initiator(self) -> bool:
        return self._connection.initiator

    @property
    def is_established(self) -> bool:
        return not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self._connection.closed.is_set()

    async def start(self) -> None:
        self.event_started.set()
        await self._connection.closed.wait()
        if self.on_close is not None:
            with trio.CancelScope(shield=True):
                await self.on_close()

    async def close(self) -> None:
        self._connection.stop("closed by libp2p")
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def open_stream(self) -> IMuxedStream:
        try:
            return MuxedStream(await self._connection.open_stream(), self)
        except StreamReset as e:
            raise MuxedStreamError(str(e)) from e

    async def accept_stream(self) -> IMuxedStream:
        await self._connection.closed.wait()
        raise MuxedConnUnavailable("the connection is closed")

    def get_remote_address(self) -> tuple[str, int]:
        return self._socket.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._socket.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class MuxedStream(IMuxedStream):  # type: ignore[misc]  # libp2p is not followed by the type checker
    """A stream as py-libp2p sees it."""

    def __init__(self, stream: YamuxStream, connection: MuxedConnection | None) -> None:
        self._stream = stream
        self.muxed_conn = connection if connection is not None else _PeerOnly(ID(stream.remote.raw))

    async def read(self, n: int | None = None) -> bytes:
        try:
            data = await self._stream.read(_READ_BYTES if n is None or n < 0 else n)
        except StreamReset as e:
            raise MuxedStreamReset(str(e)) from e
        except StreamClosed as e:
            raise MuxedStreamClosed(str(e)) from e
        if not data:
            raise MuxedStreamEOF("the peer has finished")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except StreamReset as e:
            raise MuxedStreamReset(str(e)) from e
        except StreamClosed as e:
            raise MuxedStreamClosed(str(e)) from e

    async def close(self) -> None:
        await self._stream.close()

    async def reset(self) -> None:
        await self._stream.reset()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("deadlines are cancel scopes here")

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    async def __aenter__(self) -> Self:
        return self


class _PeerOnly:
    """What the handlers of ping and identify push ask of the connection below: whose it is."""

    def __init__(self, peer_id: ID) -> None:
        self.peer_id = peer_id
