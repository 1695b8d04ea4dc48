from __future__ import annotations

import math
import random
import time

import pytest
from dht_nodes import peer_id

from kwaainet_bridge.hivemind.dht import DhtId
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.values import Regular, dictionary

KEY, OTHER = DhtId(1), DhtId(2)
NOW = 100.0


@pytest.fixture
def storage() -> LocalStorage:
    return LocalStorage(max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("held", "offered", "accepted"),
    [
        (None, 100.0, True),  # expires now: still valid
        (None, 99.9, False),
        (None, math.nan, False),
        (None, -math.inf, False),
        (None, math.inf, True),
        (200.0, 200.0, False),
        (200.0, 199.0, False),
        (200.0, 200.1, True),
        (200.0, math.nan, False),
    ],
)
def test_acceptance_of_regular_values(
    storage: LocalStorage, held: float | None, offered: float, accepted: bool
) -> None:
    if held is not None:
        assert storage.store(KEY, b"old", held, now=NOW)
    assert storage.store(KEY, b"new", offered, now=NOW) is accepted
    expected = Regular(b"new", offered) if accepted else Regular(b"old", held) if held else None
    assert storage.get(KEY, now=NOW) == expected


@pytest.mark.parametrize(
    ("held", "offered", "accepted"),
    [
        (None, 100.0, True),
        (None, 99.9, False),
        (None, math.nan, False),
        (200.0, 200.0, False),
        (200.0, 150.0, False),
        (200.0, 201.0, True),
    ],
)
def test_acceptance_of_subkeys(
    storage: LocalStorage, held: float | None, offered: float, accepted: bool
) -> None:
    assert storage.store_subkey(KEY, "other", b"x", 300.0, now=NOW)
    if held is not None:
        assert storage.store_subkey(KEY, "sub", b"old", held, now=NOW)
    assert storage.store_subkey(KEY, "sub", b"new", offered, now=NOW) is accepted
    entries = [("other", b"x", 300.0)]
    if accepted:
        entries.append(("sub", b"new", offered))
    elif held is not None:
        entries.append(("sub", b"old", held))
    assert storage.get(KEY, now=NOW) == dictionary(entries)


@pytest.mark.parametrize(("offered", "accepted"), [(199.0, False), (200.0, False), (201.0, True)])
def test_a_subkey_replaces_an_earlier_regular_value(
    storage: LocalStorage, offered: float, accepted: bool
) -> None:
    storage.store(KEY, b"plain", 200.0, now=NOW)
    assert storage.store_subkey(KEY, "sub", b"new", offered, now=NOW) is accepted
    expected = dictionary([("sub", b"new", offered)]) if accepted else Regular(b"plain", 200.0)
    assert storage.get(KEY, now=NOW) == expected


@pytest.mark.parametrize(("offered", "accepted"), [(250.0, False), (300.0, False), (301.0, True)])
def test_a_regular_value_replaces_a_whole_earlier_dictionary(
    storage: LocalStorage, offered: float, accepted: bool
) -> None:
    storage.store_subkey(KEY, "a", b"1", 200.0, now=NOW)
    storage.store_subkey(KEY, "b", b"2", 300.0, now=NOW)
    assert storage.store(KEY, b"plain", offered, now=NOW) is accepted
    kept = dictionary([("a", b"1", 200.0), ("b", b"2", 300.0)])
    assert storage.get(KEY, now=NOW) == (Regular(b"plain", offered) if accepted else kept)


def test_expired_entries_vanish_one_by_one(storage: LocalStorage) -> None:
    storage.store(OTHER, b"plain", 150.0, now=NOW)
    storage.store_subkey(KEY, "a", b"1", 200.0, now=NOW)
    storage.store_subkey(KEY, "b", b"2", 300.0, now=NOW)
    assert storage.get(OTHER, now=150.0) is not None
    assert storage.get(OTHER, now=150.1) is None
    assert storage.get(KEY, now=250.0) == dictionary([("b", b"2", 300.0)])
    assert list(storage.keys(now=300.0)) == [KEY]
    assert list(storage.keys(now=301.0)) == []
    assert storage.used_bytes == 0
    assert len(storage) == 0


def test_an_older_offer_does_not_shorten_the_life_of_what_is_held(storage: LocalStorage) -> None:
    storage.store(KEY, b"new", 300.0, now=NOW)
    assert not storage.store(KEY, b"old", 150.0, now=NOW)
    assert storage.get(KEY, now=200.0) == Regular(b"new", 300.0)


