"""Whole nodes on a network in memory."""

from __future__ import annotations

import math
import random

import pytest
import trio
from dht_nodes import START, CountingClient, clock, peer_id, swarm
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ClockSkew, NetworkError, PeerUnreachable, ProtocolNotSupported
from kwaainet_bridge.hivemind.dht import Contact, DhtId, DhtNode, Found, FoundEntry, Item
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.values import dictionary
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.server import RpcServer
from kwaainet_bridge.wire.msgpack import pack

LATER = START + 1000.0


def entry(found: Found | None, subkey: object) -> FoundEntry:
    assert found is not None
    assert found.is_dictionary
    value: FoundEntry = found.value[subkey]
    return value


async def stay_silent(_stream: Stream) -> None:
    await trio.sleep_forever()


async def test_what_any_node_stores_every_node_finds(autojump_clock: MockClock) -> None:
    async with swarm(20) as nodes:
        for number, node in enumerate(nodes.nodes):
            results = await node.store_many(
                [
                    Item(f"value {number}", {"n": number}, LATER + number),
                    Item("shared", number, LATER + number, subkey=f"peer {number}"),
                ]
            )
            assert all(len(result.accepted) == 5 for result in results), results
            assert all(not result.refused and not result.failed for result in results)
        keys = [*(f"value {number}" for number in range(20)), "shared"]
        for node in nodes.nodes:
            found = await node.get_many(keys)
            for number in range(20):
                assert found[f"value {number}"] == Found({"n": number}, LATER + number, is_dictionary=False)
                assert entry(found["shared"], f"peer {number}") == (number, LATER + number)
            assert found["shared"].expiration == LATER + 19


async def test_records_are_on_the_nodes_nearest_to_their_keys(autojump_clock: MockClock) -> None:
    async with swarm(60) as nodes:
        for number in range(20):
            key = f"key {number}"
            result = await nodes.nodes[number].store(key, number, LATER)
            nearest = sorted(nodes.nodes, key=lambda node: node.node_id.distance(DhtId.of(key)))
            assert set(result.accepted) == {node.peer_id for node in nearest[:5]}


async def test_a_swarm_survives_the_loss_of_nodes(autojump_clock: MockClock) -> None:
    async with swarm(40) as nodes:
        items = [Item(f"key {n}", n, LATER) for n in range(40)]
        await nodes.nodes[0].store_many(items)
        alive = nodes.nodes[::2]
        for node in nodes.nodes[1::2]:
            nodes.take_down(node)
        for node in alive[:4]:
            found = await node.get_many([item.key for item in items])
            lost = [key for key, value in found.items() if value is None]
            assert len(lost) <= 4  # all five replicas of a key may be among the lost half: 1 in 32
            assert {contact.peer for contact in node.neighbours()} <= {node.peer_id for node in alive}
        results = await alive[3].store_many([Item(f"new {n}", n, LATER) for n in range(20)])
        assert all(len(result.accepted) == 5 for result in results)
        assert {peer for result in results for peer in result.accepted} <= {node.peer_id for node in alive}


async def test_dead_nodes_are_asked_once_and_then_left_alone(autojump_clock: MockClock) -> None:
    async with swarm(5) as nodes:
        reader = nodes.nodes[0]
        for node in nodes.nodes[1:]:
            nodes.take_down(node)
        assert await reader.get("key") is None
        assert reader.neighbours() == []
        calls = nodes.clients[reader].called
        failed = calls.count("DHTProtocol.rpc_find")
        for node in nodes.nodes[1:]:
            reader._contacts.heard_from(node.node_id, node.peer_id)
        assert await reader.get("key") is None
        assert calls.count("DHTProtocol.rpc_find") == failed
        nodes.network.down.clear()
        await trio.sleep(defaults.DHT_BACKOFF_SECONDS)
        await reader.get("key")
        assert len(reader.neighbours()) == 4


