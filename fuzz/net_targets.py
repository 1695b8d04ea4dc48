"""Yamux, multistream-select, identify, Kademlia, AutoNAT and addresses."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

# identify needs it at its first call, which is not to be charged for the import
import libp2p.identity.identify.pb.identify_pb2  # noqa: F401

from fuzz.wire_targets import expect, pieces
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net import autonat as nat
from kwaainet_bridge.net import kademlia as kad
from kwaainet_bridge.net import multistream
from kwaainet_bridge.net.addresses import Address, parse_address, parse_binary_address
from kwaainet_bridge.net.identify import PeerDescription, decode_identify
from kwaainet_bridge.net.yamux_frames import FrameParser, Header, Payload
from kwaainet_bridge.wire.peer_id import PeerId

PROPOSED: Final = "/kwaai/fuzz/1.0.0"

_READ: Final = 4096


def yamux(data: bytes) -> None:
    whole = _parse([data])
    for size in (1, 7):
        expect(_parse(pieces(data, size)) == whole, "pieces give other frames or end otherwise")
    error = whole[2]
    if error is not None:
        raise RemoteError(error)


def _parse(parts: Sequence[bytes]) -> tuple[list[Header], bytes, str | None]:
    parser = FrameParser()
    headers: list[Header] = []
    payload = bytearray()
    try:
        for part in parts:
            for event in parser.feed(part):
                if isinstance(event, Payload):
                    payload += event.data
                else:
                    headers.append(event)
    except RemoteError as e:
        return headers, bytes(payload), str(e)
    return headers, bytes(payload), None


class _Channel:
    """A peer that has sent ``data``, in pieces of ``size`` bytes, and closed; nothing ever waits."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._size = size
        self.sent = 0

    async def receive_some(self, max_bytes: int) -> bytes:
        size = min(max_bytes, self._size)
        piece, self._data = self._data[:size], self._data[size:]
        return piece

    async def send_all(self, data: bytes) -> None:
        self.sent += len(data)

    def unread(self, data: bytes) -> None:
        self._data = data + self._data

    @property
    def rest(self) -> bytes:
        return self._data


def _finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as e:
        return e.value
    raise AssertionError("a negotiation waits although everything has arrived")


def _negotiate(talk: Callable[[_Channel], Coroutine[Any, Any, Any]], data: bytes) -> None:
    outcomes = []
    last: NetworkError | RemoteError | None = None
    for size in (_READ, 1, 7):
        channel = _Channel(data, size)
        try:
            outcomes.append((_finish(talk(channel)), channel.rest))
        except (NetworkError, RemoteError) as e:
            last = e
            outcomes.append((type(e), b""))
        expect(channel.sent <= 8 * len(data) + 1024, "more was sent than the peer's bytes account for")
    expect(outcomes[0] == outcomes[1] == outcomes[2], f"pieces end otherwise: {outcomes}")
    if isinstance(last, RemoteError):
        raise last


def multistream_propose(data: bytes) -> None:
    _negotiate(lambda channel: multistream.propose(channel, PROPOSED), data)


def multistream_answer(data: bytes) -> None:
    _negotiate(lambda channel: multistream.answer(channel, {PROPOSED: 1}.get), data)


def identify(data: bytes) -> None:
    described = decode_identify(data)
    expect(isinstance(described.agent, str), "an agent that is no text")
    expect(all(isinstance(p, str) for p in described.protocols), "a protocol that is no text")
    _check_addresses([a for a in (*described.addresses, described.observed) if a is not None])


def _check_addresses(addresses: Sequence[Address]) -> None:
    for found in addresses:
        expect(0 < found.port < 1 << 16, "port")
        expect(parse_address(str(found)) == found, "an address that does not come back from its text")


def address(data: bytes) -> None:
    found = parse_binary_address(data)
    if found is not None:
        expect(parse_binary_address(found.binary) == found.without_peer(), "round trip")
    parse_address(data.decode("utf-8", "replace"))


class _Host:
    """A host with two connected peers, one of which serves Kademlia."""

    peer_id = PeerId(b"\x00\x02me")
    _served = PeerId(b"\x00\x02ab")

    def connected_peers(self) -> list[PeerId]:
        return [self._served, PeerId(b"\x00\x02cd")]

    def where(self, peer: PeerId) -> list[Address]:
        return [Address("ip4", "127.0.0.1", 4001)] if peer == self._served else []

    def description(self, peer: PeerId) -> PeerDescription | None:
        return PeerDescription("", frozenset({kad.KAD}), ()) if peer == self._served else None

    async def wait_identified(self) -> None:
        raise NotImplementedError

    async def open_stream_at(self, peer: PeerId, addresses: Sequence[Address], protocol: str) -> Any:
        raise NotImplementedError


_KADEMLIA: Final = kad.Kademlia(_Host())


def kademlia(data: bytes) -> None:
    """As a request and as an answer."""
    message = kad._decode(data)  # noqa: SLF001 - the decoder is under test, not the exchange around it
    answer = _KADEMLIA.answer(message)
    if answer is not None:
        expect(len(answer.closer_peers) <= 3, "peers that are not connected")
        answer.SerializeToString()
    for _peer, addresses in kad._found(message):  # noqa: SLF001
        _check_addresses(addresses)


def autonat(data: bytes) -> None:
    """As an answer and as a request."""
    try:
        verdict = nat.read_answer(data)
    except RemoteError:
        verdict = nat.DialBack(None)
    expect(verdict.text.isprintable(), "a text that is not fit for a terminal")
    expect(verdict.address is None or verdict.reachable is True, "an address that was not reached")
    named = nat._decode(data).dial.peer  # noqa: SLF001 - the decoder is under test
    for found in nat._at_host("203.0.113.9", named.addrs):  # noqa: SLF001
        expect(found.host == "203.0.113.9" and 0 < found.port < 1 << 16, "dialled elsewhere")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "yamux": yamux,
    "multistream-propose": multistream_propose,
    "multistream-answer": multistream_answer,
    "identify": identify,
    "address": address,
    "kademlia": kademlia,
    "autonat": autonat,
}
