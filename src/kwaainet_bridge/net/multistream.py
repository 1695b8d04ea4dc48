"""Agreeing on a protocol: multistream-select 1.0, for sockets, secured channels and streams alike.

Each message is a varint length, the text and a newline. The dialling side sends the header and its
proposal in one write and then reads both answers, at once (:func:`propose`) or, on a stream whose peer is
known to serve the protocol, after its first payload (:class:`Proposal`). The listening side accepts any
mixture of that and of one message at a time, and a payload that follows in the same packet. Source:
multiformats/multistream-select; go-multistream v0.5.0 as in hivemind 1.1.12's p2pd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kwaainet_bridge.defaults import MAX_PROTOCOL_ID_BYTES, MAX_PROTOCOL_PROPOSALS
from kwaainet_bridge.errors import ProtocolNotSupported, RemoteError, StreamReset
from kwaainet_bridge.wire.varint import decode_uvarint, encode_uvarint

T = TypeVar("T")

_HEADER = b"\x13/multistream/1.0.0\n"  # as it is on the wire
_NOT_AVAILABLE = b"na"
_READ_BYTES = 4096
_LENGTH_BYTES = 3  # a longer length is over the limit whatever its value

ENDED_EARLY = "the peer closed before a protocol was agreed"


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


def _split(buffer: bytes) -> tuple[bytes, bytes] | None:
    """Cut the first message off ``buffer`` if it is complete: its text, and what follows it."""
    prefix = decode_uvarint(buffer, max_bytes=_LENGTH_BYTES)
    if prefix is None:
        return None
    length, start = prefix
    if not 1 <= length <= MAX_PROTOCOL_ID_BYTES:
        raise RemoteError(f"multistream: message of {length} bytes (limit {MAX_PROTOCOL_ID_BYTES})")
    end = start + length
    if len(buffer) < end:
        return None
    if buffer[end - 1 : end] != b"\n":
        raise RemoteError("multistream: message does not end in a newline")
    return buffer[start : end - 1], buffer[end:]


def _without_header(buffer: bytes) -> bytes | None:
    """What follows the header, or None while it is not complete."""
    # Checked as it arrives: what speaks another protocol altogether may wait for us to answer first.
    if buffer.startswith(_HEADER):
        return buffer[len(_HEADER) :]
    if not _HEADER.startswith(buffer):
        raise RemoteError(f"multistream: the peer speaks something else: {buffer[:32]!r}")
    return None


class Proposal:
    """One proposed protocol and the peer's answer, without I/O."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.opening = _HEADER + _message(protocol.encode())
        """What the proposing side sends first."""
        self._answer = b""

    def feed(self, data: bytes) -> bytes | None:
        """Take what has arrived; return what follows the peer's consent, or None while that is not complete.

        Raises ProtocolNotSupported or, if it is no answer at all, RemoteError.
        """
        self._answer += data
        rest = _without_header(self._answer)
        if rest is None or (message := _split(rest)) is None:
            return None
        answer, rest = message
        if answer == _NOT_AVAILABLE:
            raise ProtocolNotSupported(f"the peer does not serve {self.protocol}")
        if answer != self.protocol.encode():
            raise RemoteError(f"multistream: proposed {self.protocol}, the peer answered {answer[:64]!r}")
        return rest


async def propose(channel: ByteChannel, protocol: str) -> None:
    """Ask the peer to speak ``protocol`` on ``channel``: one write, one round trip.

    Raises ProtocolNotSupported if it does not, RemoteError on a malformed answer, StreamReset if the
    channel ends. Cancelled: the channel is of no further use.
    """
    proposal = Proposal(protocol)
    await channel.send_all(proposal.opening)
    rest = None
    while rest is None:
        rest = proposal.feed(await _receive(channel))
    if rest:
        channel.unread(rest)


async def _receive(channel: ByteChannel) -> bytes:
    data = await channel.receive_some(_READ_BYTES)
    if not data:
        raise StreamReset(ENDED_EARLY)
    return data


async def answer(channel: ByteChannel, find: Callable[[str], T | None]) -> tuple[str, T]:
    """Answer the peer's proposals until ``find`` knows one; return that protocol and what ``find`` returned.

    Unknown protocols, ``ls`` and names that are not UTF-8 are answered with ``na``, as stock daemons do.
    Raises RemoteError on malformed messages or too many proposals, StreamReset if the channel ends first.
    The caller brings the deadline.
    """
    buffer = await _receive(channel)
    while (rest := _without_header(buffer)) is None:
        buffer += await _receive(channel)
    # Most dialling sides have sent their first proposal with the header: then one write answers both.
    reply = _HEADER
    for _ in range(MAX_PROTOCOL_PROPOSALS):
        while (message := _split(rest)) is None:
            if reply:
                await channel.send_all(reply)
                reply = b""
            rest += await _receive(channel)
        proposal, rest = message
        found = _look_up(proposal, find)
        if found is not None:
            await channel.send_all(reply + _message(proposal))
            if rest:
                channel.unread(rest)
            return found
        # At once: what follows may be the payload of a peer that does not wait, and that ends the negotiation.
        await channel.send_all(reply + _message(_NOT_AVAILABLE))
        reply = b""
    raise RemoteError(f"multistream: {MAX_PROTOCOL_PROPOSALS} proposals and none of them is served here")


def _look_up(proposal: bytes, find: Callable[[str], T | None]) -> tuple[str, T] | None:
    try:
        protocol = proposal.decode()
    except UnicodeDecodeError:
        return None
    found = find(protocol)
    return None if found is None else (protocol, found)
