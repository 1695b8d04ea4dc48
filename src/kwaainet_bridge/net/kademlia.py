"""libp2p's Kademlia, as far as it finds peers: who is where, asked and answered.

Hivemind's own DHT returns peer ids without addresses and leaves those to this protocol. A Go peer admits a
neighbour to its table once that answers FIND_NODE for its own id with at least one peer. Connected peers
serve as the table: they are known to be alive, and nobody is dialled to fill buckets. Values and
providers are neither stored nor found. Source: go-libp2p-kad-dht v0.25.1 (dht.go lookupCheck,
handlers.go), in hivemind 1.1.12's p2pd.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import trio
from google.protobuf.message import DecodeError

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError, DeadlineExceeded, NetworkError, RemoteError
from kwaainet_bridge.net.addresses import Address, parse_binary_address
from kwaainet_bridge.net.delimited import read_one
from kwaainet_bridge.net.identify import PeerDescription
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.pb import kad_pb2
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.varint import encode_uvarint

log = logging.getLogger(__name__)

KAD: Final = "/ipfs/kad/1.0.0"
"""The public network; stock Hivemind peers speak it. KwaaiNet's later versions have ``/kwaai/kad/1.0.0``."""

PUT_VALUE: Final = 0
GET_VALUE: Final = 1
ADD_PROVIDER: Final = 2
GET_PROVIDERS: Final = 3
FIND_NODE: Final = 4
PING: Final = 5

_CONNECTED: Final = 1
_READ_BYTES: Final = 16 * 1024
_MAX_QUESTIONS: Final = 3 * defaults.KAD_BUCKET_PEERS
"""Peers asked in one lookup; a lookup in a healthy network converges after far fewer."""

Found = tuple[PeerId, tuple[Address, ...]]


class Neighbourhood(Protocol):
    """What Kademlia asks of the host it belongs to."""

    peer_id: PeerId

    def connected_peers(self) -> list[PeerId]:
        """Peers with a live connection."""

    def where(self, peer: PeerId) -> list[Address]:
        """Where a peer, or this host itself, may be dialled."""

    def dialable(self, addresses: Sequence[Address], told_by: PeerId) -> list[Address]:
        """Those of a peer's ``addresses`` that can be dialled from here."""

    def description(self, peer: PeerId) -> PeerDescription | None:
        """What a connected peer says of itself."""

    async def wait_identified(self) -> None:
        """Wait for the descriptions that are still on their way."""

    async def open_stream_at(self, peer: PeerId, addresses: Sequence[Address], protocol: str) -> Stream:
        """Open a stream without a lookup."""


def check_protocol(text: str) -> None:
    """ConfigError if ``text`` cannot be the protocol id of a network."""
    if not re.fullmatch(r"/[!-~]+", text) or len(text) > defaults.MAX_PROTOCOL_ID_BYTES:
        raise ConfigError(f"Kademlia protocol {text!r:.100}: expected an id such as {KAD}, without spaces")


@functools.lru_cache(maxsize=16_384)
def _key(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest(), "big")


def nearest(target: bytes, peers: Iterable[PeerId]) -> list[PeerId]:
    """The ``k`` peers whose ids are nearest to ``target`` by XOR of SHA-256 digests, the nearest first."""
    point = _key(target)
    return heapq.nsmallest(defaults.KAD_BUCKET_PEERS, peers, key=lambda peer: _key(peer.raw) ^ point)


