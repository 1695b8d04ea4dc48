"""Each rule of Hivemind's DHT with a stock node on the other side, both ways round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from child_processes import Driver
from dht_pairs import FAR, Node, beside, live, our_node, until
from pydantic import BaseModel
from stock_swarm import START_SECONDS, StockEnvironment

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import DhtId, Item, SchemaValidator
from kwaainet_bridge.hivemind.dht.messages import FIND, STORE, StoreItem
from kwaainet_bridge.hivemind.dht.values import Record, Regular, expiration_of
from kwaainet_bridge.rpc.server import CallContext
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import dht_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId

KEY = "key"


@pytest.fixture(scope="module")
def driver(stock: StockEnvironment) -> Iterator[Driver]:
    with stock.script("dht_peer.py") as driver:
        driver.event("ready", within=START_SECONDS)
        yield driver


@pytest.fixture
def stock_nodes(driver: Driver) -> Iterator[Driver]:
    yield driver
    driver.ask("shutdown")


async def stored_by(stock_nodes: Driver, node: dict[str, Any], *items: dict[str, Any]) -> list[bool]:
    stored: list[bool] = await stock_nodes.aask("store", node=node["node"], items=list(items))
    return stored


async def read_by(stock_nodes: Driver, node: dict[str, Any], *, latest: bool) -> Any:
    return (await stock_nodes.aask("get", node=node["node"], keys=[KEY], latest=latest))[KEY]


async def held_by(stock_nodes: Driver, node: dict[str, Any]) -> dict[str, float | None]:
    held: dict[str, float | None] = await stock_nodes.aask("holds", node=node["node"], key=KEY)
    return held


def cached(node: Node) -> Record | None:
    return node.dht._cache.get(DhtId.of(KEY), now=time.time())


def stored(node: Node) -> Record | None:
    return node.dht._storage.get(DhtId.of(KEY), now=time.time())


# --- which record wins ------------------------------------------------------------------------------------


async def test_of_two_records_that_expire_at_once_the_first_stays_on_both_sides(stock_nodes: Driver) -> None:
    async with our_node() as ours:
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        at = time.time() + 300
        assert len((await ours.dht.store(KEY, "ours", at)).accepted) == 2
        assert await stored_by(stock_nodes, theirs, {"key": KEY, "value": "theirs", "expiration": at}) == [
            False
        ]
        assert (await ours.dht.get(KEY)).value == "ours"
        assert await read_by(stock_nodes, theirs, latest=True) == {"value": "ours", "expiration": at}
        # a subkey does not take the place of a value that expires at the same time either
        assert len((await ours.dht.store(KEY, 1, at, subkey="sub")).refused) == 2

        item = {"key": "dictionary", "subkey": "sub", "value": "theirs", "expiration": at}
        assert await stored_by(stock_nodes, theirs, item) == [True]
        assert len((await ours.dht.store("dictionary", "ours", at, subkey="sub")).refused) == 2
        assert len((await ours.dht.store("dictionary", "ours", at, subkey="other")).accepted) == 2
        assert len((await ours.dht.store("dictionary", "ours", at)).refused) == 2
        read = (await ours.dht.get("dictionary")).value
        assert {subkey: tuple(entry) for subkey, entry in read.items()} == {
            "sub": ("theirs", at),
            "other": ("ours", at),
        }


async def test_latest_merges_dictionaries_whose_parts_lie_on_nodes_of_both_kinds(stock_nodes: Driver) -> None:
    async with our_node() as ours, our_node(client_mode=True) as our_reader:
        first = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        second = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        await our_reader.join(ours.host.addresses())
        at, key = time.time() + 300, DhtId.of(KEY)
        parts = {"first": (first, at), "second": (second, at + 1)}
        for subkey, (holder, expiration) in parts.items():
            items = [StoreItem.of(key, name, pack(subkey), expiration) for name in (subkey, "both")]
            assert await ours.dht._remote.store(PeerId.parse(holder["peer"]), items) == [True, True]
        ours.dht._storage.store_subkey(key, "third", pack("third"), at, now=time.time())
        everything = {
            "first": ("first", at),
            "second": ("second", at + 1),
            "both": ("second", at + 1),
            "third": ("third", at),
        }
        read = (await our_reader.dht.get(KEY)).value
        assert {subkey: tuple(entry) for subkey, entry in read.items()} == everything
        their_reader = await stock_nodes.aask("start", initial_peers=first["addresses"], client_mode=True)
        found = await read_by(stock_nodes, their_reader, latest=True)
        assert {
            name: (entry["value"], entry["expiration"]) for name, entry in found["subkeys"].items()
        } == everything


# --- caching ----------------------------------------------------------------------------------------------


async def test_we_cache_what_we_store_at_a_stock_node(stock_nodes: Driver) -> None:
    async with our_node(node_id=beside(KEY, FAR), replicas=1) as ours:
        theirs = await stock_nodes.aask(
            "start", initial_peers=ours.host.addresses(), node_id=str(beside(KEY, 0))
        )
        at = time.time() + 300
        assert [str(peer) for peer in (await ours.dht.store(KEY, 1, at)).accepted] == [theirs["peer"]]
        assert await held_by(stock_nodes, theirs) == {"storage": at, "cache": None}
        assert stored(ours) is None
        await stock_nodes.aask("kill", node=theirs["node"])
        assert (await ours.dht.get(KEY, latest=False)).value == 1


async def test_a_stock_node_caches_what_it_stores_at_ours(stock_nodes: Driver) -> None:
    async with trio.open_nursery() as nursery:
        ours = await nursery.start(live, {"node_id": beside(KEY, 0)})
        theirs = await stock_nodes.aask(
            "start",
            initial_peers=ours.host.addresses(),
            node_id=str(beside(KEY, FAR)),
            options={"num_replicas": 1},
        )
        at = time.time() + 300
        assert await stored_by(stock_nodes, theirs, {"key": KEY, "value": 1, "expiration": at}) == [True]
        assert await held_by(stock_nodes, theirs) == {"storage": None, "cache": at}
        assert stored(ours) == Regular(pack(1), at)
        ours.doomed.set()
        assert await read_by(stock_nodes, theirs, latest=False) == {"value": 1, "expiration": at}


async def test_what_we_read_is_cached_here_and_at_the_nearest_stock_node(stock_nodes: Driver) -> None:
    async with our_node(node_id=beside(KEY, FAR)) as reader:
        addresses = reader.host.addresses()
        nearest = await stock_nodes.aask("start", initial_peers=addresses, node_id=str(beside(KEY, 0)))
        holder = await stock_nodes.aask("start", initial_peers=addresses, node_id=str(beside(KEY, 1 << 100)))
        at = time.time() + 300
        item = StoreItem.of(DhtId.of(KEY), None, pack(1), at)
        assert await reader.dht._remote.store(PeerId.parse(holder["peer"]), [item]) == [True]
        assert (await reader.dht.get(KEY)).value == 1
        await until(lambda: held_by(stock_nodes, nearest), lambda held: held["cache"] == at)
        assert await held_by(stock_nodes, nearest) == {"storage": None, "cache": at}
        assert cached(reader) == Regular(pack(1), at)
        for node in (nearest, holder):
            await stock_nodes.aask("kill", node=node["node"])
        assert (await reader.dht.get(KEY, latest=False)).value == 1


async def test_what_a_stock_node_reads_is_cached_there_and_at_the_nearest_of_ours(
    stock_nodes: Driver,
) -> None:
    async with trio.open_nursery() as nursery:
        nearest = await nursery.start(live, {"node_id": beside(KEY, 0)})
        holder = await nursery.start(live, {"node_id": beside(KEY, 1 << 100)})
        await holder.join(nearest.host.addresses())
        reader = await stock_nodes.aask(
            "start", initial_peers=nearest.host.addresses(), node_id=str(beside(KEY, FAR))
        )
        at = time.time() + 300
        holder.dht._storage.store(DhtId.of(KEY), pack(1), at, now=time.time())
        assert await read_by(stock_nodes, reader, latest=True) == {"value": 1, "expiration": at}

        async def nearest_cache() -> Record | None:
            await trio.lowlevel.checkpoint()
            return cached(nearest)

        assert await until(nearest_cache, lambda record: record is not None) == Regular(pack(1), at)
        assert stored(nearest) is None
        assert await held_by(stock_nodes, reader) == {"storage": None, "cache": at}
        nearest.doomed.set()
        holder.doomed.set()
        assert await read_by(stock_nodes, reader, latest=False) == {"value": 1, "expiration": at}


REFRESHED = defaults.DHT_CACHE_REFRESH_SECONDS + 2
"""Lifetime of a record that is to be refreshed soon."""


async def test_we_fetch_a_record_in_use_again_before_it_expires_at_a_stock_node(stock_nodes: Driver) -> None:
    async with our_node(node_id=beside(KEY, FAR)) as ours:
        theirs = await stock_nodes.aask(
            "start",
            initial_peers=ours.host.addresses(),
            node_id=str(beside(KEY, 0)),
            options={"num_replicas": 1},
        )
        at = time.time() + REFRESHED
        assert await stored_by(stock_nodes, theirs, {"key": KEY, "value": 1, "expiration": at}) == [True]
        for _ in range(2):  # the second time from the cache
            assert (await ours.dht.get(KEY, latest=False)).value == 1
        later = {"key": KEY, "value": 2, "expiration": at + 100}
        assert await stored_by(stock_nodes, theirs, later) == [True]

        async def cache() -> float:
            await trio.lowlevel.checkpoint()
            record = cached(ours)
            return -math.inf if record is None else expiration_of(record)

        await until(cache, lambda expiration: expiration == at + 100)
        assert time.time() < at


async def test_a_stock_node_fetches_a_record_in_use_again_before_it_expires_at_ours(
    stock_nodes: Driver,
) -> None:
    async with our_node(node_id=beside(KEY, 0), replicas=1) as ours:
        theirs = await stock_nodes.aask(
            "start", initial_peers=ours.host.addresses(), node_id=str(beside(KEY, FAR))
        )
        at = time.time() + REFRESHED
        assert (await ours.dht.store(KEY, 1, at)).ok
        for _ in range(2):
            assert (await read_by(stock_nodes, theirs, latest=False))["value"] == 1
        assert (await ours.dht.store(KEY, 2, at + 100)).ok
        await until(lambda: held_by(stock_nodes, theirs), lambda held: held["cache"] == at + 100)
        assert time.time() < at


# --- nodes that stop answering ------------------------------------------------------------------------------


async def test_a_stock_node_that_stops_answering_is_left_alone_and_taken_back(stock_nodes: Driver) -> None:
    async with our_node() as ours, our_node() as friend:
        theirs = await stock_nodes.aask("start", initial_peers=friend.host.addresses())
        await ours.join(friend.host.addresses())
        assert {str(contact.peer) for contact in ours.dht.neighbours()} == {theirs["peer"], friend.peer}
        peer = PeerId.parse(theirs["peer"])

        async def asked() -> set[str]:
            ours.client.calls.clear()
            assert await ours.dht.get("nothing") is None
            return {peer for peer, method in ours.client.calls if method is FIND}

        await stock_nodes.aask("freeze", node=theirs["node"])
        assert await asked() == {theirs["peer"], friend.peer}
        assert peer not in {contact.peer for contact in ours.dht.neighbours()}
        assert await asked() == {friend.peer}  # who names the other
        await stock_nodes.aask("thaw", node=theirs["node"])
        assert await ours.dht.ping(peer) < defaults.DHT_CALL_SECONDS
        assert await asked() == {theirs["peer"], friend.peer}


async def test_stock_leaves_our_node_alone_that_stops_answering_and_takes_it_back(
    stock_nodes: Driver,
) -> None:
    async with our_node() as ours, our_node() as friend:
        await ours.join(friend.host.addresses())
        theirs = await stock_nodes.aask(
            "start", initial_peers=friend.host.addresses(), options={"blacklist_time": 2.0}
        )
        asked = 0
        silent = True

        async def find(request: pb.FindRequest, context: CallContext) -> pb.FindResponse:
            nonlocal asked
            asked += 1
            if silent:
                await trio.sleep_forever()
            return await ours.dht._service.find(request, context)

        ours.server.unmount(FIND)
        ours.server.mount(FIND, find)

        async def read() -> int:
            assert await read_by(stock_nodes, theirs, latest=True) is None
            return asked

        assert await read() == 1
        assert await stock_nodes.aask("banned", node=theirs["node"]) == [ours.peer]
        assert await read() == 1
        silent = False
        await until(read, lambda count: count > 1)
        assert await stock_nodes.aask("banned", node=theirs["node"]) == []


# --- schema -----------------------------------------------------------------------------------------------


class Run(BaseModel):
    """SCHEMA of ``stock/dht_peer.py``, for pydantic 2."""

    title: str
    steps: dict[str, int]


async def test_a_schema_holds_on_both_sides(stock_nodes: Driver) -> None:
    validator = SchemaValidator({"run": Run})
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(our_node(validator=validator))
        vandal = await stack.enter_async_context(our_node(client_mode=True))
        lenient = await stack.enter_async_context(our_node())
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses(), schema=True)
        their_vandal = await stock_nodes.aask("start", initial_peers=ours.host.addresses(), client_mode=True)
        await vandal.join([*ours.host.addresses(), theirs["addresses"][0]])

        at = time.time() + 300
        assert len((await ours.dht.store("run_title", "first", at)).accepted) == 2
        assert len((await ours.dht.store("run_steps", 1, at, subkey="ours")).accepted) == 2
        assert len((await ours.dht.store("free", {"any": b"thing"}, at)).accepted) == 2
        item = {"key": "run_steps", "subkey": "stock", "value": 2, "ttl": 300}
        assert await stored_by(stock_nodes, theirs, item) == [True]

        wrong: list[tuple[str, Any, str | None]] = [
            ("run_title", 5, None),
            ("run_title", "first", "sub"),
            ("run_title", {"a": "map"}, None),
            ("run_steps", "many", "ours"),
            ("run_steps", 2.0, "ours"),
            ("run_steps", 3, None),
        ]
        for key, value, subkey in wrong:
            with pytest.raises(ValueError, match="refuses"):
                await ours.dht.store(key, value, at + 1, subkey=subkey)
            result = await vandal.dht.store(key, value, at + 1, subkey=subkey)
            assert {str(peer) for peer in result.refused} == {ours.peer, theirs["peer"]}, (key, value)
            item = {"key": key, "value": value, "subkey": subkey, "expiration": at + 1}
            assert await stored_by(stock_nodes, their_vandal, item) == [False], (key, value)

        # what somebody holds who does not check is not believed by those who do
        await lenient.join([*ours.host.addresses(), theirs["addresses"][0]])
        lenient.dht._storage.store(DhtId.of("run_title"), pack(5), at + 50, now=time.time())
        assert (await ours.dht.get("run_title")).value == "first"
        keys = ["run_title", "run_steps", "free"]
        found = await stock_nodes.aask("get", node=theirs["node"], keys=keys[:2])
        assert found["run_title"]["value"] == "first"
        assert {k: e["value"] for k, e in found["run_steps"]["subkeys"].items()} == {"ours": 1, "stock": 2}
        read = (await ours.dht.get("run_steps")).value
        assert {subkey: entry.value for subkey, entry in read.items()} == {"ours": 1, "stock": 2}


# --- newcomers --------------------------------------------------------------------------------------------


async def test_a_stock_newcomer_is_handed_the_records_that_are_nearest_to_it(stock_nodes: Driver) -> None:
    async with trio.open_nursery() as nursery:
        ours = await nursery.start(live, {"node_id": beside(KEY, 1 << 10)})
        other = await stock_nodes.aask(
            "start", initial_peers=ours.host.addresses(), node_id=str(beside(KEY, FAR))
        )
        at = time.time() + 300
        assert (await ours.dht.store(KEY, 1, at, subkey="sub")).ok
        newcomer = await stock_nodes.aask(
            "start", initial_peers=other["addresses"], node_id=str(beside(KEY, 1))
        )
        await until(lambda: held_by(stock_nodes, newcomer), lambda held: held["storage"] == at)
        ours.doomed.set()
        await stock_nodes.aask("kill", node=other["node"])
        found = await read_by(stock_nodes, newcomer, latest=True)
        assert found["subkeys"] == {"sub": {"value": 1, "expiration": at}}


async def test_our_newcomer_is_handed_the_records_of_stock_nodes_that_are_nearest_to_it(
    stock_nodes: Driver,
) -> None:
    theirs = await stock_nodes.aask("start", initial_peers=[], node_id=str(beside(KEY, 1 << 10)))
    other = await stock_nodes.aask("start", initial_peers=theirs["addresses"], node_id=str(beside(KEY, FAR)))
    at = time.time() + 300
    item = {"key": KEY, "value": 1, "subkey": "sub", "expiration": at}
    assert await stored_by(stock_nodes, theirs, item) == [True]
    async with our_node(node_id=beside(KEY, 1)) as newcomer:
        await newcomer.join(other["addresses"][:1])

        async def storage() -> Record | None:
            await trio.lowlevel.checkpoint()
            return stored(newcomer)

        await until(storage, lambda record: record is not None)
        for node in (theirs, other):
            await stock_nodes.aask("kill", node=node["node"])
        assert (await newcomer.dht.get(KEY)).value == {"sub": (1, at)}


# --- many at once -----------------------------------------------------------------------------------------


async def test_our_reads_of_one_key_at_a_stock_node_share_a_search(stock_nodes: Driver) -> None:
    async with our_node(node_id=beside(KEY, FAR)) as ours:
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        assert await stored_by(stock_nodes, theirs, {"key": KEY, "value": 1, "ttl": 300}) == [True]
        ours.client.calls.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ours.dht.get, KEY)
        assert [peer for peer, method in ours.client.calls if method is FIND] == [theirs["peer"]]


async def test_reads_of_a_stock_node_share_what_ours_answers_to_one_of_them(stock_nodes: Driver) -> None:
    """Stock asks for each read, and ends all when one of them has its answer."""
    async with our_node(node_id=beside(KEY, 0), replicas=1) as ours:
        theirs = await stock_nodes.aask(
            "start", initial_peers=ours.host.addresses(), options={"wait_timeout": 60.0}
        )
        assert (await ours.dht.store(KEY, 1, time.time() + 300)).ok
        asked, answered = trio.Event(), trio.Event()

        async def find(request: pb.FindRequest, context: CallContext) -> pb.FindResponse:
            if not asked.is_set():
                asked.set()
                await answered.wait()
            return await ours.dht._service.find(request, context)

        ours.server.unmount(FIND)
        ours.server.mount(FIND, find)

        async def read() -> None:
            assert (await read_by(stock_nodes, theirs, latest=False))["value"] == 1

        with trio.fail_after(20):
            async with trio.open_nursery() as reads:
                reads.start_soon(read)
                await asked.wait()
                assert await stock_nodes.aask("waiting", node=theirs["node"], key=KEY) == 1
                reads.start_soon(read)
        answered.set()


async def test_batches_travel_together_both_ways(stock_nodes: Driver) -> None:
    async with our_node() as ours:
        theirs = await stock_nodes.aask("start", initial_peers=ours.host.addresses())
        count, at = 60, time.time() + 300
        items = [Item(f"ours {n}", n, at, subkey="sub" if n % 3 == 0 else None) for n in range(count)]
        ours.client.calls.clear()
        assert all(len(result.accepted) == 2 for result in await ours.dht.store_many(items))
        assert sum(method is STORE for _, method in ours.client.calls) == 1
        found = await stock_nodes.aask("get", node=theirs["node"], keys=[item.key for item in items])
        for item in items:
            entry = found[item.key]["subkeys"]["sub"] if item.subkey else found[item.key]
            assert entry == {"value": item.value, "expiration": at}

        their_items = [
            {"key": f"theirs {n}", "value": n, "expiration": at, "subkey": "sub" if n % 3 == 0 else None}
            for n in range(count)
        ]
        stored = await stock_nodes.aask("store_many", node=theirs["node"], items=their_items)
        assert stored == [True] * count
        ours.client.calls.clear()
        read = await ours.dht.get_many([item["key"] for item in their_items])
        assert sum(method is FIND for _, method in ours.client.calls) == math.ceil(
            count / defaults.DHT_KEYS_PER_QUERY
        )
        for n in range(count):
            value = read[f"theirs {n}"].value
            assert value == ({"sub": (n, at)} if n % 3 == 0 else n)
