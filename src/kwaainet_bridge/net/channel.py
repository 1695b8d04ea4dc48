"""One TCP connection and the noise session over it: whole messages in, whole messages out.

The handshake is py-libp2p's. Its session reads each message's length with a system call of its own and writes
each message separately, so the bytes after the handshake are framed here: one read decrypts every message
that arrived, one write sends all that is queued. Nobody but the connection's writer task writes, and that
task is only cancelled when the connection ends, so a cancelled caller never leaves half a message on the
wire.

All connections receive into one buffer, which is decrypted before anybody else runs, and encrypt into another, of
which nothing but what the system does not take at once is kept: large reads and writes then cost idle connections no
memory, and small ones no allocation.
"""

from __future__ import annotations

import abc
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, Protocol

import trio
from libp2p.abc import ConnectionType, IRawConnection, ISecureConn, ISecureTransport
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from multiaddr import Multiaddr

from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.cipher import TAG_BYTES
from kwaainet_bridge.net.library import session_ciphers
from kwaainet_bridge.wire.peer_id import PeerId

NOISE = "/noise"

_HANDSHAKE_READ_BYTES: Final = 64 * 1024
_BUFFER_BYTES: Final = 256 * 1024  # what fits the processor's cache: four messages of the largest size
_LENGTH_BYTES: Final = 2
_LARGEST_MESSAGE: Final = _LENGTH_BYTES + MAX_PLAINTEXT_LENGTH + TAG_BYTES


class _Buffers(NamedTuple):
    """Memory that all connections of a run share, each between two points where others may run."""

    received: memoryview
    plaintext: memoryview  # of one message
    sealed: memoryview


_shared_buffers: trio.lowlevel.RunVar[_Buffers] = trio.lowlevel.RunVar("buffers of secured connections")


def _buffers() -> _Buffers:
    try:
        return _shared_buffers.get()
    except LookupError:
        sizes = (_BUFFER_BYTES, MAX_PLAINTEXT_LENGTH, _BUFFER_BYTES)
        buffers = _Buffers(*(memoryview(bytearray(size)) for size in sizes))
        _shared_buffers.set(buffers)
        return buffers


class Cipher(Protocol):
    """See :class:`kwaainet_bridge.net.cipher.MessageCipher`."""

    def seal(self, plaintext: bytes | memoryview, into: memoryview) -> None: ...

    def open(self, ciphertext: memoryview) -> bytes: ...


class ConnectionLost(NetworkError):
    """The TCP connection ended, or its bytes no longer decrypt."""


class WrongPeer(RemoteError):
    """Another peer than the one dialled has proved itself; ``found`` is who."""

    def __init__(self, found: PeerId, text: str = "") -> None:
        super().__init__(text or f"another peer answers at this address: {found}")
        self.found = found


class RawChannel(IRawConnection):  # type: ignore[misc]  # libp2p is not followed by the type checker
    """Bytes to a peer before anything is proven: what the handshake, the negotiation and the channel want.

    ``remote_host`` is the IP address of the other end, empty if a relay is between; ``remote_address`` the binary
    multiaddr, empty likewise; ``local_port`` the port here, 0 then. ``relay`` is who carries the bytes.
    """

    is_initiator: bool
    remote_host: str = ""
    remote_address: bytes = b""
    local_port: int = 0
    relay: PeerId | None = None

    _unread: bytes = b""

    def unread(self, data: bytes) -> None:
        """Put back what was read too far."""
        self._unread = data + self._unread

    def take_unread(self) -> bytes:
        """What was put back and not read again, as far as :meth:`receive_into` would leave it out."""
        data, self._unread = self._unread, b""
        return data

    @abc.abstractmethod
    async def receive_some(self, max_bytes: int) -> bytes:
        """Return at least one byte, or ``b""`` at the end. Cancelled: nothing is lost."""

    @abc.abstractmethod
    async def wait_readable(self) -> None:
        """Return when :meth:`receive_into` has something, be it the end."""

    @abc.abstractmethod
    def receive_into(self, buffer: memoryview) -> int | None:
        """Fill ``buffer`` as far as bytes have arrived; their number, 0 at the end, None if there are none."""

    def send_now(self, data: memoryview) -> int:  # noqa: ARG002 - for those who can
        """Send as much of ``data`` as is taken without waiting; the number of bytes, which may be 0."""
        return 0

    @abc.abstractmethod
    async def send_all(self, data: bytes) -> None:
        """Send ``data``. Cancelled: an unknown part was sent."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close at once; what the system has accepted is still sent."""

    # py-libp2p's names for the same

    async def read(self, n: int | None = None) -> bytes:
        return await self.receive_some(_HANDSHAKE_READ_BYTES if n is None else n)

    async def write(self, data: bytes) -> None:
        await self.send_all(data)

    async def close(self) -> None:
        self.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT if self.relay is None else ConnectionType.RELAYED