def test_whole_dictionaries_merge_into_what_is_held(storage: LocalStorage) -> None:
    storage.store_subkey(KEY, "a", b"new", 300.0, now=NOW)
    offered = dictionary([("a", b"old", 200.0), ("b", b"2", 250.0)])
    assert not storage.store_record(KEY, offered, now=NOW)  # not all of it
    assert storage.get(KEY, now=NOW) == dictionary([("a", b"new", 300.0), ("b", b"2", 250.0)])
    assert storage.store_record(OTHER, offered, now=NOW)
    assert storage.store_record(OTHER, Regular(b"plain", 400.0), now=NOW)


def test_far_expirations_are_kept_as_they_are_but_not_for_ever() -> None:
    storage = LocalStorage(max_bytes=1 << 20, retention=60.0)
    assert storage.store(KEY, b"v", math.inf, now=NOW)
    assert storage.get(KEY, now=NOW + 60.0) == Regular(b"v", math.inf)
    assert storage.get(KEY, now=NOW + 60.1) is None


def test_a_full_storage_refuses_until_something_expires() -> None:
    storage = LocalStorage(max_bytes=2500)
    assert storage.store(KEY, bytes(900), 200.0, now=NOW)
    assert not storage.store(OTHER, bytes(900), 300.0, now=NOW)
    assert storage.store(KEY, bytes(1500), 210.0, now=NOW)  # replaces the former
    assert not storage.store(KEY, bytes(1900), 220.0, now=NOW)
    assert storage.get(KEY, now=NOW) == Regular(bytes(1500), 210.0)
    assert storage.store(OTHER, bytes(900), 300.0, now=211.0)


def test_a_full_cache_drops_what_expires_first() -> None:
    cache = LocalStorage(max_bytes=2500, evict=True)
    keys = [DhtId(n) for n in range(3)]
    for key, expiration in zip(keys, (300.0, 200.0, 250.0), strict=True):
        assert cache.store(key, bytes(500), expiration, now=NOW)
    assert [cache.get(key, now=NOW) is not None for key in keys] == [True, False, True]
    assert not cache.store(DhtId(9), bytes(2500), 900.0, now=NOW)  # would not fit an empty one
    assert len(cache) == 2


def test_a_cache_may_evict_from_the_dictionary_that_grows() -> None:
    cache = LocalStorage(max_bytes=2000, evict=True)
    for n in range(5):
        assert cache.store_subkey(KEY, n, bytes(200), 200.0 + n, now=NOW)
    assert cache.get(KEY, now=NOW) == dictionary([(n, bytes(200), 200.0 + n) for n in (3, 4)])
    assert cache.used_bytes <= 2000


def test_one_key_holds_a_bounded_dictionary() -> None:
    storage = LocalStorage(max_bytes=1 << 20, max_record_bytes=1000, max_record_entries=3)
    assert not storage.store(OTHER, bytes(1001), 200.0, now=NOW)
    assert storage.store_subkey(KEY, "a", bytes(700), 200.0, now=NOW)
    assert not storage.store_subkey(KEY, "b", bytes(300), 200.0, now=NOW)
    assert storage.store_subkey(KEY, "a", bytes(900), 210.0, now=NOW)  # in place of the former
    assert storage.store_subkey(KEY, "b", b"", 200.0, now=NOW)
    assert storage.store_subkey(KEY, "c", b"", 200.0, now=NOW)
    assert not storage.store_subkey(KEY, "d", b"", 200.0, now=NOW)
    assert storage.store_subkey(KEY, "c", b"", 201.0, now=NOW)
    assert storage.store(KEY, bytes(100), 220.0, now=NOW)  # in place of the whole dictionary


def test_replaced_entries_leave_no_trace(storage: LocalStorage) -> None:
    for n in range(10_000):
        assert storage.store_subkey(KEY, "sub", b"v", NOW + 1e6 + n, now=NOW)
    assert len(storage._heap) < 200
    assert storage.get(KEY, now=NOW) == dictionary([("sub", b"v", NOW + 1e6 + 9999)])