async def test_results_name_who_refused_and_who_did_not_answer(autojump_clock: MockClock) -> None:
    async with swarm(4) as nodes:
        writer, *others = nodes.nodes
        assert (await writer.store("key", "new", LATER)).ok
        result = await writer.store("key", "old", LATER - 1)
        assert not result.ok
        assert set(result.refused) == {node.peer_id for node in nodes.nodes}
        assert "refused by 4" in str(result)
        gone = Contact(others[0].node_id, others[0].peer_id)

        async def search_that_ran_before(_targets: object) -> dict[DhtId, list[Contact]]:
            nodes.take_down(others[0])
            await trio.lowlevel.checkpoint()
            return {DhtId.of("key"): [gone]}

        writer._find_nearest = search_that_ran_before  # type: ignore[method-assign]
        result = await writer.store("key", "newer", LATER + 1)
        assert result.accepted == (writer.peer_id,)
        assert list(result.failed) == [gone.peer]
        assert gone.peer.short in str(result)


async def test_clients_read_and_write_and_are_in_nobodys_table(autojump_clock: MockClock) -> None:
    async with swarm(8) as nodes:
        client = await nodes.start(client_mode=True)
        result = await client.store("key", "value", LATER)
        assert len(result.accepted) == 5
        assert client.peer_id not in result.accepted
        assert (await nodes.nodes[0].get("key")).value == "value"
        assert (await client.get("key")).value == "value"
        for node in nodes.nodes[:-1]:
            assert client.peer_id not in [contact.peer for contact in node.neighbours()]
        with pytest.raises(ProtocolNotSupported):
            await nodes.nodes[0].ping(client.peer_id)


async def test_alone_a_node_keeps_its_records_and_a_client_cannot(autojump_clock: MockClock) -> None:
    async with swarm(1) as nodes:
        node = nodes.nodes[0]
        assert (await node.store("key", [1, 2], LATER)).accepted == (node.peer_id,)
        assert (await node.get("key")).value == [1, 2]
        client = await nodes.start(client_mode=True, join=False)
        result = await client.store("key", 1, LATER)
        assert not result.ok
        assert str(result) == "accepted by 0"
        assert await client.get("key") is None


async def test_records_expire_everywhere(autojump_clock: MockClock) -> None:
    async with swarm(8) as nodes:
        await nodes.nodes[0].store("key", 1, START + 10)
        await nodes.nodes[0].store("both", 1, START + 10, subkey="a")
        await nodes.nodes[1].store("both", 2, START + 20, subkey="b")
        await trio.sleep(10.5)
        for node in nodes.nodes:
            assert await node.get("key") is None
            assert await node.get("key", latest=False) is None
            assert (await node.get("both")).value == {"b": FoundEntry(2, START + 20)}
        assert not (await nodes.nodes[0].store("key", 1, clock() - 1)).ok


async def test_replicas_that_differ_are_merged(autojump_clock: MockClock) -> None:
    async with swarm(3) as nodes:
        key = DhtId.of("key")
        for number, node in enumerate(nodes.nodes):
            record = dictionary(
                [("own", pack(number), LATER + number), (f"only {number}", pack(number), LATER - number)]
            )
            node._storage.store_record(key, record, now=clock())
        for node in nodes.nodes:
            found = await node.get("key")
            assert {subkey: value for subkey, (value, _) in found.value.items()} == {
                "own": 2,
                "only 0": 0,
                "only 1": 1,
                "only 2": 2,
            }


async def test_the_latest_value_is_read_even_past_older_replicas(autojump_clock: MockClock) -> None:
    async with swarm(6) as nodes:
        key = DhtId.of("key")
        for number, node in enumerate(nodes.nodes):
            node._storage.store(key, pack(number), LATER + number, now=clock())
        assert [(await node.get("key")).value for node in nodes.nodes] == [5] * 6
        reader = nodes.nodes[0]
        calls = len(nodes.clients[reader].called)
        assert (await reader.get("key", latest=False)).value == 5  # cached
        assert len(nodes.clients[reader].called) == calls


async def test_the_first_find_ends_a_search_that_needs_no_latest(autojump_clock: MockClock) -> None:
    async with swarm(30) as nodes:
        await nodes.nodes[0].store("key", 1, LATER)
        reader = next(node for node in nodes.nodes if node._storage.get(DhtId.of("key"), now=clock()) is None)
        reader._cache = reader._storage
        calls = nodes.clients[reader].called
        before = len(calls)
        assert (await reader.get("key", latest=False)).value == 1
        few = len(calls) - before
        assert (await reader.get("key")).value == 1
        assert few < len(calls) - before - few


