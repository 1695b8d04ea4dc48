"""Checking, signing and stripping records: a policy of the network's users, applied by every one of its nodes.

Records are validated when a peer stores them here and when a peer answers with them, signed when this node stores
them, and stripped of signatures before a reader gets them. Source of the rules and their order: hivemind 1.1.12,
``dht/validation.py``, ``dht/protocol.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

import trio

from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.values import Record, Regular, dictionary
from kwaainet_bridge.wire.msgpack import DictionaryValue, pack

_BREATH = 16
"""Entries validated between two chances for other tasks to run: a signature takes about 50 µs."""


@dataclass(frozen=True, slots=True)
class DhtRecord:
    """What a validator sees: the key's 20 bytes, the packed subkey, the packed value and unix seconds.

    ``subkey`` of a plain value is msgpack's nil.
    """

    key: bytes
    subkey: bytes
    value: bytes
    expiration: float


class RecordValidator(ABC):
    """A policy for records. Implementations are pure, fast and raise nothing."""

    priority: int = 0
    """Several validators sign in the order of rising priority; they validate and strip in the opposite order."""

    @abstractmethod
    def validate(self, record: DhtRecord) -> bool:
        """Whether a record from the network is acceptable, its value as it was signed."""

    def sign_value(self, record: DhtRecord) -> bytes:
        """The value as it is to be stored."""
        return record.value

    def strip_value(self, record: DhtRecord) -> bytes:
        """The value of a valid record without what ``sign_value`` added."""
        return record.value

    def merged_with(self, other: RecordValidator) -> RecordValidator | None:  # noqa: ARG002
        """One validator that does the work of both, for kinds of which there may be only one; else None."""
        return None


class CompositeValidator(RecordValidator):
    """Several validators as one: a record must satisfy all of them. Those that can be merged are."""

    def __init__(self, validators: Iterable[RecordValidator]) -> None:
        self.parts: list[RecordValidator] = []
        for validator in validators:
            for part in validator.parts if isinstance(validator, CompositeValidator) else [validator]:
                self._add(part)
        self.parts.sort(key=lambda validator: validator.priority)

    def _add(self, new: RecordValidator) -> None:
        for place, old in enumerate(self.parts):
            merged = old.merged_with(new)
            if merged is not None:
                self.parts[place] = merged
                return
        self.parts.append(new)

    def validate(self, record: DhtRecord) -> bool:
        for validator in reversed(self.parts):
            if not validator.validate(record):
                return False
            record = replace(record, value=validator.strip_value(record))
        return True

    def sign_value(self, record: DhtRecord) -> bytes:
        for validator in self.parts:
            record = replace(record, value=validator.sign_value(record))
        return record.value

    def strip_value(self, record: DhtRecord) -> bytes:
        for validator in reversed(self.parts):
            record = replace(record, value=validator.strip_value(record))
        return record.value


def _plain(key: DhtId, record: Regular) -> DhtRecord:
    return DhtRecord(key.to_bytes(), pack(None), record.value, record.expiration)


def _entries(key: DhtId, record: DictionaryValue) -> Iterable[DhtRecord]:
    raw = key.to_bytes()
    return (DhtRecord(raw, pack(subkey), value, expiration) for subkey, value, expiration in record.entries)


async def valid_part(validator: RecordValidator, key: DhtId, record: Record) -> Record | None:
    """``record`` without the entries that ``validator`` refuses; None if nothing is left.

    Stock refuses a dictionary as a whole for one entry, by which a peer could hide the others.
    """
    if isinstance(record, Regular):
        return record if validator.validate(_plain(key, record)) else None
    valid = []
    for n, (entry, seen) in enumerate(zip(record.entries, _entries(key, record), strict=True)):
        if validator.validate(seen):
            valid.append(entry)
        if n % _BREATH == _BREATH - 1:
            await trio.lowlevel.checkpoint()
    return record if len(valid) == len(record.entries) else dictionary(valid) if valid else None


def stripped(validator: RecordValidator, key: DhtId, record: Record) -> Record:
    """A valid ``record`` as its readers get it."""
    if isinstance(record, Regular):
        return replace(record, value=validator.strip_value(_plain(key, record)))
    return dictionary(
        [
            (subkey, validator.strip_value(seen), expiration)
            for (subkey, _, expiration), seen in zip(record.entries, _entries(key, record), strict=True)
        ]
    )