def test_one_sender_has_a_part_of_the_room() -> None:
    storage = LocalStorage(max_bytes=80_000)
    kept = sum(storage.store(DhtId(n), bytes(900), 200.0, now=NOW, sender=peer_id(1)) for n in range(50))
    assert kept * 1500 <= storage.max_sender_bytes == 10_000
    assert kept == 6
    assert storage.store(DhtId(0), bytes(900), 210.0, now=NOW, sender=peer_id(1))  # in place of its own
    assert not storage.store(DhtId(99), bytes(900), 210.0, now=NOW, sender=peer_id(1))
    assert storage.store(DhtId(99), bytes(900), 210.0, now=NOW, sender=peer_id(2))
    assert storage.store(DhtId(1), bytes(900), 220.0, now=NOW, sender=peer_id(2))  # the first pays less now
    assert storage.store(DhtId(98), bytes(900), 220.0, now=NOW, sender=peer_id(1))
    assert all(storage.store(DhtId(100 + n), bytes(900), 220.0, now=NOW) for n in range(20))  # our own
    assert storage.store(DhtId(97), bytes(900), 400.0, now=300.0, sender=peer_id(1))  # all of it has expired


def test_when_all_is_full_the_sender_of_most_makes_room() -> None:
    storage = LocalStorage(max_bytes=80_000)
    flood = [peer_id(n) for n in range(1, 20)]
    for n in range(200):
        storage.store(DhtId(n), bytes(900), math.inf, now=NOW, sender=flood[n % len(flood)])
    assert storage.used_bytes > 78_000
    honest = peer_id(500)
    for n in range(3):  # up to what the others have left
        assert storage.store(DhtId(1000 + n), bytes(400), 200.0, now=NOW, sender=honest)
    assert [storage._shares.used(peer) for peer in flood].count(0) == 0
    assert not storage.store(DhtId(2000), bytes(8000), 200.0, now=NOW, sender=honest)
    for n in range(200, 400):  # those that refill do so at their own expense
        storage.store(DhtId(n), bytes(900), math.inf, now=NOW, sender=flood[n % len(flood)])
    assert all(storage.get(DhtId(1000 + n), now=NOW) is not None for n in range(3))


def test_a_full_dictionary_counts_its_senders_exactly() -> None:
    storage = LocalStorage(max_bytes=1 << 24, max_record_entries=20)
    rng = random.Random(5)
    for n in range(3000):
        sender = rng.choice([None, *map(peer_id, range(6))])
        expiration = NOW + n / 10 + rng.randrange(50)
        storage.store_subkey(
            KEY, rng.randrange(60), bytes(n % 90), expiration, now=NOW + n / 10, sender=sender
        )
        row = storage._rows[KEY]
        if row.shares is not None:
            for peer in map(peer_id, range(6)):
                held = [entry.cost for entry in row.entries.values() if entry.sender == peer]
                assert row.shares.used(peer) == sum(held)
        assert len(row.entries) <= 20
        assert row.value_bytes == sum(entry.size for entry in row.entries.values())
    assert storage._rows[KEY].shares is not None


def test_a_full_dictionary_refuses_another_in_no_more_time_than_it_took_the_first() -> None:
    """4,096 entries for a full row took 16 s when each of them counted what the row holds."""
    storage = LocalStorage(max_bytes=1 << 27)
    records = [
        dictionary([(4096 * sender + n, bytes(200), math.inf) for n in range(4096)]) for sender in range(3)
    ]
    seconds = []
    for sender, record in enumerate(records):
        began = time.thread_time()
        assert storage.store_record(KEY, record, now=NOW, sender=peer_id(sender)) == (sender == 0)
        seconds.append(time.thread_time() - began)
    assert max(seconds[1:]) < 10 * seconds[0]


def test_the_number_of_entries_is_bounded_too() -> None:
    storage = LocalStorage(max_bytes=1 << 20, max_entries=5)
    assert all(storage.store_subkey(KEY, n, b"", 200.0, now=NOW, sender=peer_id(1)) for n in range(5))
    assert not storage.store_subkey(KEY, 5, b"", 200.0, now=NOW, sender=peer_id(1))
    assert storage.store_subkey(KEY, 4, b"", 201.0, now=NOW, sender=peer_id(1))
    assert storage.store(OTHER, b"", 200.0, now=NOW, sender=peer_id(2))  # the first one's oldest goes
    assert storage.get(KEY, now=NOW) == dictionary([(n, b"", 200.0) for n in (1, 2, 3)] + [(4, b"", 201.0)])
    cache = LocalStorage(max_bytes=1 << 20, max_entries=2, evict=True)
    for n in range(4):
        assert cache.store(DhtId(n), b"", 200.0 + n, now=NOW)
    assert [cache.get(DhtId(n), now=NOW) is not None for n in range(4)] == [False, False, True, True]