async def test_what_a_node_stores_itself_it_reads_back_at_once(autojump_clock: MockClock) -> None:
    async with swarm(30) as nodes:
        writer = nodes.nodes[0]
        for number in range(3):
            await writer.store("key", number, LATER + number)
            assert (await writer.get("key", latest=False)).value == number
            await writer.store("both", number, LATER + number, subkey="a")
            assert entry(await writer.get("both", latest=False), "a").value == number


async def test_a_nearest_node_that_lacks_a_record_is_given_it(autojump_clock: MockClock) -> None:
    async with swarm(12) as nodes:
        key = DhtId.of("key")
        holder, *_, nearest = sorted(nodes.nodes, key=lambda node: node.node_id.distance(key), reverse=True)
        holder._storage.store(key, pack("v"), LATER, now=clock())
        reader = next(node for node in nodes.nodes if node not in (holder, nearest))
        assert (await reader.get("key")).value == "v"
        await trio.sleep(1)
        assert nearest._cache.get(key, now=clock()) is not None
        assert nearest._storage.get(key, now=clock()) is None


async def test_newcomers_take_over_records_from_nodes_that_leave(autojump_clock: MockClock) -> None:
    async with swarm(10) as nodes:
        old = list(nodes.nodes)
        await old[0].store_many([Item(f"key {n}", n, LATER) for n in range(30)])
        for _ in range(30):
            await nodes.start()
        await trio.sleep(5)
        for node in old:
            nodes.take_down(node)
        found = await nodes.nodes[-1].get_many([f"key {n}" for n in range(30)])
        # keys that an old node stayed nearest to were not handed over: 10 of 40 nodes are old
        assert sum(value is not None for value in found.values()) >= 18


@pytest.mark.parametrize("skew", [5.0, -5.0])
async def test_a_node_whose_clock_is_wrong_is_told(autojump_clock: MockClock, skew: float) -> None:
    async with swarm(3) as nodes:
        late = await nodes.start(join=False, clock=lambda: clock() + skew)
        (result,) = await late.bootstrap([nodes.nodes[0].peer_id])
        assert isinstance(result.error, ClockSkew)
        assert result.error.seconds == pytest.approx(-skew, abs=0.1)
        assert late.neighbours() == []


async def test_bootstrap_peers_that_fail_are_named_and_the_others_used(autojump_clock: MockClock) -> None:
    async with swarm(3) as nodes:
        node = await nodes.start(join=False)
        nowhere = peer_id(999)
        good = nodes.nodes[1].peer_id
        results = await node.bootstrap([nowhere, good, nowhere])
        assert [result.peer for result in results] == [nowhere, good, nowhere]
        assert isinstance(results[0].error, PeerUnreachable)
        assert results[1].ok
        assert results[1].seconds is not None
        assert len(node.neighbours()) == 3
        assert await node.bootstrap([]) == []


async def test_an_isolated_node_finds_back_by_bootstrapping_again(autojump_clock: MockClock) -> None:
    async with swarm(6) as nodes:
        node = nodes.nodes[0]
        nodes.take_down(node)
        await node.get("key")
        assert node.neighbours() == []
        nodes.network.down.clear()
        (result,) = await node.bootstrap([nodes.nodes[1].peer_id])
        assert result.ok
        await trio.sleep(defaults.DHT_BACKOFF_SECONDS)
        await node.bootstrap([nodes.nodes[1].peer_id])
        assert len(node.neighbours()) == 5


async def test_many_items_travel_together(autojump_clock: MockClock) -> None:
    async with swarm(6) as nodes:
        writer = nodes.nodes[0]
        client = nodes.clients[writer]
        client.called.clear()
        await writer.store_many([Item(f"key {n}", n, LATER, subkey="peer") for n in range(80)])
        assert client.called.count("DHTProtocol.rpc_store") == 5
        assert client.called.count("DHTProtocol.rpc_find") == 5 * 80 / defaults.DHT_KEYS_PER_QUERY


