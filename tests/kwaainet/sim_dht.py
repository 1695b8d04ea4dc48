"""Hivemind's DHT as a KwaaiNet bootstrap peer offers it: ping, store and find over one dictionary, a single hop.

Messages are encoded by hand. Source: hivemind 1.1.12, ``proto/dht.proto``, ``dht/protocol.py`` and ``dht/storage.py``.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
from sim_envelope import (
    BrokenRules,
    CallError,
    bytes_field,
    call_unary,
    double_field,
    one,
    read_fields,
    unary_handler,
    varint_field,
)

PING, STORE, FIND = "DHTProtocol.rpc_ping", "DHTProtocol.rpc_store", "DHTProtocol.rpc_find"
REGULAR_VALUE = b"\xc0"  # a subkey of nil: the value has no subkey
WHOLE_DICTIONARY = b""
_TUPLE, _DICTIONARY = 0x40, 0x50
_FOUND_REGULAR, _FOUND_DICTIONARY = 1, 2


# --- values


def pack(value: Any) -> bytes:
    """msgpack as Hivemind has it: tuples are extension 64."""
    return msgpack.packb(value, use_bin_type=True, strict_types=True, default=_extend)


def _extend(value: Any) -> msgpack.ExtType:
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, pack(list(value)))
    raise TypeError(f"no form in msgpack for {type(value)}")


def unpack(data: bytes) -> Any:
    """The other way. Tuples come back as tuples. BrokenRules if it is not msgpack."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_shrink)
    except (ValueError, msgpack.UnpackException) as e:
        raise BrokenRules(f"not msgpack: {data[:40].hex()}: {e}") from e


def _shrink(code: int, data: bytes) -> Any:
    return tuple(unpack(data)) if code == _TUPLE else msgpack.ExtType(code, data)


def key_id(key: str) -> bytes:
    """Where a key of the DHT lies: SHA-1 of its msgpack form."""
    return hashlib.sha1(pack(key)).digest()


@dataclass(frozen=True)
class Entry:
    """One value and when it expires, in Unix seconds. ``subkey`` is decoded; None for a value without one."""

    subkey: Any
    value: bytes
    expiration: float


@dataclass(frozen=True)
class Stored:
    """One request to store, as it came: who sent what, and whether it was accepted."""

    by: str
    key: bytes
    subkey: Any
    value: bytes
    expiration: float
    accepted: bool


@dataclass
class Dictionary:
    """What a peer holds for others: values by key and subkey, of which the one that expires later wins.

    ``log`` remembers every request, refused ones too.
    """

    clock: Callable[[], float]
    entries: dict[bytes, dict[bytes, Entry]] = field(default_factory=dict)
    log: list[Stored] = field(default_factory=list)

    def store(self, by: str, key: bytes, subkey: bytes, value: bytes, expiration: float) -> bool:
        """Store one value; the answer is Hivemind's ``store_ok``."""
        if subkey == WHOLE_DICTIONARY:
            return all(self._put(by, key, pack(e.subkey), e) for e in read_dictionary(value))
        name = None if subkey == REGULAR_VALUE else unpack(subkey)
        return self._put(by, key, subkey, Entry(name, value, expiration))

    def _put(self, by: str, key: bytes, subkey: bytes, entry: Entry) -> bool:
        held = self._live(key)
        if subkey == REGULAR_VALUE or REGULAR_VALUE in held:
            newer = all(e.expiration < entry.expiration for e in held.values())
            kept = {} if newer else held
        else:
            newer = subkey not in held or held[subkey].expiration < entry.expiration
            kept = held
        accepted = newer and entry.expiration >= self.clock()
        self.log.append(Stored(by, key, entry.subkey, entry.value, entry.expiration, accepted))
        if accepted:
            self.entries[key] = {**kept, subkey: entry}
        return accepted

    def find(self, key: bytes) -> list[Entry]:
        """What lives under ``key``."""
        return list(self._live(key).values())

    def _live(self, key: bytes) -> dict[bytes, Entry]:
        now = self.clock()
        return {s: e for s, e in self.entries.get(key, {}).items() if e.expiration >= now}


def write_dictionary(entries: Sequence[Entry]) -> bytes:
    """Extension 80: ``[maximal size, latest expiration, [[subkey, value, expiration], …]]``."""
    body = [
        math.inf,
        max(e.expiration for e in entries),
        [[e.subkey, e.value, e.expiration] for e in entries],
    ]
    return msgpack.packb(msgpack.ExtType(_DICTIONARY, pack(body)))


def read_dictionary(value: bytes) -> list[Entry]:
    outer = unpack(value)
    if not isinstance(outer, msgpack.ExtType) or outer.code != _DICTIONARY:
        raise BrokenRules("a dictionary that is not extension 80")
    try:
        _, _, items = unpack(outer.data)
        return [Entry(subkey, bytes(data), float(expiration)) for subkey, data, expiration in items]
    except (TypeError, ValueError) as e:
        raise BrokenRules(f"a dictionary of another form: {e}") from e


# --- messages


def node_info(node_id: bytes) -> bytes:
    return bytes_field(1, node_id)


def ping_request(node_id: bytes, *, validate: bool) -> bytes:
    return bytes_field(2, node_info(node_id)) + (varint_field(3, 1) if validate else b"")


def store_request(node_id: bytes, items: Iterable[tuple[bytes, bytes, bytes, float]]) -> bytes:
    """``items``: (key, packed subkey, value, expiration)."""
    rows = list(items)
    return b"".join(
        (
            *(bytes_field(2, key) for key, _, _, _ in rows),
            *(bytes_field(3, subkey) for _, subkey, _, _ in rows),
            *(bytes_field(4, value) for _, _, value, _ in rows),
            bytes_field(5, struct.pack(f"<{len(rows)}d", *(row[3] for row in rows))),
            bytes_field(6, bytes(len(rows))),
            bytes_field(7, node_info(node_id)),
        )
    )


