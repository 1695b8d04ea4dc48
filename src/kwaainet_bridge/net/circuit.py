"""Connections through a relay: a stream of the relay's connection carries what a TCP connection would.

Only the two ends can read it: they shake hands over it as over TCP. Source: libp2p specification
``relay/circuit-v2.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError, StreamReset
from kwaainet_bridge.net.channel import RawChannel
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.circuit import (
    MAX_MESSAGE_BYTES,
    HopMessage,
    HopType,
    Status,
    StopMessage,
    StopType,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
    status_name,
)
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.varint import decode_uvarint

log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
_LENGTH_BYTES = 2  # of a message's length: 4096 takes two


class RelayRefused(NetworkError):
    """A relay does not do what was asked; ``status`` is its answer."""

    def __init__(self, relay: PeerId, what: str, status: int | None) -> None:
        super().__init__(f"relay {relay} does not {what}: {status_name(status)}")
        self.status = status


class CircuitSocket(RawChannel):
    """The bytes that a relay carries, over ``stream`` of the connection to it."""

    def __init__(self, stream: YamuxStream, *, initiator: bool) -> None:
        self.is_initiator = initiator
        self.relay = stream.remote
        self._stream = stream
        self._ended = False

    def take_unread(self) -> bytes:
        return b""  # receive_into() begins with it

    async def receive_some(self, max_bytes: int) -> bytes:
        await self.wait_readable()
        data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
        return data

    async def wait_readable(self) -> None:
        if not self._unread and not self._ended:
            self._unread = await self._stream.read(_READ_BYTES)
            self._ended = not self._unread

    def receive_into(self, buffer: memoryview) -> int | None:
        if not self._unread:
            return 0 if self._ended else None
        size = min(len(buffer), len(self._unread))
        buffer[:size] = self._unread[:size]
        self._unread = self._unread[size:]
        return size

    async def send_all(self, data: bytes) -> None:
        await self._stream.write(data)

    def abort(self) -> None:
        self._stream.close_now()


async def read_message(stream: YamuxStream, *, seconds: float = defaults.RELAY_ANSWER_SECONDS) -> bytes:
    """Read the body of one message and leave what follows it to the next read.

    Raises RemoteError if it is too long, StreamReset if the stream ends within it, DeadlineExceeded if it does not
    come within ``seconds``.
    """
    try:
        with trio.fail_after(seconds):
            return await _read_message(stream)
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"{stream.remote}: nothing on {stream.protocol} within {seconds:g} s"
        ) from None


async def _read_message(stream: YamuxStream) -> bytes:
    data = b""
    while True:
        prefix = decode_uvarint(data, max_bytes=_LENGTH_BYTES)
        if prefix is not None:
            length, start = prefix
            if length > MAX_MESSAGE_BYTES:
                raise RemoteError(f"{stream.protocol}: message of {length} bytes (limit {MAX_MESSAGE_BYTES})")
            if len(data) >= start + length:
                if rest := data[start + length :]:
                    stream.unread(rest)
                return data[start : start + length]
        more = await stream.read(MAX_MESSAGE_BYTES)
        if not more:
            raise StreamReset(f"{stream.remote} ended {stream.protocol} within a message")
        data += more


async def ask_hop(stream: YamuxStream, request: HopMessage, what: str) -> HopMessage:
    """Send ``request`` to a relay and return its STATUS, which is OK.

    Raises RelayRefused, which names ``what`` was asked, RemoteError for a malformed answer or a NetworkError.
    """
    await stream.write(encode_hop(request))
    answer = decode_hop(await read_message(stream))
    if answer.type != HopType.STATUS:
        raise RemoteError(f"relay {stream.remote}: answered with type {answer.type}, not with a status")
    if answer.status != Status.OK:
        raise RelayRefused(stream.remote, what, answer.status)
    return answer


async def connect_through(stream: YamuxStream, target: PeerId) -> CircuitSocket:
    """Have the relay at the other end of ``stream``, which speaks HOP, connect to ``target``.

    Raises what :func:`ask_hop` raises. The caller resets the stream then, as when it is cancelled.
    """
    await ask_hop(stream, HopMessage(HopType.CONNECT, peer=target), f"connect to {target}")
    return CircuitSocket(stream, initiator=True)


class CircuitListener:
    """Serves STOP: takes the connections that relays bring.

    ``reserved`` tells whether a relay was asked for that; ``serve`` runs a connection from its first byte to its end.
    """

    def __init__(
        self, reserved: Callable[[PeerId], bool], serve: Callable[[RawChannel], Awaitable[None]]
    ) -> None:
        self._reserved = reserved
        self._serve = serve

    async def take(self, stream: YamuxStream) -> None:
        """Serve one stream of STOP; returns when the relayed connection has ended.

        A peer that is no relay of ours is refused. Raises RemoteError or a NetworkError for a bad beginning.
        """
        request = decode_stop(await read_message(stream))
        refusal = None
        if request.type != StopType.CONNECT:
            refusal = Status.UNEXPECTED_MESSAGE
        elif request.peer is None:
            refusal = Status.MALFORMED_MESSAGE
        elif not self._reserved(stream.remote):
            refusal = Status.PERMISSION_DENIED
        status = Status.OK if refusal is None else refusal
        await stream.write(encode_stop(StopMessage(StopType.STATUS, status=status)))
        if refusal is None:
            await self._serve(CircuitSocket(stream, initiator=False))
        else:
            log.debug("refused a circuit from %s: %s", stream.remote, refusal.name)