class Kademlia:
    """Serves and asks one Kademlia network for one host.

    Each network has a protocol id of its own. Only connected peers that serve the same id are asked and named, so
    networks do not mix, not even on one host.
    """

    def __init__(self, host: Neighbourhood, protocol: str = KAD) -> None:
        self._host = host
        self._protocol = protocol

    # --- serving

    async def serve(self, stream: Stream) -> None:
        """Answer the requests of one stream until the peer closes it or falls silent.

        A request that has no answer here (PUT_VALUE, ADD_PROVIDER, unknown types) closes the stream, as stock
        daemons do. Raises RemoteError on malformed messages.
        """
        decoder = DelimitedDecoder(defaults.MAX_KAD_MESSAGE_BYTES)
        with trio.move_on_after(defaults.KAD_IDLE_SECONDS) as idle:
            while data := await stream.read(_READ_BYTES):
                for body in decoder.feed(data):
                    answer = self.answer(_decode(body))
                    if answer is None:
                        return
                    await stream.write(_encode(answer))
                    await trio.lowlevel.checkpoint()  # thousands may have come at once
                idle.deadline = trio.current_time() + defaults.KAD_IDLE_SECONDS

    def answer(self, request: kad_pb2.Message) -> kad_pb2.Message | None:
        """Return the answer to one request, or None if there is none."""
        if request.type == PING:
            return kad_pb2.Message(type=PING)
        if request.type not in (FIND_NODE, GET_VALUE, GET_PROVIDERS):
            return None
        answer = kad_pb2.Message(type=request.type, key=request.key, cluster_level=request.cluster_level)
        for peer in self._closer_peers(request):
            addresses = self._host.where(peer)
            if addresses:
                answer.closer_peers.add(
                    id=peer.raw, addrs=[a.binary for a in addresses], connection=_CONNECTED
                )
        return answer

    def _closer_peers(self, request: kad_pb2.Message) -> list[PeerId]:
        peers = nearest(request.key, self._servers())
        if request.type == FIND_NODE:
            try:
                target = PeerId(request.key)
            except RemoteError:
                return peers
            # The peer that is looked for is named even if it serves no Kademlia: it is its address that
            # is wanted.
            return [target, *(p for p in peers if p != target)]
        return peers

    def _servers(self) -> list[PeerId]:
        host = self._host
        return [
            peer
            for peer in host.connected_peers()
            if (described := host.description(peer)) is not None and self._protocol in described.protocols
        ]

    # --- asking

    async def find_peer(self, target: PeerId) -> list[Address]:
        """Ask the network where ``target`` is; ``[]`` if nobody knows.

        Starts at the connected peers and goes on to nearer ones that they name, ten at a time. The caller
        brings the deadline; each question has one of its own.
        """
        known: dict[PeerId, tuple[Address, ...]] = dict.fromkeys(self._servers(), ())
        asked: set[PeerId] = {self._host.peer_id, target}
        waited = False
        while len(asked) < _MAX_QUESTIONS:
            candidates = [p for p in nearest(target.raw, known) if p not in asked]
            batch = candidates[: defaults.KAD_CONCURRENCY]
            if not batch:
                if waited:
                    break
                # A peer that has only just connected may not have said yet that it can be asked.
                await self._host.wait_identified()
                waited = True
                known.update(dict.fromkeys(set(self._servers()) - known.keys(), ()))
                continue
            asked.update(batch)
            for peer, addresses in await self._ask_all(batch, known, target):
                if peer == target and addresses:
                    return list(addresses)
                if addresses:
                    known.setdefault(peer, addresses)
        return []

    async def _ask_all(
        self, batch: Sequence[PeerId], known: dict[PeerId, tuple[Address, ...]], target: PeerId
    ) -> list[Found]:
        answers: list[Found] = []

        async def ask(peer: PeerId) -> None:
            found = await self._ask(peer, known[peer], target)
            answers.extend(found)
            if any(who == target and where for who, where in found):
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for peer in batch:
                nursery.start_soon(ask, peer)
        return answers

    async def ask(self, peer: PeerId, addresses: Sequence[Address], target: PeerId) -> list[Found]:
        """Ask one peer for those nearest to ``target``; their addresses are those that can be dialled from here.

        Raises NetworkError or RemoteError if it does not answer. Cancelled: no stream stays open.
        """
        try:
            with trio.fail_after(defaults.KAD_REQUEST_SECONDS):
                stream = await self._host.open_stream_at(peer, addresses, self._protocol)
                try:
                    await stream.write(_encode(kad_pb2.Message(type=FIND_NODE, key=target.raw)))
                    found = _found(_decode(await read_one(stream, defaults.MAX_KAD_MESSAGE_BYTES)))
                    return [(who, tuple(self._host.dialable(where, peer))) for who, where in found]
                finally:
                    await stream.close()
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{peer} did not answer FIND_NODE within {defaults.KAD_REQUEST_SECONDS:g} s"
            ) from None

    async def _ask(self, peer: PeerId, addresses: Sequence[Address], target: PeerId) -> list[Found]:
        try:
            return await self.ask(peer, addresses, target)
        except (NetworkError, RemoteError) as e:
            log.debug("%s does not say where %s is: %s", peer, target, e)
            return []


def _encode(message: kad_pb2.Message) -> bytes:
    body: bytes = message.SerializeToString()
    return encode_uvarint(len(body)) + body


def _decode(body: bytes) -> kad_pb2.Message:
    try:
        return kad_pb2.Message.FromString(body)
    except DecodeError as e:
        raise RemoteError(f"Kademlia message: {e}") from e


def _found(answer: kad_pb2.Message) -> list[Found]:
    """The peers that an answer names, at most two buckets of them, with the addresses that can be dialled."""
    found = []
    for peer in answer.closer_peers[: 2 * defaults.KAD_BUCKET_PEERS]:
        addresses = (parse_binary_address(a) for a in peer.addrs[: defaults.MAX_ADDRESSES_PER_PEER])
        found.append((PeerId(peer.id), tuple(a for a in addresses if a is not None and a.port)))
    return found
