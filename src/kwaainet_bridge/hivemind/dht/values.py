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

    Entries of ``theirs`` beyond ``defaults.DHT_MAX_RECORD_BYTES`` in all are left out.
    """
    if ours is None:
        return theirs
    if isinstance(ours, Regular) or isinstance(theirs, Regular):
        return theirs if expiration_of(theirs) > expiration_of(ours) else ours
    merged = {pack(entry[0]): entry for entry in ours.entries}
    room = defaults.DHT_MAX_RECORD_BYTES - sum(record_bytes(key, entry[1]) for key, entry in merged.items())
    for entry in theirs.entries:
        key = pack(entry[0])
        held = merged.get(key)
        if held is None:
            growth = record_bytes(key, entry[1])
        elif held[2] < entry[2]:
            growth = len(entry[1]) - len(held[1])
        else:
            continue
        if growth <= room:
            merged[key] = entry
            room -= growth
    return dictionary(list(merged.values()))


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
    for subkey, value, expiration in record.entries:
        try:
            entries[subkey] = FoundEntry(unpack(value), expiration)
        except RemoteError as e:
            log.warning("subkey %.80r of key %s cannot be read: %s", subkey, key, e)
    if not entries:
        return None
    return Found(entries, max(entry.expiration for entry in entries.values()), is_dictionary=True)
