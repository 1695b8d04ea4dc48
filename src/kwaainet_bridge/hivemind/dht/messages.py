"""The DHT's three methods, and their messages to and from our own values. No I/O.

Layouts, tags and the meaning of absent fields are those of hivemind 1.1.12 (``dht.proto``,
``dht/protocol.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import Refusal, RemoteError
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.validation import DhtRecord
from kwaainet_bridge.hivemind.dht.values import Record, Regular, dictionary, live_part, read_subkey
from kwaainet_bridge.rpc.method import unary
from kwaainet_bridge.wire.msgpack import DictionaryValue, pack, unpack
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

PING = unary("DHTProtocol.rpc_ping", pb.PingRequest, pb.PingResponse)
STORE = unary("DHTProtocol.rpc_store", pb.StoreRequest, pb.StoreResponse)
FIND = unary("DHTProtocol.rpc_find", pb.FindRequest, pb.FindResponse)

REGULAR_TAG = pack(None)
"""Stands in the place of a subkey: the item is a plain value."""

DICTIONARY_TAG = b""
"""Stands in the place of a subkey: the item is a whole packed dictionary."""


@dataclass(frozen=True, slots=True)
class StoreItem:
    """One item of a store request. ``subkey`` is packed, or one of the two tags; ``value`` is packed."""

    key: DhtId
    subkey: bytes
    value: bytes
    expiration: float
    in_cache: bool = False

    @classmethod
    def of(cls, key: DhtId, subkey: Any, value: bytes, expiration: float) -> StoreItem:
        """An item for a subkey, or with None for a plain value."""
        return cls(key, pack(subkey), value, expiration)

    @classmethod
    def of_record(cls, key: DhtId, record: Record, *, in_cache: bool = False) -> StoreItem:
        if isinstance(record, Regular):
            return cls(key, REGULAR_TAG, record.value, record.expiration, in_cache)
        return cls(key, DICTIONARY_TAG, pack(record), record.latest_expiration, in_cache)

    def as_record(self) -> DhtRecord:
        """How validators see a plain value or one subkey."""
        return DhtRecord(self.key.to_bytes(), self.subkey, self.value, self.expiration)

    @property
    def wire_bytes(self) -> int:
        """About what the item takes in a request."""
        return len(self.subkey) + len(self.value) + 40


def sender(message: pb.PingRequest | pb.StoreRequest | pb.FindRequest) -> DhtId | None:
    """The node id of whoever sent a request; None for clients. Raises RemoteError."""
    return _node_id(message.peer)


def responder(message: pb.PingResponse | pb.StoreResponse | pb.FindResponse) -> DhtId | None:
    """The node id of whoever sent an answer. Raises RemoteError."""
    return _node_id(message.peer)


def _node_id(info: pb.NodeInfo) -> DhtId | None:
    return DhtId.from_bytes(info.node_id, field="peer.node_id") if info.node_id else None


def store_request(items: Iterable[StoreItem], node: pb.NodeInfo) -> pb.StoreRequest:
    request = pb.StoreRequest(peer=node)
    for item in items:
        request.keys.append(item.key.to_bytes())
        request.subkeys.append(item.subkey)
        request.values.append(item.value)
        request.expiration_time.append(item.expiration)
        request.in_cache.append(item.in_cache)
    return request


def read_store_request(request: pb.StoreRequest) -> Iterator[StoreItem]:
    """The items of a request, as many as it has subkeys: stock servers skip the rest in silence.

    Raises Refusal for lists of unequal lengths or too many items, and RemoteError at an item whose key is too
    long; the items before that one were delivered, and stock has stored them.
    """
    count = len(request.keys)
    if not count == len(request.values) == len(request.expiration_time) == len(request.in_cache):
        raise Refusal("", kind="AssertionError")
    if count > defaults.DHT_MAX_STORE_ITEMS:
        raise Refusal(
            f"{count} items in one store request, the limit is {defaults.DHT_MAX_STORE_ITEMS}",
            kind="ValueError",
        )
    for key, subkey, value, expiration, in_cache in zip(
        request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache, strict=False
    ):
        yield StoreItem(read_key(key), subkey, value, expiration, in_cache)


def read_dictionary(packed: bytes, *, name: str) -> DictionaryValue:
    """Unpack a whole dictionary. RemoteError, beginning with ``name``, for anything else."""
    record = unpack(packed, name=name)
    if not isinstance(record, DictionaryValue):
        raise RemoteError(f"{name}: a {type(record).__name__} where a dictionary was announced")
    return record


def read_record(item: StoreItem) -> Record:
    """What an item of a store request offers. RemoteError for a subkey or dictionary that cannot be read."""
    if item.subkey == DICTIONARY_TAG:
        record = read_dictionary(item.value, name="values")
        for subkey, _, _ in record.entries:
            read_subkey(pack(subkey))
        return record
    if item.subkey == REGULAR_TAG:
        return Regular(item.value, item.expiration)
    return dictionary([(read_subkey(item.subkey), item.value, item.expiration)])


def read_key(raw: bytes) -> DhtId:
    """One key of a request. Raises RemoteError."""
    return DhtId.from_bytes(raw, field="keys")


def find_request(keys: Iterable[DhtId], node: pb.NodeInfo) -> pb.FindRequest:
    return pb.FindRequest(keys=[key.to_bytes() for key in keys], peer=node)


def find_result(record: Record | None, neighbours: Sequence[Contact]) -> pb.FindResult:
    result = pb.FindResult(
        nearest_node_ids=[contact.node_id.to_bytes() for contact in neighbours],
        nearest_peer_ids=[contact.peer.raw for contact in neighbours],
    )
    if isinstance(record, Regular):
        result.type = pb.FOUND_REGULAR
        result.value = record.value
        result.expiration_time = record.expiration
    elif record is not None:
        result.type = pb.FOUND_DICTIONARY
        result.value = pack(record)
        result.expiration_time = record.latest_expiration
    return result


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """What one peer answered for one key: the live part of what it holds, and whom it knows."""

    record: Record | None
    neighbours: tuple[Contact, ...]


def read_find_response(
    response: pb.FindResponse, keys: Sequence[DhtId], *, now: float
) -> dict[DhtId, FindAnswer]:
    """The answers for ``keys``, in that order. RemoteError if there are more or fewer, or an id is wrong."""
    if len(response.results) != len(keys):
        raise RemoteError(f"results: {len(response.results)} answers for {len(keys)} keys")
    return {
        key: FindAnswer(_read_record(result, now), _read_neighbours(result))
        for key, result in zip(keys, response.results, strict=True)
    }


def _read_record(result: pb.FindResult, now: float) -> Record | None:
    """The live part of a record. One that cannot be read counts as none: its holder may only pass it on."""
    if result.type == pb.FOUND_REGULAR:
        return live_part(Regular(result.value, result.expiration_time), now)
    if result.type != pb.FOUND_DICTIONARY:
        return None
    try:
        return live_part(read_dictionary(result.value, name="results.value"), now)
    except RemoteError as e:
        log.warning("an answer of the DHT is left out: %s", e)
        return None


def _read_neighbours(result: pb.FindResult) -> tuple[Contact, ...]:
    """The first of the neighbours; more than a full answer of stock is not looked at."""
    node_ids = result.nearest_node_ids[: defaults.DHT_BUCKET_SIZE]
    return tuple(map(_neighbour, node_ids, result.nearest_peer_ids))


@lru_cache(maxsize=defaults.DHT_REMEMBERED_NEIGHBOURS)
def _neighbour(node_id: bytes, peer: bytes) -> Contact:
    """One neighbour that an answer names. Answers name the same ones again and again."""
    return Contact(DhtId.from_bytes(node_id, field="nearest_node_ids"), PeerId(peer))
