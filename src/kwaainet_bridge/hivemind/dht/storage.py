"""Records that this node keeps until they expire: a bounded data structure without I/O; time is an argument.

The acceptance rules are those of hivemind 1.1.12 (``dht/storage.py``, ``utils/timed_storage.py``). Two things
differ on purpose. What is kept is bounded in bytes, in number and in time, in all and by sender, without altering
the expiration that readers see (signatures cover it). And an older offer that was refused never shortens the life
of the newer record, as it does in stock.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.shares import Shares
from kwaainet_bridge.hivemind.dht.values import Record, Regular, dictionary, record_bytes
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.peer_id import PeerId

_ENTRY_OVERHEAD = 600
"""Bytes of memory that an entry costs beside its own: 400 to 600 were measured on CPython 3.11."""

_WHOLE = b""  # names the single entry of a regular value; a packed subkey is never empty


@dataclass(slots=True)
class _Entry:
    packed: bytes  # the subkey, or _WHOLE
    subkey: Hashable
    value: bytes
    expiration: float
    sender: PeerId | None
    serial: int = -1  # tells an entry from its predecessors in the heap

    @property
    def size(self) -> int:
        return record_bytes(self.packed, self.value)

    @property
    def cost(self) -> int:
        return self.size + _ENTRY_OVERHEAD


@dataclass(slots=True)
class _Row:
    """What one key holds: the one entry ``_WHOLE``, or entries by packed subkey."""

    is_dictionary: bool
    entries: dict[bytes, _Entry] = field(default_factory=dict)
    value_bytes: int = 0
    shares: Shares[bytes] | None = None  # of its entries, once it was full

    def latest_expiration(self) -> float:
        return max(entry.expiration for entry in self.entries.values())

    def add(self, entry: _Entry) -> None:
        self.entries[entry.packed] = entry
        self.value_bytes += entry.size
        if self.shares is not None and entry.sender is not None:
            self.shares.add(entry.sender, entry.packed, entry.cost)

    def pop(self, packed: bytes) -> _Entry | None:
        entry = self.entries.pop(packed, None)
        if entry is not None:
            self.value_bytes -= entry.size
            if self.shares is not None and entry.sender is not None:
                self.shares.remove(entry.sender, packed, entry.cost)
        return entry

    def counted(self) -> Shares[bytes]:
        """Who holds how much of it. Kept up to date from the first call on."""
        if self.shares is None:
            self.shares = Shares()
            for entry in self.entries.values():
                if entry.sender is not None:
                    self.shares.add(entry.sender, entry.packed, entry.cost)
        return self.shares


class LocalStorage:
    """Values and dictionaries by key.

    ``max_bytes`` bounds the memory of all entries, ``max_entries`` their number. ``retention`` is the longest
    time in seconds that an entry is kept. One key holds at most ``max_record_bytes`` in
    ``max_record_entries``.

    ``sender`` of an entry is the peer that sent it, None for this node, whose entries are not counted. One sender
    has at most ``max_sender_bytes``. When all is full, or the dictionary of one key, a newcomer takes the place of
    what the sender with most bytes there has held longest, or is refused if its own sender has as much. With
    ``evict`` (a cache) it takes the place of what expires first in all.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_entries: int = defaults.DHT_STORAGE_ENTRIES,
        max_sender_bytes: int | None = None,
        evict: bool = False,
        retention: float = defaults.DHT_RETENTION_SECONDS,
        max_record_bytes: int = defaults.DHT_MAX_RECORD_BYTES,
        max_record_entries: int = defaults.DHT_MAX_RECORD_ENTRIES,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.max_sender_bytes = max_sender_bytes or max_bytes // defaults.DHT_SENDER_SHARE
        self.used_bytes = 0
        self._evict = evict
        self._retention = retention
        self._max_record_bytes = max_record_bytes
        self._max_record_entries = max_record_entries
        self._rows: dict[DhtId, _Row] = {}
        self._shares: Shares[tuple[DhtId, bytes]] = Shares()
        self._entries = 0
        self._serials = itertools.count()
        self._heap: list[tuple[float, int, DhtId, bytes]] = []  # (dropped after, serial, key, packed subkey)

    def __len__(self) -> int:
        """Keys held, those included that expired since the last call that was given the time."""
        return len(self._rows)

    def store(
        self, key: DhtId, value: bytes, expiration: float, *, now: float, sender: PeerId | None = None
    ) -> bool:
        """Keep a regular value. True iff it was accepted.

        Accepted iff it has not expired and whatever the key holds, of either kind, expires strictly earlier.
        """
        self.drop_expired(now)
        row = self._rows.get(key)
        if not expiration >= now or (row is not None and row.latest_expiration() >= expiration):
            return False
        return self._put(key, _Entry(_WHOLE, None, value, expiration, sender), now, replaces_row=True)

    def store_subkey(
        self,
        key: DhtId,
        subkey: Hashable,
        value: bytes,
        expiration: float,
        *,
        now: float,
        sender: PeerId | None = None,
    ) -> bool:
        """Keep one entry of a dictionary. True iff it was accepted.

        Accepted iff it has not expired and the entry of that subkey, or the regular value that the key holds
        and that then gives way, expires strictly earlier.
        """
        self.drop_expired(now)
        if not expiration >= now:
            return False
        row = self._rows.get(key)
        entry = _Entry(pack(subkey), subkey, value, expiration, sender)
        if row is None:
            return self._put(key, entry, now, replaces_row=True)
        held = row.entries.get(entry.packed if row.is_dictionary else _WHOLE)
        if held is not None and held.expiration >= expiration:
            return False
        return self._put(key, entry, now, replaces_row=not row.is_dictionary)

    def store_record(self, key: DhtId, record: Record, *, now: float, sender: PeerId | None = None) -> bool:
        """Keep a whole record. True iff all of it was accepted.

        Each entry of a dictionary is offered by itself. Stock stops at the first refusal, so that two
        replicas that differ never merge; the answer is the same.
        """
        if isinstance(record, Regular):
            return self.store(key, record.value, record.expiration, now=now, sender=sender)
        accepted = [
            self.store_subkey(key, subkey, value, expiration, now=now, sender=sender)
            for subkey, value, expiration in record.entries
        ]
        return all(accepted)

    def get(self, key: DhtId, *, now: float) -> Record | None:
        """What the key holds and has not expired."""
        self.drop_expired(now)
        row = self._rows.get(key)
        if row is None:
            return None
        if not row.is_dictionary:
            entry = row.entries[_WHOLE]
            return Regular(entry.value, entry.expiration)
        return dictionary([(e.subkey, e.value, e.expiration) for e in row.entries.values()])

    def keys(self, *, now: float) -> Iterator[DhtId]:
        """The keys held now: a snapshot, so that the caller may store or wait while iterating."""
        self.drop_expired(now)
        return iter(list(self._rows))

    def drop_expired(self, now: float) -> None:
        """Forget what expired before ``now``. All other methods do so first."""
        while self._heap and self._heap[0][0] < now:
            self._pop_earliest()

    def _put(self, key: DhtId, entry: _Entry, now: float, *, replaces_row: bool) -> bool:
        """Write one entry if there is room for it; ``replaces_row`` drops all that the key held before."""
        if entry.size > self._max_record_bytes:
            return False
        if not replaces_row and not self._make_room_in_row(key, entry):
            return False
        if not self._make_room(key, entry, replaces_row=replaces_row):
            self._drop_if_empty(key)
            return False
        if replaces_row:
            self._drop_row(key)
        else:
            self._drop_entry(key, entry.packed)
        row = self._rows.setdefault(key, _Row(is_dictionary=entry.packed != _WHOLE))
        entry.serial = next(self._serials)
        row.add(entry)
        self.used_bytes += entry.cost
        self._entries += 1
        if entry.sender is not None:
            self._shares.add(entry.sender, (key, entry.packed), entry.cost)
        kept_until = min(entry.expiration, now + self._retention)
        heapq.heappush(self._heap, (kept_until, entry.serial, key, entry.packed))
        self._shed_ghosts()
        return True

    def _make_room_in_row(self, key: DhtId, entry: _Entry) -> bool:
        """The same for the bounds of one dictionary, so that nobody fills it with subkeys that mean nothing."""
        row = self._rows[key]
        while True:
            former = row.entries.get(entry.packed)
            kept_size = row.value_bytes - (0 if former is None else former.size)
            kept_entries = len(row.entries) - (former is not None)
            if kept_size + entry.size <= self._max_record_bytes and kept_entries < self._max_record_entries:
                return True
            shares = row.counted()
            heaviest = shares.heaviest()
            if entry.sender is None or heaviest is None:
                return False
            if shares.used(heaviest[0]) <= shares.used(entry.sender) + entry.cost:
                return False
            self._drop_entry(key, heaviest[1])

    def _make_room(self, key: DhtId, entry: _Entry, *, replaces_row: bool) -> bool:
        """Drop entries until ``entry`` fits beside what it does not replace. False if it may not have the room."""
        if entry.cost > self.max_bytes:
            return False
        while True:
            replaced = self._replaced(key, entry, replaces_row=replaces_row)
            if entry.sender is not None:
                own = sum(held.cost for held in replaced if held.sender == entry.sender)
                used = self._shares.used(entry.sender) - own + entry.cost
                if used > self.max_sender_bytes:
                    return False
            freed = sum(held.cost for held in replaced)
            full = self.used_bytes - freed + entry.cost > self.max_bytes
            if not full and self._entries - len(replaced) < self.max_entries:
                return True
            if self._evict:
                self._pop_earliest()
                continue
            heaviest = self._shares.heaviest()
            if heaviest is None or (entry.sender is not None and self._shares.used(heaviest[0]) <= used):
                return False
            self._drop_entry(*heaviest[1])
            self._drop_if_empty(heaviest[1][0])

    def _replaced(self, key: DhtId, entry: _Entry, *, replaces_row: bool) -> list[_Entry]:
        """What ``entry`` takes the place of."""
        row = self._rows.get(key)
        if row is None:
            return []
        if replaces_row:
            return list(row.entries.values())
        former = row.entries.get(entry.packed)
        return [] if former is None else [former]

    def _drop_entry(self, key: DhtId, packed: bytes) -> None:
        """Forget one entry if it is there. Its row stays, to be filled again or dropped by the caller."""
        row = self._rows.get(key)
        entry = None if row is None else row.pop(packed)
        if entry is not None:
            self._release(key, entry)

    def _drop_if_empty(self, key: DhtId) -> None:
        row = self._rows.get(key)
        if row is not None and not row.entries:
            del self._rows[key]

    def _drop_row(self, key: DhtId) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            for entry in row.entries.values():
                self._release(key, entry)

    def _release(self, key: DhtId, entry: _Entry) -> None:
        self.used_bytes -= entry.cost
        self._entries -= 1
        if entry.sender is not None:
            self._shares.remove(entry.sender, (key, entry.packed), entry.cost)

    def _pop_earliest(self) -> None:
        _, serial, key, packed = heapq.heappop(self._heap)
        row = self._rows.get(key)
        entry = None if row is None else row.entries.get(packed)
        if row is None or entry is None or entry.serial != serial:
            return  # a ghost: the entry was replaced since
        self._drop_entry(key, packed)
        self._drop_if_empty(key)

    def _shed_ghosts(self) -> None:
        """Rebuild the heap when most of it is replaced entries: they would stay until they expire."""
        if len(self._heap) > 2 * self._entries + 64:
            self._heap = [row for row in self._heap if self._is_current(row)]
            heapq.heapify(self._heap)

    def _is_current(self, place: tuple[float, int, DhtId, bytes]) -> bool:
        _, serial, key, packed = place
        row = self._rows.get(key)
        entry = None if row is None else row.entries.get(packed)
        return entry is not None and entry.serial == serial
