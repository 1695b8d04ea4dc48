"""What a DHT key holds: one value, or a dictionary of subkeys, each with its time of expiration.

Values stay packed (msgpack bytes) wherever they are stored or passed on; only the final reader unpacks them.
Times are unix seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.msgpack import DictionaryValue, pack, unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Regular:
    """A single packed value."""

    value: bytes
    expiration: float


Record = Regular | DictionaryValue
"""What one key holds."""


class FoundEntry(NamedTuple):
    """One subkey's value of a dictionary that was read."""

    value: Any
    expiration: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader gets for a key: a value, or a dict from subkey to FoundEntry if ``is_dictionary``."""

    value: Any
    expiration: float
    is_dictionary: bool


def expiration_of(record: Record) -> float:
    """When the last part of ``record`` expires."""
    return record.expiration if isinstance(record, Regular) else record.latest_expiration


def dictionary(entries: list[tuple[Hashable, bytes, float]]) -> DictionaryValue:
    """A dictionary record of (subkey, packed value, expiration) that lives as long as its last entry."""
    latest = max((expiration for _, _, expiration in entries), default=-math.inf)
    return DictionaryValue(maxsize=math.inf, latest_expiration=latest, entries=tuple(entries))


def record_bytes(packed_subkey: bytes, value: bytes) -> int:
    """What an entry counts towards ``defaults.DHT_MAX_RECORD_BYTES``: its size on the wire or a bit more."""
    return len(packed_subkey) + len(value) + 16  # three headers and the expiration


def read_subkey(packed: bytes) -> Hashable:
    """Unpack a subkey. RemoteError for what cannot be the key of a dictionary, as stock peers hold it."""
    subkey = unpack(
        packed,
        max_bytes=defaults.DHT_MAX_SUBKEY_BYTES,
        max_depth=defaults.DHT_MAX_SUBKEY_DEPTH,
        max_items=defaults.DHT_MAX_SUBKEY_ITEMS,
        name="subkeys",
    )
    try:
        hash(subkey)
    except TypeError:
        raise RemoteError(f"subkeys: a {type(subkey).__name__} cannot be the key of a dictionary") from None
    return subkey  # type: ignore[no-any-return] # it is hashable


def live_part(record: Record, now: float) -> Record | None:
    """``record`` without what has expired or has no valid time of expiration; None if nothing is left."""
    if isinstance(record, Regular):
        return record if record.expiration >= now else None
    live = [entry for entry in record.entries if entry[2] >= now]
    return dictionary(live) if live else None


def merge(ours: Record | None, theirs: Record) -> Record:
    """The later of two replicas of a key: by entry for dictionaries, else as a whole; a tie keeps ours.

    Entries beyond ``defaults.DHT_MAX_RECORD_BYTES`` in all are left out, so that neither of the two, however large,
    drives out the other.
    """
    if ours is None:
        return theirs
    if isinstance(ours, Regular) or isinstance(theirs, Regular):
        return theirs if expiration_of(theirs) > expiration_of(ours) else ours
    parts = [{pack(entry[0]): entry for entry in record.entries} for record in (ours, theirs)]
    merged = parts[0].copy()
    for key, entry in parts[1].items():
        if key not in merged or merged[key][2] < entry[2]:
            merged[key] = entry
    return dictionary(list(_fair_part(merged, parts).values()))


_Entries = dict[bytes, tuple[Hashable, bytes, float]]  # by packed subkey


def _size(entries: _Entries) -> int:
    return sum(record_bytes(key, entry[1]) for key, entry in entries.items())


def _fair_part(merged: _Entries, parts: list[_Entries]) -> _Entries:
    """As much of ``merged`` as there may be: half of the room for the smaller of its two parts, then the larger.

    The smaller one's come first even if there is room for all, since the next merger leaves out the last.
    """
    kept: _Entries = {}
    room = defaults.DHT_MAX_RECORD_BYTES
    smaller, larger = sorted(parts, key=_size)
    for part, reserved in ((smaller, room // 2), (larger, 0)):
        for key in part:
            size = record_bytes(key, merged[key][1])
            if room <= reserved:
                break
            if key not in kept and size <= room:
                kept[key] = merged[key]
                room -= size
    return kept


def decode(record: Record, *, key: object) -> Found | None:
    """Unpack what a search brought home. Values that are not msgpack are left out; None if nothing is left.

    ``key`` only names the record in the log.
    """
    try:
        if isinstance(record, Regular):
            return Found(unpack(record.value), record.expiration, is_dictionary=False)
    except RemoteError as e:
        log.warning("the value of key %s cannot be read: %s", key, e)
        return None
    entries: dict[Hashable, FoundEntry] = {}
    unread: list[str] = []
    for subkey, value, expiration in record.entries:
        try:
            entries[subkey] = FoundEntry(unpack(value), expiration)
        except RemoteError as e:
            unread.append(f"{subkey!r:.80}: {e}")
    if unread:  # in one line, however many
        log.warning("%d subkeys of key %s cannot be read; the first is %s", len(unread), key, unread[0])
    if not entries:
        return None
    return Found(entries, max(entry.expiration for entry in entries.values()), is_dictionary=True)