async def test_large_items_travel_in_several_requests(autojump_clock: MockClock) -> None:
    async with swarm(2) as nodes:
        writer, other = nodes.nodes
        value = bytes(400_000)
        results = await writer.store_many([Item(f"key {n}", value, LATER) for n in range(7)])
        assert all(len(result.accepted) == 2 for result in results)
        assert nodes.clients[writer].called.count("DHTProtocol.rpc_store") == 4
        assert (await other.get("key 6")).value == value


async def test_calls_in_flight_are_bounded(autojump_clock: MockClock) -> None:
    async with swarm(20) as nodes:
        node = nodes.nodes[0]

        async def read(number: int) -> None:
            await node.get(f"key {number}")

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(read, number)
        client: CountingClient = nodes.clients[node]
        assert defaults.DHT_SEARCH_WORKERS < client.most_in_flight <= defaults.DHT_PARALLEL_CALLS


async def test_a_silent_peer_costs_one_timeout(autojump_clock: MockClock) -> None:
    async with swarm(4) as nodes:
        silent = nodes.network.host(peer_id(500))
        for name in ("rpc_ping", "rpc_store", "rpc_find"):
            silent.serve(f"DHTProtocol.{name}", stay_silent)
        reader = nodes.nodes[0]
        reader._contacts.heard_from(DhtId.of("key"), silent.peer_id)
        started = trio.current_time()
        assert len((await reader.store("key", 1, LATER)).accepted) == 4
        assert trio.current_time() - started == pytest.approx(defaults.DHT_CALL_SECONDS, abs=0.1)


async def test_a_cancelled_call_does_not_count_against_the_peer(autojump_clock: MockClock) -> None:
    async with swarm(2) as nodes:
        silent = nodes.network.host(peer_id(500))
        silent.serve("DHTProtocol.rpc_find", stay_silent)
        reader = nodes.nodes[0]
        reader._contacts.heard_from(DhtId(1), silent.peer_id)
        with trio.move_on_after(1):
            await reader.get("key")
        assert len(reader.neighbours()) == 2


async def test_a_full_bucket_gives_the_place_of_a_dead_node_to_one_that_waits(
    autojump_clock: MockClock,
) -> None:
    async with swarm(1) as nodes:
        node = nodes.nodes[0]
        far = node.node_id ^ (1 << 159)  # the other half of all ids
        table = node._contacts.table
        table.depth_modulo = 1
        for number in range(defaults.DHT_BUCKET_SIZE):
            nobody = Contact(DhtId(far ^ number), peer_id(1000 + number))
            table.add_or_update(nobody, now=0.0)
        other = await nodes.start(join=False)
        other.node_id = DhtId(far ^ 500)
        node._contacts.heard_from(other.node_id, other.peer_id)
        assert len(node.neighbours()) == defaults.DHT_BUCKET_SIZE
        await trio.sleep(1)
        assert other.peer_id in [contact.peer for contact in node.neighbours()]


async def test_leaving_stops_the_service(autojump_clock: MockClock) -> None:
    async with swarm(1) as nodes:
        host = nodes.host()
        node = DhtNode(host, RpcServer(host), CountingClient(host), clock=clock, rng=random.Random(1))
        async with node.running():
            assert await nodes.nodes[0].ping(host.peer_id) >= 0
            again = DhtNode(host, RpcServer(host), CountingClient(host), clock=clock)
            with pytest.raises(ValueError, match="rpc_ping"):
                async with again.running():
                    pass
        with pytest.raises(ProtocolNotSupported):
            await nodes.nodes[0].ping(host.peer_id)