class TcpSocket(RawChannel):
    """A TCP connection as py-libp2p's handshake, the protocol negotiation and the channel want it.

    It takes the socket out of ``stream``, which is then closed: trio's own yields to other tasks at each call, ready
    or not. Raises OSError if the other side has gone already.
    """

    def __init__(self, stream: trio.SocketStream, *, initiator: bool) -> None:
        self.is_initiator = initiator
        try:
            host, port = stream.socket.getpeername()[:2]
            self.local_port = stream.socket.getsockname()[1]
        except OSError:
            stream.socket.close()
            raise
        self.remote_host = host
        family_name = "ip6" if ":" in host else "ip4"
        self.remote_address = Address(family_name, host.partition("%")[0], port).binary
        family, kind, number = stream.socket.family, stream.socket.type, stream.socket.proto
        self._socket = socket.socket(family, kind, number, fileno=stream.socket.detach())
        self._socket.setblocking(False)

    async def receive_some(self, max_bytes: int) -> bytes:
        """Return at least one byte, or ``b""`` at the end. Cancelled: nothing is lost."""
        if self._unread:
            data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
            return data
        while True:
            await self.wait_readable()
            try:
                return self._socket.recv(max_bytes)
            except BlockingIOError:
                continue
            except OSError as e:
                raise self._lost(e) from e

    async def wait_readable(self) -> None:
        """Return when :meth:`receive_into` has something, be it the end."""
        await self._wait(trio.lowlevel.wait_readable)

    def receive_into(self, buffer: memoryview) -> int | None:
        """Fill ``buffer`` as far as bytes have arrived; their number, 0 at the end, None if there are none."""
        try:
            return self._socket.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as e:
            raise self._lost(e) from e

    async def send_all(self, data: bytes) -> None:
        """Send ``data``; yields to other tasks only while the kernel's buffer is full.

        Cancelled: an unknown part was sent.
        """
        view = memoryview(data)
        while view := view[self.send_now(view) :]:
            await self._wait(trio.lowlevel.wait_writable)

    def send_now(self, data: memoryview) -> int:
        """Send as much of ``data`` as the kernel takes without waiting; the number of bytes, which may be 0."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as e:
            raise self._lost(e) from e

    def _lost(self, error: OSError | None = None) -> ConnectionLost:
        return ConnectionLost(f"TCP: {error}" if error and self._socket.fileno() >= 0 else "TCP: closed here")

    async def _wait(self, until: Callable[[int], Awaitable[None]]) -> None:
        number = self._socket.fileno()
        if number < 0:
            raise self._lost()
        try:
            await until(number)
        except trio.ClosedResourceError as e:
            raise self._lost() from e

    def abort(self) -> None:
        """Close the socket at once; what the kernel has accepted is still sent."""
        number = self._socket.fileno()
        if number >= 0:
            trio.lowlevel.notify_closing(number)
            self._socket.close()


class SecureChannel:
    """An authenticated peer and an encrypted byte stream to it."""

    def __init__(self, socket: RawChannel, remote: PeerId, *, outbound: Cipher, inbound: Cipher) -> None:
        self.remote = remote
        self.socket = socket
        self._seal = outbound.seal
        self._open = inbound.open
        self._ciphertext = socket.take_unread()  # an incomplete message
        self._plaintext: list[bytes] = []
        self._buffers = _buffers()

    async def receive_chunks(self) -> list[bytes]:
        """Return the payloads of all messages that have arrived, at least one; ``[]`` at the end of the
        stream.

        Raises ConnectionLost. Cancelled: nothing is lost.
        """
        buffer = self._buffers.received
        while not self._plaintext:
            await self.socket.wait_readable()
            # From here to the end of the loop nobody else runs: the buffer is everybody's.
            held = len(self._ciphertext)
            received = self.socket.receive_into(buffer[held:])
            if received is None:
                continue
            if not received:
                if held:
                    raise ConnectionLost("TCP ended within a noise message")
                return []
            buffer[:held] = self._ciphertext
            self._plaintext = self._decrypt_messages(buffer[: held + received])
        chunks, self._plaintext = self._plaintext, []
        return chunks

    def _decrypt_messages(self, received: memoryview) -> list[bytes]:
        chunks = []
        start, end = 0, len(received)
        while end - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            next_start = body + (received[start] << 8 | received[start + 1])
            if next_start > end:
                break
            try:
                plaintext = self._open(received[body:next_start])
            except (
                Exception
            ) as e:  # each cipher backend fails in its own way; the session is over in any case
                raise ConnectionLost("a noise message does not decrypt") from e
            if plaintext:
                chunks.append(plaintext)
            start = next_start
        self._ciphertext = bytes(received[start:])
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
        """:meth:`send_pieces` of one, under the name that protocol negotiation uses."""
        await self.send_pieces([data])

    async def send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Encrypt and send ``pieces``, one after the other. One caller at a time. Raises ConnectionLost.

        Cancelled: the connection is of no further use, as part of a message may have been sent.
        """
        waiting = deque(pieces)
        sealed = self._buffers.sealed
        while waiting:
            # From here to the end of the loop nobody else runs, unless the socket is full: the buffer is everybody's.
            end = 0
            while waiting and end + _LARGEST_MESSAGE <= len(sealed):
                plaintext = self._next_plaintext(waiting)
                start, size = end + _LENGTH_BYTES, len(plaintext) + TAG_BYTES
                end = start + size
                sealed[start - _LENGTH_BYTES : start] = size.to_bytes(_LENGTH_BYTES, "big")
                self._seal(plaintext, sealed[start:end])
            sent = self.socket.send_now(sealed[:end])
            if sent < end:
                await self.socket.send_all(bytes(sealed[sent:end]))

    def _next_plaintext(self, waiting: deque[bytes | memoryview]) -> bytes | memoryview:
        """Take a message's worth from the front of ``waiting``: in its own memory if it is one piece."""
        first = waiting.popleft()
        if len(first) >= MAX_PLAINTEXT_LENGTH or not waiting:
            if len(first) > MAX_PLAINTEXT_LENGTH:
                view = memoryview(first)
                waiting.appendleft(view[MAX_PLAINTEXT_LENGTH:])
                first = view[:MAX_PLAINTEXT_LENGTH]
            return first
        gathered = self._buffers.plaintext
        gathered[: len(first)] = first
        used = len(first)
        while waiting and used < MAX_PLAINTEXT_LENGTH:
            piece = waiting.popleft()
            room = MAX_PLAINTEXT_LENGTH - used
            if len(piece) > room:
                view = memoryview(piece)
                waiting.appendleft(view[room:])
                piece = view[:room]
            gathered[used : used + len(piece)] = piece
            used += len(piece)
        return gathered[:used]