def test_nobody_fills_the_dictionary_of_a_key() -> None:
    for limit in ({"max_record_entries": 10}, {"max_record_bytes": 10 * 118 + 50}):
        storage = LocalStorage(max_bytes=1 << 20, **limit)
        flood = peer_id(1)
        kept = sum(
            storage.store_subkey(KEY, n, bytes(100), math.inf, now=NOW, sender=flood) for n in range(50)
        )
        assert kept == 10
        for n in range(5):
            assert storage.store_subkey(KEY, f"peer {n}", bytes(100), 200.0, now=NOW, sender=peer_id(2 + n))
        for n in range(50, 90):
            assert not storage.store_subkey(KEY, n, bytes(100), math.inf, now=NOW, sender=flood)
        held = storage.get(KEY, now=NOW)
        assert {f"peer {n}" for n in range(5)} <= {subkey for subkey, _, _ in held.entries}
        assert not storage.store_subkey(KEY, "ours", bytes(100), 200.0, now=NOW)


def test_room_made_in_vain_leaves_no_empty_dictionary() -> None:
    storage = LocalStorage(max_bytes=3000, max_sender_bytes=1000, max_record_entries=1)
    assert storage.store_subkey(KEY, "a", bytes(300), 200.0, now=NOW, sender=peer_id(1))
    assert not storage.store_subkey(KEY, "b", bytes(390), 200.0, now=NOW, sender=peer_id(2))
    assert storage.store_subkey(KEY, "b", bytes(200), 200.0, now=NOW, sender=peer_id(2))
    storage = LocalStorage(max_bytes=3000, max_sender_bytes=1000, max_record_bytes=400)
    assert storage.store_subkey(KEY, "a", bytes(350), 200.0, now=NOW, sender=peer_id(1))
    assert storage.store(OTHER, bytes(300), 200.0, now=NOW, sender=peer_id(2))
    assert not storage.store_subkey(KEY, "b", bytes(200), 200.0, now=NOW, sender=peer_id(2))
    assert storage.get(KEY, now=NOW) in (None, dictionary([("a", bytes(350), 200.0)]))


def test_a_whole_dictionary_may_make_room_for_a_value_in_its_own_place() -> None:
    storage = LocalStorage(max_bytes=1 << 20, max_entries=3)
    assert all(storage.store_subkey(KEY, n, b"", 200.0, now=NOW, sender=peer_id(1)) for n in range(3))
    assert storage.store(KEY, b"v", 300.0, now=NOW, sender=peer_id(2))
    assert storage.get(KEY, now=NOW) == Regular(b"v", 300.0)
    assert len(storage._shares) == 1


def test_the_books_balance_after_random_use() -> None:
    rng = random.Random(0)
    for evict in (False, True):
        storage = LocalStorage(
            max_bytes=30_000,
            max_entries=20,
            max_sender_bytes=12_000,
            evict=evict,
            max_record_entries=5,
            max_record_bytes=2000,
        )
        now = NOW
        for _ in range(3000):
            now += rng.random()
            key, expiration = DhtId(rng.randrange(20)), now + rng.uniform(-1, 60)
            value = bytes(rng.randrange(700))
            sender = rng.choice([None, peer_id(1), peer_id(2), peer_id(3)])
            if rng.random() < 0.3:
                storage.store(key, value, expiration, now=now, sender=sender)
            else:
                storage.store_subkey(key, rng.randrange(6), value, expiration, now=now, sender=sender)
            entries = [entry for row in storage._rows.values() for entry in row.entries.values()]
            assert storage.used_bytes == sum(entry.cost for entry in entries) <= 30_000
            assert storage._entries == len(entries) <= 20
            for peer in (peer_id(1), peer_id(2), peer_id(3)):
                used = sum(entry.cost for entry in entries if entry.sender == peer)
                assert storage._shares.used(peer) == used <= 12_000
            assert len(storage._shares._heap) <= 2 * 3 + 65
            assert all(row.entries for row in storage._rows.values())
            assert all(
                row.value_bytes == sum(entry.size for entry in row.entries.values()) <= 2000
                for row in storage._rows.values()
            )
        assert list(storage.keys(now=now + 100)) == []
        assert storage.used_bytes == 0
