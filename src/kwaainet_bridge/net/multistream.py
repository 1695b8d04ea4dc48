"""Agreeing on a protocol: multistream-select 1.0, for sockets, secured channels and streams alike.

Each message is a varint length, the text and a newline. The dialling side sends the header and its
proposal in one write and then reads both answers; the listening side accepts any mixture of that and of
one message at a time, and a payload that follows in the same packet. Source:
multiformats/multistream-select; go-multistream v0.5.0 as in hivemind 1.1.12's p2pd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kwaainet_bridge.defaults import MAX_PROTOCOL_ID_BYTES, MAX_PROTOCOL_PROPOSALS
from kwaainet_bridge.errors import ProtocolNotSupported, RemoteError, StreamReset
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

T = TypeVar("T")

_HEADER = b"/multistream/1.0.0"
_NOT_AVAILABLE = b"na"
_READ_BYTES = 4096
_LENGTH_BYTES = 3  # a longer length is over the limit whatever its value


class ByteChannel(Protocol):
    """What a protocol is negotiated over."""

    async def receive_some(self, max_bytes: int) -> bytes:
        """Return at least one byte, or ``b""`` at the end."""

    async def send_all(self, data: bytes) -> None:
        """Send ``data``."""

    def unread(self, data: bytes) -> None:
        """Put back what was read too far: the next ``receive_some`` returns it."""


def _message(text: bytes) -> bytes:
    return encode_uvarint(len(text) + 1) + text + b"\n"


class _Reader:
    def __init__(self, channel: ByteChannel) -> None:
        self._channel = channel
        self._buffer = b""

    async def next(self) -> bytes:
        while True:
            message = self.take()
            if message is not None:
                return message
            await self._receive()

    async def _receive(self) -> None:
        data = await self._channel.receive_some(_READ_BYTES)
        if not data:
            raise StreamReset("the peer closed before a protocol was agreed")
        self._buffer += data

    def take(self) -> bytes | None:
        """Take the next message if it is complete already."""
        prefix = decode_uvarint(self._buffer, max_bytes=_LENGTH_BYTES)
        if prefix is None:
            return None
        length, start = prefix
        if not 1 <= length <= MAX_PROTOCOL_ID_BYTES:
            raise RemoteError(f"multistream: message of {length} bytes (limit {MAX_PROTOCOL_ID_BYTES})")
        end = start + length
        if len(self._buffer) < end:
            return None
        message = self._buffer[start:end]
        if message[-1:] != b"\n":
            raise RemoteError("multistream: message does not end in a newline")
        self._buffer = self._buffer[end:]
        return message[:-1]

    def release(self) -> None:
        """Give what follows the negotiation back to the channel."""
        if self._buffer:
            self._channel.unread(self._buffer)
            self._buffer = b""

    async def expect_header(self) -> None:
        # Checked as it arrives: what speaks another protocol altogether may wait for us to answer first.
        header = _message(_HEADER)
        while not self._buffer.startswith(header):
            if self._buffer and not header.startswith(self._buffer):
                raise RemoteError(f"multistream: the peer speaks something else: {self._buffer[:32]!r}")
            await self._receive()
        self._buffer = self._buffer[len(header) :]


async def propose(channel: ByteChannel, protocol: str) -> None:
    """Ask the peer to speak ``protocol`` on ``channel``: one write, one round trip.

    Raises ProtocolNotSupported if it does not, RemoteError on a malformed answer, StreamReset if the
    channel ends. Cancelled: the channel is of no further use.
    """
    wanted = protocol.encode()
    await channel.send_all(_message(_HEADER) + _message(wanted))
    reader = _Reader(channel)
    await reader.expect_header()
    answer = await reader.next()
    if answer == _NOT_AVAILABLE:
        raise ProtocolNotSupported(f"the peer does not serve {protocol}")
    if answer != wanted:
        raise RemoteError(f"multistream: proposed {protocol}, the peer answered {answer[:64]!r}")
    reader.release()


async def answer(channel: ByteChannel, find: Callable[[str], T | None]) -> tuple[str, T]:
    """Answer the peer's proposals until ``find`` knows one; return that protocol and what ``find`` returned.

    Unknown protocols, ``ls`` and names that are not UTF-8 are answered with ``na``, as stock daemons do.
    Raises RemoteError on malformed messages or too many proposals, StreamReset if the channel ends first.
    The caller brings the deadline.
    """
    reader = _Reader(channel)
    await reader.expect_header()
    # Most dialling sides have sent their first proposal with the header: then one write answers both.
    reply = _message(_HEADER)
    for _ in range(MAX_PROTOCOL_PROPOSALS):
        proposal = reader.take()
        if proposal is None:
            if reply:
                await channel.send_all(reply)
            reply = b""
            proposal = await reader.next()
        found = _look_up(proposal, find)
        if found is not None:
            await channel.send_all(reply + _message(proposal))
            reader.release()
            return found
        reply += _message(_NOT_AVAILABLE)
    raise RemoteError(f"multistream: {MAX_PROTOCOL_PROPOSALS} proposals and none of them is served here")


def _look_up(proposal: bytes, find: Callable[[str], T | None]) -> tuple[str, T] | None:
    try:
        protocol = proposal.decode()
    except UnicodeDecodeError:
        return None
    found = find(protocol)
    return None if found is None else (protocol, found)
