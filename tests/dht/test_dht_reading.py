"""The reading policy over a search that is scripted."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import trio
from dht_nodes import START, clock, peer_id, swarm
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import Contact, DhtId
from kwaainet_bridge.hivemind.dht.messages import FindAnswer
from kwaainet_bridge.hivemind.dht.reading import Reader, TakeIn
from kwaainet_bridge.hivemind.dht.refresh import RefreshQueue
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.values import Record, Regular, dictionary

KEY, OTHER = DhtId(1), DhtId(2)
LATER = START + 1000.0


class Network:
    """Nodes by what they hold; a search asks one after the other, a second each."""

    def __init__(self, *holdings: dict[DhtId, Record]) -> None:
        self.holdings = list(holdings)
        self.searched: list[list[DhtId]] = []
        self.passed_on: list[tuple[int, DhtId, Record]] = []
        self.storage = LocalStorage(max_bytes=1 << 20)
        self.cache = LocalStorage(max_bytes=1 << 20, evict=True)
        self.reader = Reader(
            self.storage,
            self.cache,
            self.search,
            pass_on=lambda contact, key, record: self.passed_on.append((contact.node_id, key, record)),
            clock=clock,
        )

    async def search(self, keys: Iterable[DhtId], take_in: TakeIn) -> dict[DhtId, list[Contact]]:
        self.searched.append(list(keys))
        contacts = [Contact(DhtId(100 + n), peer_id(n)) for n in range(len(self.holdings))]
        nearest: dict[DhtId, list[Contact]] = {key: [] for key in self.searched[-1]}
        for key, found in nearest.items():
            for contact, records in zip(contacts, self.holdings, strict=True):
                await trio.sleep(1)
                found.append(contact)
                if take_in(contact, key, FindAnswer(records.get(key), ())):
                    break
        return nearest


async def test_reads_of_one_key_at_one_time_share_a_search(autojump_clock: MockClock) -> None:
    network = Network({KEY: Regular(b"v", LATER)}, {})
    found: list[dict[DhtId, Record]] = []

    async def read(*keys: DhtId, latest: bool = True) -> None:
        found.append(await network.reader.read(keys, latest=latest))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, KEY)
        await trio.sleep(0.5)
        nursery.start_soon(read, KEY)
        nursery.start_soon(read, KEY, OTHER)
        nursery.start_soon(lambda: read(KEY, latest=False))
    assert found == [{KEY: Regular(b"v", LATER)}] * 4
    assert network.searched == [[KEY], [OTHER]]
    await read(KEY)
    assert network.searched == [[KEY], [OTHER], [KEY]]


async def test_a_search_for_any_find_does_not_serve_who_wants_the_latest(autojump_clock: MockClock) -> None:
    network = Network({KEY: Regular(b"old", LATER)}, {KEY: Regular(b"new", LATER + 1)})
    found: dict[str, dict[DhtId, Record]] = {}

    async def read(name: str, *, latest: bool) -> None:
        found[name] = await network.reader.read([KEY], latest=latest)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: read("any", latest=False))
        await trio.sleep(0.5)
        nursery.start_soon(lambda: read("latest", latest=True))
    assert found == {"any": {KEY: Regular(b"old", LATER)}, "latest": {KEY: Regular(b"new", LATER + 1)}}


async def test_who_waits_for_a_search_that_is_cancelled_searches_itself(autojump_clock: MockClock) -> None:
    network = Network({KEY: Regular(b"v", LATER)})
    async with trio.open_nursery() as nursery:
        cancelled = trio.CancelScope()

        async def first() -> None:
            with cancelled:
                await network.reader.read([KEY], latest=True)

        nursery.start_soon(first)
        await trio.sleep(0.5)
        with trio.fail_after(5):
            async with trio.open_nursery() as others:
                for _ in range(3):
                    others.start_soon(expect, network, {KEY: Regular(b"v", LATER)})
                await trio.sleep(0.1)
                cancelled.cancel()
    assert network.searched == [[KEY], [KEY]]  # the others share the second


async def expect(network: Network, expected: dict[DhtId, Record]) -> None:
    assert await network.reader.read([KEY], latest=True) == expected


async def test_a_read_after_a_store_does_not_wait_for_a_search_from_before(autojump_clock: MockClock) -> None:
    network = Network({})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, network, {})
        await trio.sleep(0.5)
        network.holdings[0][KEY] = Regular(b"new", LATER)
        network.reader.stored(KEY, Regular(b"new", LATER), accepted=True)
        network.holdings[0].clear()
        await expect(network, {KEY: Regular(b"new", LATER)})  # from the cache
        nursery.cancel_scope.cancel()


async def test_the_nearest_node_is_given_what_it_lacks_or_has_in_an_older_version(
    autojump_clock: MockClock,
) -> None:
    old, new = Regular(b"old", LATER), Regular(b"new", LATER + 1)
    for nearest, passed_on in (({}, True), ({KEY: old}, True), ({KEY: new}, False)):
        network = Network(nearest, {KEY: new})
        await expect(network, {KEY: new})
        assert network.passed_on == ([(100, KEY, new)] if passed_on else [])
    network = Network({}, {})
    await expect(network, {})
    assert network.passed_on == []


async def test_a_cached_record_in_use_is_fetched_again_before_it_expires(autojump_clock: MockClock) -> None:
    network = Network({KEY: Regular(b"1", START + 60), OTHER: Regular(b"1", START + 60)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.reader.keep_fresh)
        await network.reader.read([KEY, OTHER], latest=False)
        network.holdings[0] = {KEY: Regular(b"2", START + 120), OTHER: Regular(b"2", START + 120)}
        for _ in range(3):  # OTHER is never read from the cache
            assert await network.reader.read([KEY], latest=False) == {KEY: Regular(b"1", START + 60)}
        await trio.sleep(70)
        assert network.searched == [[KEY, OTHER], [KEY]]
        assert await network.reader.read([KEY], latest=False) == {KEY: Regular(b"2", START + 120)}
        assert network.cache.get(OTHER, now=clock()) is None
        await trio.sleep(1000)
        assert network.searched == [[KEY, OTHER], [KEY], [KEY]]  # nobody reads it any more
        nursery.cancel_scope.cancel()


async def test_a_refused_store_has_the_outdated_cache_fetched_again(autojump_clock: MockClock) -> None:
    network = Network({KEY: Regular(b"theirs", LATER + 10)})
    network.cache.store(KEY, b"cached", LATER, now=clock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.reader.keep_fresh)
        network.reader.stored(KEY, Regular(b"refused", LATER - 1), accepted=False)
        await trio.sleep(5)
        assert network.searched == []  # the cached one is later still
        network.reader.stored(KEY, Regular(b"refused", LATER + 1), accepted=False)
        network.reader.stored(OTHER, Regular(b"refused", LATER + 1), accepted=False)
        await trio.sleep(5)
        assert network.searched == [[KEY]]
        assert network.cache.get(KEY, now=clock()) == Regular(b"theirs", LATER + 10)
        nursery.cancel_scope.cancel()


async def test_a_stored_subkey_completes_the_cache_but_does_not_begin_one(autojump_clock: MockClock) -> None:
    theirs = dictionary([("a", b"1", LATER), ("b", b"2", LATER)])
    network = Network({KEY: theirs})
    ours = dictionary([("c", b"3", LATER + 5)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.reader.keep_fresh)
        network.reader.stored(KEY, ours, accepted=True)
        assert network.cache.get(KEY, now=clock()) is None
        await network.reader.read([KEY], latest=False)
        network.reader.stored(KEY, ours, accepted=True)
        assert set(network.cache.get(KEY, now=clock()).entries) == {*theirs.entries, *ours.entries}
        network.holdings[0] = {KEY: dictionary([("d", b"4", LATER)])}
        await trio.sleep(5)
        assert network.searched == [[KEY], [KEY]]
        subkeys = {subkey for subkey, _, _ in network.cache.get(KEY, now=clock()).entries}
        assert subkeys == {"a", "b", "c", "d"}
        nursery.cancel_scope.cancel()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=300))
def test_the_queue_gives_each_key_once_at_its_earliest_time(wishes: list[tuple[int, int]]) -> None:
    queue = RefreshQueue(max_keys=8)
    earliest: dict[int, int] = {}
    for key, at in wishes:
        if queue.schedule(DhtId(key), at):
            earliest[key] = min(at, earliest.get(key, at))
        else:
            assert len(queue) == 8
    assert queue.next_time() == min(earliest.values(), default=math.inf)
    assert queue.take_due(-1.0, 8) == []
    taken = queue.take_due(25.0, 8)
    assert sorted(taken) == sorted(key for key, at in earliest.items() if at <= 25)
    assert [earliest[key] for key in taken] == sorted(earliest[key] for key in taken)
    assert len(queue) == len(earliest) - len(taken)
    assert len(queue._heap) <= 2 * len(earliest) + 65


async def test_silent_buckets_are_searched_so_that_dead_nodes_leave(autojump_clock: MockClock) -> None:
    async with swarm(30) as nodes:
        node = nodes.nodes[0]
        lost = nodes.nodes[1::4]
        for other in lost:
            nodes.take_down(other)
        known = len(node.neighbours())
        calls = len(nodes.clients[node].called)
        await trio.sleep(defaults.DHT_BUCKET_REFRESH_SECONDS * 2.5)
        assert calls < len(nodes.clients[node].called) < calls + 400
        peers = {contact.peer for contact in node.neighbours()}
        assert known > len(peers) >= 20
        assert not peers & {other.peer_id for other in lost}


async def test_many_silent_buckets_share_the_nodes_that_are_asked(autojump_clock: MockClock) -> None:
    async with swarm(1) as nodes:
        node, rng = nodes.nodes[0], random.Random(3)
        for number in range(2000):
            node._contacts.table.add_or_update(Contact(DhtId.random(rng), peer_id(number)), now=-1.0)
        buckets = len(node._contacts.table.refresh_ids(before=0.0, rng=rng))
        assert buckets > defaults.DHT_KEYS_PER_QUERY
        widths = []
        search = node._search

        async def watched(targets: Any, take_in: Any, *, width: int) -> Any:
            widths.append((len(targets), width))
            return await search(targets, take_in, width=width)

        node._search = watched  # type: ignore[method-assign]
        await trio.sleep(defaults.DHT_BUCKET_REFRESH_SECONDS * 1.5)
        assert widths == [(defaults.DHT_KEYS_PER_QUERY, defaults.DHT_REPLICAS)]