async def test_reads_that_outlive_their_node_end_with_an_error(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with swarm(2) as nodes:
        silent = nodes.network.host(peer_id(500))
        silent.serve("DHTProtocol.rpc_find", stay_silent)
        host = nodes.host()
        node = DhtNode(host, RpcServer(host), CountingClient(host), clock=clock)
        ended = trio.Event()

        async def read() -> None:
            with pytest.raises(NetworkError, match="has stopped"):
                await node.get("key")
            ended.set()

        async with node.running():
            node._contacts.heard_from(DhtId(1), silent.peer_id)
            node._contacts.heard_from(nodes.nodes[0].node_id, nodes.nodes[0].peer_id)
            node._contacts.may_ask = lambda contact: contact.peer == silent.peer_id  # type: ignore[method-assign]
            nursery.start_soon(read)
            await trio.sleep(1)
            node._contacts.may_ask = lambda _contact: True  # type: ignore[method-assign]
            node._contacts.heard_from(nodes.nodes[1].node_id, nodes.nodes[1].peer_id)
        with pytest.raises(NetworkError, match="has stopped"):
            await node.get("another")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (Item("key", 1, math.nan), ValueError),
        (Item("key", object(), LATER), TypeError),
        (Item(object(), 1, LATER), TypeError),
        (Item("key", bytes(defaults.DHT_MAX_RECORD_BYTES + 1), LATER), ValueError),
        (Item("key", 1, LATER, subkey=bytes(defaults.DHT_MAX_SUBKEY_BYTES)), ValueError),
        (Item("key", 1, LATER, subkey=["list"]), ValueError),  # type: ignore[arg-type]
    ],
)
async def test_what_cannot_be_stored_is_refused_before_anything_is_sent(
    autojump_clock: MockClock, item: Item, error: type[Exception]
) -> None:
    async with swarm(2) as nodes:
        with pytest.raises(error):
            await nodes.nodes[0].store_many([Item("good", 1, LATER), item])
        assert await nodes.nodes[1].get("good") is None


async def test_unreadable_values_of_others_are_skipped(autojump_clock: MockClock) -> None:
    async with swarm(2) as nodes:
        good = StoreItem.of(DhtId.of("key"), "good", pack(1), LATER)
        bad = StoreItem.of(DhtId.of("key"), "bad", b"\xc1", LATER + 1)
        await nodes.nodes[0]._remote.store(nodes.nodes[1].peer_id, [good, bad])
        assert await nodes.nodes[0].get("key") == Found(
            {"good": FoundEntry(1, LATER)}, LATER, is_dictionary=True
        )


async def test_a_node_that_is_another_than_it_was_taken_for_is_found_by_its_true_id(
    autojump_clock: MockClock,
) -> None:
    async with swarm(4) as nodes:
        writer, other = nodes.nodes[0], nodes.nodes[1]
        key = DhtId.of("key")
        writer._contacts.heard_from(key, other.peer_id)  # as if it had restarted with a new id since
        assert Contact(key, other.peer_id) in writer.neighbours()
        result = await writer.store("key", 1, LATER)
        assert sorted(result.accepted) == sorted(node.peer_id for node in nodes.nodes)
        assert Contact(other.node_id, other.peer_id) in writer.neighbours()
        assert Contact(key, other.peer_id) not in writer.neighbours()


async def test_records_too_large_to_pass_on_are_read_but_not_passed_on(autojump_clock: MockClock) -> None:
    async with swarm(8) as nodes:
        key = DhtId.of("key")
        holder, *_, nearest = sorted(nodes.nodes, key=lambda node: node.node_id.distance(key), reverse=True)
        holder._storage._max_record_bytes = 2 * defaults.DHT_MAX_RECORD_BYTES
        value = bytes(defaults.DHT_MAX_RECORD_BYTES + 1)
        assert holder._storage.store(key, pack(value), LATER, now=clock())
        reader = next(node for node in nodes.nodes if node not in (holder, nearest))
        assert (await reader.get("key")).value == value
        await trio.sleep(1)
        assert nearest._cache.get(key, now=clock()) is None


async def test_a_node_becomes_a_client_and_a_server_again(autojump_clock: MockClock) -> None:
    """As when others can no longer dial it, and then can: it stores and reads all the while."""
    async with swarm(8) as nodes:
        changing, *others = nodes.nodes
        changing.set_mode(client_mode=True)
        changing.set_mode(client_mode=True)
        for node in others:
            with pytest.raises(ProtocolNotSupported):
                await node.ping(changing.peer_id)
        assert not any(changing.peer_id in {c.peer for c in node.neighbours()} for node in others)
        result = await changing.store("key", 1, LATER)
        assert result.ok
        assert changing.peer_id not in result.accepted
        assert await others[0].get("key") == Found(1, LATER, is_dictionary=False)
        changing.set_mode(client_mode=False)
        await trio.sleep(10)  # it looks around by itself
        assert all(changing.peer_id in {c.peer for c in node.neighbours()} for node in others)
        assert await changing.get("key") == Found(1, LATER, is_dictionary=False)