def find_request(node_id: bytes, keys: Iterable[bytes]) -> bytes:
    return b"".join(bytes_field(2, key) for key in keys) + bytes_field(3, node_info(node_id))


def find_result(entries: Sequence[Entry]) -> bytes:
    """One result without neighbours."""
    if not entries:
        return b""
    if entries[0].subkey is None:
        kind, value, expiration = _FOUND_REGULAR, entries[0].value, entries[0].expiration
    else:
        kind, value = _FOUND_DICTIONARY, write_dictionary(entries)
        expiration = max(e.expiration for e in entries)
    return varint_field(1, kind) + bytes_field(2, value) + double_field(3, expiration)


def read_find_result(result: bytes) -> list[Entry]:
    fields = read_fields(result)
    kind = one(fields, 1, 0)
    if kind == _FOUND_DICTIONARY:
        return read_dictionary(one(fields, 2))
    if kind == _FOUND_REGULAR:
        return [Entry(None, one(fields, 2), struct.unpack("<d", one(fields, 3))[0])]
    return []


def _packed_doubles(values: Sequence[bytes]) -> list[float]:
    data = b"".join(values)  # packed or one by one, the bytes are the same
    if len(data) % 8:
        raise BrokenRules("expirations that are not float64")
    return [x for (x,) in struct.iter_unpack("<d", data)]


def _node_id(message: bytes | None) -> bytes:
    node_id = one(read_fields(message), 1, b"") if message is not None else b""
    if node_id and len(node_id) != 20:
        raise BrokenRules(f"a node id of {len(node_id)} bytes")
    return node_id


# --- both roles


class DhtPeer:
    """Serves the three methods on ``host`` and calls them at others."""

    def __init__(
        self, host: Any, *, clock: Callable[[], float], complain: Callable[[str], object], timeout: float = 10
    ) -> None:
        self.node_id = hashlib.sha1(os.urandom(32)).digest()
        self.held = Dictionary(clock)
        self._host = host
        self._clock = clock
        self._timeout = timeout
        for protocol, handler in ((PING, self._ping), (STORE, self._store), (FIND, self._find)):
            host.serve(protocol, unary_handler(handler, complain))

    async def _ping(self, remote: Any, body: bytes) -> bytes:
        fields = read_fields(body)
        theirs = _node_id(one(fields, 2))
        answer = bytes_field(2, node_info(self.node_id)) + double_field(4, self._clock())
        if theirs and one(fields, 3, 0):
            try:
                called_back = await self.ping(remote, validate=False)
            except Exception:  # whatever went wrong: the caller cannot be called
                called_back = b""
            if called_back == theirs:
                answer += varint_field(5, 1)
        return answer

    async def _store(self, remote: Any, body: bytes) -> bytes:
        fields = read_fields(body)
        keys, subkeys, values = (fields.get(number, []) for number in (2, 3, 4))
        expirations = _packed_doubles(fields.get(5, []))
        if not len(keys) == len(values) == len(expirations):
            raise CallError("AssertionError()")
        if any(len(key) != 20 for key in keys) or len(subkeys) != len(keys):
            raise BrokenRules("rpc_store with keys that are not of 20 bytes, or without a subkey for each")
        ok = [
            self.held.store(str(remote), *row) for row in zip(keys, subkeys, values, expirations, strict=True)
        ]
        return bytes_field(2, bytes(ok)) + bytes_field(3, node_info(self.node_id))

    async def _find(self, _remote: Any, body: bytes) -> bytes:
        keys = read_fields(body).get(2, [])
        results = b"".join(bytes_field(2, find_result(self.held.find(key))) for key in keys)
        return results + bytes_field(3, node_info(self.node_id))

    async def ping(self, peer: Any, *, validate: bool) -> bytes:
        """The peer's node id. With ``validate`` it must have called back: BrokenRules if it could not."""
        body = ping_request(self.node_id, validate=validate)
        fields = read_fields(await call_unary(self._host, peer, PING, body, timeout=self._timeout))
        if validate and not one(fields, 5, 0):
            raise BrokenRules(f"{peer} could not call back")
        return _node_id(one(fields, 2))

    async def store(self, peer: Any, items: Iterable[tuple[str, str, Any, float]]) -> list[bool]:
        """Store (key, subkey, value, expiration) at one peer, in one call; which of them it accepted."""
        rows = [(key_id(key), pack(subkey), pack(value), at) for key, subkey, value, at in items]
        body = store_request(self.node_id, rows)
        fields = read_fields(await call_unary(self._host, peer, STORE, body, timeout=self._timeout))
        ok = [
            bool(flag)
            for flag in b"".join(bytes([v]) if isinstance(v, int) else v for v in fields.get(2, []))
        ]
        if len(ok) != len(rows):
            raise BrokenRules(f"{peer} answered {len(ok)} of {len(rows)} stores")
        return ok

    async def find(self, peer: Any, keys: Sequence[str]) -> list[list[Entry]]:
        """What one peer holds under each of ``keys``, in one call."""
        body = find_request(self.node_id, [key_id(key) for key in keys])
        fields = read_fields(await call_unary(self._host, peer, FIND, body, timeout=self._timeout))
        results = fields.get(2, [])
        if len(results) != len(keys):
            raise BrokenRules(f"{peer} answered {len(results)} of {len(keys)} keys")
        return [read_find_result(result) for result in results]
