"""Reading records: from this node, from its cache or from the network, and what is cached in passing.

Source of the policy: hivemind 1.1.12, ``dht/node.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.messages import FindAnswer
from kwaainet_bridge.hivemind.dht.refresh import RefreshQueue
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.values import Record, Regular, expiration_of, merge

TakeIn = Callable[[Contact, DhtId, FindAnswer], bool]
"""Sees an answer for one key and says whether the key needs no more answers."""

Search = Callable[[Iterable[DhtId], TakeIn], Awaitable[Mapping[DhtId, list[Contact]]]]
"""Searches for keys; returns the live nodes nearest to each, nearest first."""


@dataclass(eq=False, slots=True)
class _Search:
    """A search for one key that others may wait for. ``complete`` unless it was cancelled."""

    latest: bool
    record: Record | None = None
    complete: bool = False
    ended: trio.Event = field(default_factory=trio.Event)


class Reader:
    """Reads records for one node.

    Calls that ask for the same key at the same time share one search. What they find is cached here, and through
    ``pass_on`` at the nearest node that lacks it. A cached record that is read is fetched again shortly before
    it expires.
    """

    def __init__(
        self,
        storage: LocalStorage,
        cache: LocalStorage,
        search: Search,
        *,
        pass_on: Callable[[Contact, DhtId, Record], None],
        clock: Callable[[], float],
    ) -> None:
        self._storage = storage
        self._cache = cache
        self._search = search
        self._pass_on = pass_on
        self._clock = clock
        self._running: dict[DhtId, _Search] = {}
        self._refresh = RefreshQueue()
        self._refresh_changed = trio.Event()

    async def read(self, keys: Iterable[DhtId], *, latest: bool) -> dict[DhtId, Record]:
        """What is found for ``keys``: with ``latest`` the merger of what all near nodes hold, else the first find.

        Keys that nobody holds are left out. Cancelled: others who wait for the same keys search themselves.
        """
        found: dict[DhtId, Record] = {}
        missing = dict.fromkeys(keys)
        if not latest:
            for key in missing:
                record = self._local(key)
                if record is not None:
                    found[key] = record
            missing = {key: None for key in missing if key not in found}
        while missing:
            shared = {key: self._running[key] for key in missing if self._shares(key, latest=latest)}
            own = [key for key in missing if key not in shared]
            if own:
                found |= await self._read_anew(own, latest=latest)
            for key, search in shared.items():
                await search.ended.wait()
                if search.record is not None:
                    found[key] = search.record
            missing = {key: None for key, search in shared.items() if not search.complete}
        return found

    def _local(self, key: DhtId) -> Record | None:
        """What this node holds. A cached record in use is due for a refresh before it expires."""
        now = self._clock()
        cached = self._cache.get(key, now=now)
        stored = self._storage.get(key, now=now)
        if cached is None:
            return stored
        self._schedule(key, expiration_of(cached) - defaults.DHT_CACHE_REFRESH_SECONDS)
        return merge(stored, cached)

    def _shares(self, key: DhtId, *, latest: bool) -> bool:
        search = self._running.get(key)
        return search is not None and (search.latest or not latest)

    async def _read_anew(
        self, keys: list[DhtId], *, latest: bool, from_cache: bool = True
    ) -> dict[DhtId, Record]:
        """Search for keys that no other call searches for, and cache what is found."""
        best: dict[DhtId, Record] = {}
        for key in keys:
            sources = (self._storage, self._cache) if from_cache else (self._storage,)
            for source in sources:
                record = source.get(key, now=self._clock())
                if record is not None:
                    best[key] = merge(best.get(key), record)
        answers: dict[DhtId, dict[DhtId, float]] = {
            key: {} for key in keys
        }  # by node, when its record expires

        def take_in(contact: Contact, key: DhtId, answer: FindAnswer) -> bool:
            if answer.record is not None:
                best[key] = merge(best.get(key), answer.record)
                answers[key][contact.node_id] = expiration_of(answer.record)
            return not latest and key in best

        searches = {key: _Search(latest) for key in keys}
        self._running |= searches
        try:
            nearest = await self._search(keys, take_in)
            for key, search in searches.items():
                search.record = best.get(key)
                search.complete = True
        finally:
            for key, search in searches.items():
                search.ended.set()
                if self._running.get(key) is search:
                    del self._running[key]
        for key, record in best.items():
            self._cache.store_record(key, record, now=self._clock())
            first = nearest[key][0] if nearest[key] else None
            if first is not None and answers[key].get(first.node_id, 0.0) < expiration_of(record):
                self._pass_on(first, key, record)
        return best

    # --- the cache ----------------------------------------------------------------------------------------

    def stored(self, key: DhtId, record: Record, *, accepted: bool) -> None:
        """Take note of the outcome of a store, so that reads that follow see it.

        Reads that are under way may have missed it and are not waited for any more. A part of a dictionary goes
        into the cache only if the cache holds others, and the whole is then fetched anew; so is a record
        that was refused because somebody holds a later one than the cache does.
        """
        self._running.pop(key, None)
        now = self._clock()
        cached = self._cache.get(key, now=now)
        is_dictionary = not isinstance(record, Regular)
        if accepted and (cached is not None or not is_dictionary):
            self._cache.store_record(key, record, now=now)
        if cached is None:
            return
        outdated = is_dictionary if accepted else expiration_of(cached) <= expiration_of(record)
        if outdated:
            self._schedule(key, now)

    def _schedule(self, key: DhtId, at: float) -> None:
        self._refresh.schedule(key, at)
        self._refresh_changed.set()

    async def keep_fresh(self) -> None:
        """Read cached records again when they are due, until cancelled."""
        while True:
            due = self._refresh.take_due(self._clock(), defaults.DHT_KEYS_PER_QUERY)
            if due:
                own = [key for key in due if not self._shares(key, latest=True)]
                await self._read_anew(own, latest=True, from_cache=False)
                continue
            self._refresh_changed = trio.Event()
            with trio.move_on_after(max(0.0, self._refresh.next_time() - self._clock())):
                await self._refresh_changed.wait()
