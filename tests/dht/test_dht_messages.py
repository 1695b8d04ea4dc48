"""Messages against bytes recorded from hivemind 1.1.12."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from pathlib import Path

import pytest
from dht_nodes import peer_id
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import Refusal, RemoteError
from kwaainet_bridge.hivemind.dht import Contact, DhtId, messages
from kwaainet_bridge.hivemind.dht.messages import StoreItem
from kwaainet_bridge.hivemind.dht.storage import LocalStorage
from kwaainet_bridge.hivemind.dht.values import Regular, decode, dictionary, merge, read_subkey
from kwaainet_bridge.wire.envelope import decode_answer, decode_call
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import dht_pb2 as pb

FRAMES = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())["frames"]
KEY = DhtId.of("key1")
SENDER = DhtId.from_bytes(b"\x01" * 20, field="")
NODE = pb.NodeInfo(node_id=SENDER.to_bytes())
EXPIRATION_HEX = "d3623de7cfc0da41"
EXPIRATION = float(struct.unpack("<d", bytes.fromhex(EXPIRATION_HEX))[0])
NODE_HEX = "160a14" + "01" * 20


def test_recorded_ping() -> None:
    data = decode_call(bytes.fromhex(FRAMES["unary_request"])[1:]).data
    request = pb.PingRequest(peer=NODE, validate=True)
    assert request.SerializeToString() == data
    assert messages.sender(pb.PingRequest.FromString(data)) == SENDER


def test_recorded_answer_to_a_ping() -> None:
    body = decode_answer(bytes.fromhex(FRAMES["unary_response"])[1:]).response
    response = pb.PingResponse.FromString(body)
    assert messages.responder(response) == DhtId.from_bytes(b"\xaa" * 20, field="")
    assert response.available
    node = pb.NodeInfo(node_id=b"\xaa" * 20)
    ours = pb.PingResponse(peer=node, dht_time=response.dht_time, available=True)
    assert ours.SerializeToString() == body


def test_recorded_store_of_a_value() -> None:
    item = StoreItem.of(KEY, None, pack("value1"), EXPIRATION)
    recorded = f"1214{KEY}1a01c02207a676616c7565312a08{EXPIRATION_HEX}3201003a{NODE_HEX}"
    assert messages.store_request([item], NODE).SerializeToString().hex() == recorded
    assert list(messages.read_store_request(pb.StoreRequest.FromString(bytes.fromhex(recorded)))) == [item]
    assert messages.read_record(item) == Regular(pack("value1"), EXPIRATION)


def test_recorded_store_of_a_subkey() -> None:
    item = StoreItem.of(KEY, "sub", pack({"a": 1}), EXPIRATION)
    recorded = f"1214{KEY}1a04a3737562220481a161012a08{EXPIRATION_HEX}3201003a{NODE_HEX}"
    assert messages.store_request([item], NODE).SerializeToString().hex() == recorded
    assert messages.read_record(item) == dictionary([("sub", pack({"a": 1}), EXPIRATION)])


def test_a_whole_dictionary_is_stored_with_an_empty_subkey() -> None:
    record = dictionary(
        [("sub", pack("v1"), 1000.5), (b"peer", pack(True), 2000.25), (("t", 1), pack(3), 1500.0)]
    )
    item = StoreItem.of_record(KEY, record, in_cache=True)
    assert (item.subkey, item.expiration) == (b"", 2000.25)
    assert item.value.hex() == (
        "c74d5093cb7ff0000000000000cb409f41000000000093"
        "93a3737562c403a27631cb408f440000000000"
        "93c40470656572c401c3cb409f410000000000"
        "93d64092a17401c40103cb4097700000000000"
    )
    request = messages.store_request([item], NODE)
    (back,) = messages.read_store_request(request)
    assert back == item
    assert messages.read_record(back) == record


def test_recorded_find() -> None:
    recorded = f"1214{KEY}1a{NODE_HEX}"
    assert messages.find_request([KEY], NODE).SerializeToString().hex() == recorded
    response = pb.FindResponse(results=[messages.find_result(None, [])], peer=NODE)
    assert response.SerializeToString().hex() == f"12001a{NODE_HEX}"


def test_answers_to_a_find_come_back_as_they_were() -> None:
    neighbours = tuple(Contact(DhtId(n), peer_id(n)) for n in range(1, 21))
    records = [None, Regular(b"v", 5.0), dictionary([("a", b"1", 5.0), ("b", b"2", 6.0)])]
    response = pb.FindResponse(results=[messages.find_result(record, neighbours) for record in records])
    assert [result.expiration_time for result in response.results] == [0.0, 5.0, 6.0]
    keys = [DhtId(n) for n in range(3)]
    answers = messages.read_find_response(response, keys, now=1.0)
    assert [answers[key].record for key in keys] == records
    assert all(answer.neighbours == neighbours for answer in answers.values())


def test_expired_parts_of_answers_are_left_out() -> None:
    records = [Regular(b"v", 5.0), Regular(b"v", math.nan), dictionary([("a", b"1", 5.0), ("b", b"2", 7.0)])]
    response = pb.FindResponse(results=[messages.find_result(record, []) for record in records])
    keys = [DhtId(n) for n in range(3)]
    answers = messages.read_find_response(response, keys, now=6.0)
    assert [answers[key].record for key in keys] == [None, None, dictionary([("b", b"2", 7.0)])]


@pytest.mark.parametrize(
    "result",
    [
        pb.FindResult(type=pb.FOUND_DICTIONARY, value=b"\xc1", expiration_time=9.0),
        pb.FindResult(type=pb.FOUND_DICTIONARY, value=pack({"a": 1}), expiration_time=9.0),
        pb.FindResult(type=pb.FOUND_DICTIONARY, value=b"\xd4\x40" * 10_000, expiration_time=9.0),
        pb.FindResult(type=7, value=b"v", expiration_time=9.0),  # type: ignore[arg-type]
    ],
)
def test_a_record_that_cannot_be_read_counts_as_none(result: pb.FindResult) -> None:
    result.nearest_node_ids.append(b"\x01" * 20)
    result.nearest_peer_ids.append(peer_id(1).raw)
    answer = messages.read_find_response(pb.FindResponse(results=[result]), [KEY], now=1.0)[KEY]
    assert answer.record is None
    assert answer.neighbours == (Contact(SENDER, peer_id(1)),)


def test_no_more_neighbours_are_read_than_stock_sends() -> None:
    result = pb.FindResult(nearest_node_ids=[b"\x01"] * 1000, nearest_peer_ids=[peer_id(1).raw] * 900)
    answers = messages.read_find_response(pb.FindResponse(results=[result]), [KEY], now=1.0)
    assert len(answers[KEY].neighbours) == defaults.DHT_BUCKET_SIZE


@pytest.mark.parametrize(
    "result",
    [
        pb.FindResult(nearest_node_ids=[b"\x01" * 21], nearest_peer_ids=[peer_id(1).raw]),
        pb.FindResult(nearest_node_ids=[b"\x01" * 20], nearest_peer_ids=[b"no peer id"]),
        pb.FindResult(nearest_node_ids=[b"\x01" * 20], nearest_peer_ids=[b""]),
    ],
)
def test_neighbours_that_are_no_ids_spoil_an_answer(result: pb.FindResult) -> None:
    with pytest.raises(RemoteError):
        messages.read_find_response(pb.FindResponse(results=[result]), [KEY], now=1.0)


@pytest.mark.parametrize("count", [0, 2])
def test_answers_must_be_as_many_as_keys(count: int) -> None:
    with pytest.raises(RemoteError, match="results"):
        messages.read_find_response(pb.FindResponse(results=[pb.FindResult()] * count), [KEY], now=1.0)


def test_absent_node_ids_are_clients() -> None:
    assert messages.sender(pb.FindRequest()) is None
    assert messages.sender(pb.StoreRequest(peer=pb.NodeInfo())) is None
    with pytest.raises(RemoteError, match=r"peer\.node_id"):
        messages.sender(pb.PingRequest(peer=pb.NodeInfo(node_id=bytes(30))))


def test_lists_of_unequal_lengths_are_refused_with_the_stock_text() -> None:
    for field in ("keys", "values", "expiration_time", "in_cache"):
        request = messages.store_request([StoreItem.of(KEY, None, b"v", 1.0)] * 2, NODE)
        del getattr(request, field)[1]
        with pytest.raises(Refusal) as refused:
            list(messages.read_store_request(request))
        assert refused.value.unary_text == "AssertionError()"


def test_missing_subkeys_cut_a_store_request_short() -> None:
    request = messages.store_request([StoreItem.of(KEY, None, b"v", 1.0)] * 3, NODE)
    del request.subkeys[1:]
    assert len(list(messages.read_store_request(request))) == 1


def test_a_request_of_too_many_items_is_refused() -> None:
    count = defaults.DHT_MAX_STORE_ITEMS + 1
    request = pb.StoreRequest(
        keys=[b""] * count, values=[b""] * count, expiration_time=[1.0] * count, in_cache=[False] * count
    )
    with pytest.raises(Refusal, match=str(count)):
        next(messages.read_store_request(request))


@pytest.mark.parametrize(
    "item",
    [
        StoreItem(KEY, pack(["list"]), b"v", 1.0),
        StoreItem(KEY, b"\xc1", b"v", 1.0),
        StoreItem(KEY, b"\x91" * 10_000 + b"\xc0", b"v", 1.0),
        StoreItem(KEY, b"", b"\x93\x01\x02", 1.0),
        StoreItem(KEY, b"", pack("no dictionary"), 1.0),
        StoreItem(KEY, b"", pack(dictionary([(tuple(range(100)), b"v", 1.0)])), 1.0),
    ],
)
def test_items_that_cannot_be_read(item: StoreItem) -> None:
    with pytest.raises(RemoteError, match=r"^(subkeys|values)"):
        messages.read_record(item)


BLOBS = st.one_of(
    st.binary(max_size=70),
    st.sampled_from([b"", b"\xc0", peer_id(1).raw, pack("sub"), pack(dictionary([("a", b"\x01", 1.0)]))]),
    st.builds(lambda head, tail: head + tail, st.just(b"\xc7\x0c\x50\x93"), st.binary(max_size=20)),
)
TIMES = st.floats(width=64)


@given(
    st.lists(st.tuples(BLOBS, BLOBS, BLOBS, TIMES, st.booleans()), max_size=5),
    st.lists(BLOBS, max_size=5),
    BLOBS,
)
def test_any_store_request_is_read_or_refused(
    items: list[tuple[bytes, bytes, bytes, float, bool]], subkeys: list[bytes], node_id: bytes
) -> None:
    keys, own_subkeys, values, times, in_cache = zip(*items, strict=True) if items else ((),) * 5
    request = pb.StoreRequest(
        keys=keys,
        subkeys=subkeys or own_subkeys,
        values=values,
        expiration_time=times,
        in_cache=in_cache,
        peer=pb.NodeInfo(node_id=node_id),
    )
    storage = LocalStorage(max_bytes=10_000)
    with contextlib.suppress(RemoteError, Refusal):
        messages.sender(request)
        for item in messages.read_store_request(request):
            storage.store_record(item.key, messages.read_record(item), now=1.0)
            record = storage.get(item.key, now=1.0)
            if record is not None:
                messages.read_record(StoreItem.of_record(item.key, record))  # what we keep, others can read


@given(
    st.lists(st.tuples(st.integers(0, 3), BLOBS, TIMES, st.lists(BLOBS), st.lists(BLOBS)), max_size=3),
    st.integers(0, 3),
)
def test_any_answer_to_a_find_is_read_or_refused(
    results: list[tuple[int, bytes, float, list[bytes], list[bytes]]], count: int
) -> None:
    response = pb.FindResponse(
        results=[
            pb.FindResult(
                type=kind,  # type: ignore[arg-type]
                value=value,
                expiration_time=time,
                nearest_node_ids=node_ids,
                nearest_peer_ids=peers,
            )
            for kind, value, time, node_ids, peers in results
        ]
    )
    with contextlib.suppress(RemoteError):
        for answer in messages.read_find_response(
            response, [DhtId(n) for n in range(count)], now=1.0
        ).values():
            if answer.record is not None:
                decode(merge(answer.record, answer.record), key="any")


def test_the_largest_dictionary_that_is_kept_can_be_read() -> None:
    storage = LocalStorage(max_bytes=1 << 24)
    for n in range(defaults.DHT_MAX_RECORD_ENTRIES + 1):
        subkey = read_subkey(pack(tuple(range(n, n + defaults.DHT_MAX_SUBKEY_ITEMS))))
        kept = storage.store_subkey(KEY, subkey, b"\xc0", 5.0, now=1.0)
        assert kept is (n < defaults.DHT_MAX_RECORD_ENTRIES)
    record = storage.get(KEY, now=1.0)
    assert record is not None
    response = pb.FindResponse(results=[messages.find_result(record, [])])
    assert messages.read_find_response(response, [KEY], now=1.0)[KEY].record == record