async def secure_outbound(socket: RawChannel, transport: ISecureTransport, peer: PeerId) -> SecureChannel:
    """Shake hands as the dialling side. Raises RemoteError if the peer there fails to prove who it is, WrongPeer if
    that is not ``peer``."""
    await multistream.propose(socket, NOISE)
    # py-libp2p would compare the ids, too, and not say whom it found
    return await _handshake(socket, transport.secure_outbound(socket, None), peer)


async def secure_inbound(
    socket: RawChannel, transport: ISecureTransport, peer: PeerId | None = None
) -> SecureChannel:
    """Shake hands as the listening side, with ``peer`` alone if that is given; nothing but noise is offered.

    Raises RemoteError, StreamReset or WrongPeer.
    """
    await multistream.answer(socket, lambda protocol: True if protocol == NOISE else None)
    return await _handshake(socket, transport.secure_inbound(socket), peer)


async def _handshake(
    socket: RawChannel, handshake: Awaitable[ISecureConn], expected: PeerId | None
) -> SecureChannel:
    try:
        session = await handshake
    except NetworkError:
        raise
    except Exception as e:  # protobuf, cipher and library errors alike: the peer did not prove who it is
        raise RemoteError(f"noise handshake failed: {type(e).__name__} {e}".rstrip()) from e
    outbound, inbound = session_ciphers(session)
    remote = PeerId(session.get_remote_peer().to_bytes())
    channel = SecureChannel(socket, remote, outbound=outbound, inbound=inbound)
    if expected is not None and channel.remote != expected:
        raise WrongPeer(channel.remote)
    return channel
