"""One TCP connection and the noise session over it: whole messages in, whole messages out.

The handshake is py-libp2p's. Its session reads each message's length with a system call of its own and writes
each message separately, so the bytes after the handshake are framed here: one read decrypts every message
that arrived, one write sends all that is queued. Nobody but the connection's writer task writes, and that
task is only cancelled when the connection ends, so a cancelled caller never leaves half a message on the
wire.
"""

from __future__ import annotations

from collections.abc import Awaitable

import trio
from libp2p.abc import ConnectionType, IRawConnection, ISecureConn, ISecureTransport
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from multiaddr import Multiaddr

from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.wire.peer_id import PeerId

NOISE = "/noise"

_RECEIVE_BYTES = 256 * 1024
_LENGTH_BYTES = 2


class ConnectionLost(NetworkError):
    """The TCP connection ended, or its bytes no longer decrypt."""


class TcpSocket(IRawConnection):  # type: ignore[misc]  # libp2p is not followed by the type checker
    """A TCP stream as py-libp2p's handshake and the protocol negotiation want it."""

    def __init__(self, stream: trio.SocketStream, *, initiator: bool) -> None:
        self.is_initiator = initiator
        self._stream = stream
        self._unread = b""
        self._remote: tuple[str, int] = stream.socket.getpeername()[:2]

    async def receive_some(self, max_bytes: int) -> bytes:
        if self._unread:
            data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
            return data
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
            raise ConnectionLost(f"TCP: {e.__cause__ or e}") from e

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
            raise ConnectionLost(f"TCP: {e.__cause__ or e}") from e

    def unread(self, data: bytes) -> None:
        self._unread = data + self._unread

    def abort(self) -> None:
        """Close the socket at once; what the kernel has accepted is still sent."""
        self._stream.socket.close()

    # py-libp2p's names for the same

    async def read(self, n: int | None = None) -> bytes:
        return await self.receive_some(_RECEIVE_BYTES if n is None else n)

    async def write(self, data: bytes) -> None:
        await self.send_all(data)

    async def close(self) -> None:
        self.abort()

    def get_remote_address(self) -> tuple[str, int]:
        return self._remote

    def get_transport_addresses(self) -> list[Multiaddr]:
        host, port = self._remote
        family = "ip6" if ":" in host else "ip4"
        return [Multiaddr(f"/{family}/{host.partition('%')[0]}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class SecureChannel:
    """An authenticated peer and an encrypted byte stream to it."""

    def __init__(self, socket: TcpSocket, remote: PeerId, session: NoiseTransportReadWriter) -> None:
        self.remote = remote
        self.socket = socket
        self._noise = session.noise_state
        self._ciphertext = b""
        self._plaintext: list[bytes] = []

    async def receive_chunks(self) -> list[bytes]:
        """Return the payloads of all messages that have arrived, at least one; ``[]`` at the end of the
        stream.

        Raises ConnectionLost. Cancelled: nothing is lost.
        """
        while not self._plaintext:
            data = await self.socket.receive_some(_RECEIVE_BYTES)
            if not data:
                if self._ciphertext:
                    raise ConnectionLost("TCP ended within a noise message")
                return []
            self._plaintext = self._decrypt(data)
        chunks, self._plaintext = self._plaintext, []
        return chunks

    def _decrypt(self, data: bytes) -> list[bytes]:
        buffer = self._ciphertext + data if self._ciphertext else data
        chunks = []
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            end = body + int.from_bytes(buffer[start:body], "big")
            if len(buffer) < end:
                break
            try:
                plaintext = self._noise.decrypt(buffer[body:end])
            except (
                Exception
            ) as e:  # each cipher backend fails in its own way; the session is over in any case
                raise ConnectionLost("a noise message does not decrypt") from e
            if plaintext:
                chunks.append(plaintext)
            start = end
        self._ciphertext = buffer[start:]
        return chunks

    async def receive_some(self, max_bytes: int) -> bytes:
        """Return up to ``max_bytes`` bytes, ``b""`` at the end; for the muxer's negotiation."""
        chunks = await self.receive_chunks()
        if not chunks:
            return b""
        data = chunks[0]
        rest = [data[max_bytes:]] if len(data) > max_bytes else []
        self._plaintext = rest + chunks[1:]
        return data[:max_bytes]

    def unread(self, data: bytes) -> None:
        self._plaintext.insert(0, data)

    def abort(self) -> None:
        self.socket.abort()

    async def send_all(self, data: bytes) -> None:
        """Encrypt and send ``data``. One caller at a time. Raises ConnectionLost.

        Cancelled: the connection is of no further use, as part of a message may have been sent.
        """
        parts = []
        for start in range(0, len(data), MAX_PLAINTEXT_LENGTH):
            message = self._noise.encrypt(data[start : start + MAX_PLAINTEXT_LENGTH])
            parts.append(len(message).to_bytes(_LENGTH_BYTES, "big"))
            parts.append(message)
        await self.socket.send_all(b"".join(parts))


async def secure_outbound(socket: TcpSocket, transport: ISecureTransport, peer: PeerId) -> SecureChannel:
    """Shake hands as the dialling side. Raises RemoteError if the peer there is not ``peer`` or fails to
    prove it."""
    await multistream.propose(socket, NOISE)
    return await _handshake(socket, transport.secure_outbound(socket, ID(peer.raw)))


async def secure_inbound(socket: TcpSocket, transport: ISecureTransport) -> SecureChannel:
    """Shake hands as the listening side; nothing but noise is offered. Raises RemoteError or StreamReset."""
    await multistream.answer(socket, lambda protocol: True if protocol == NOISE else None)
    return await _handshake(socket, transport.secure_inbound(socket))


async def _handshake(socket: TcpSocket, handshake: Awaitable[ISecureConn]) -> SecureChannel:
    try:
        session = await handshake
    except NetworkError:
        raise
    except PeerIDMismatchesPubkey as e:
        raise RemoteError("another peer answers at this address") from e
    except Exception as e:  # protobuf, cipher and library errors alike: the peer did not prove who it is
        raise RemoteError(f"noise handshake failed: {type(e).__name__} {e}".rstrip()) from e
    return SecureChannel(socket, PeerId(session.get_remote_peer().to_bytes()), session.conn)
