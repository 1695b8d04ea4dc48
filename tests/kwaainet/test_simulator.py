"""The simulated KwaaiNet peers against the documented bytes, against each other, and against one local model."""

from __future__ import annotations

import ast
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sim_dht
import sim_envelope
import trio
from sim_client import find_chain
from sim_dht import Dictionary, Entry, key_id
from sim_envelope import BrokenRules, CallError, StreamReader
from sim_messages import (
    INFERENCE,
    LEASE,
    TENSOR,
    WARMING_UP,
    DeniedAtCapacity,
    Granted,
    InferenceAnswer,
    InferenceRequest,
    MuxFrame,
    outcome_value,
    pack_message,
    read_outcome,
    unpack_message,
)
from sim_records import ServerRecord, Unusable, prefix_of, read_server, server_value
from sim_tensor import DATA, QuantisedTensor, TensorFrame, acknowledge
from simulator import (
    AUSTEN,
    HELLO,
    MUX,
    TINY,
    Faults,
    NoChain,
    ServerFailed,
    SimulatedClient,
    SimulatedPeer,
    generate_locally,
    simulated_bootstrap,
    simulated_client,
    simulated_server,
)

IDS = [1, 42, 99, 320]
REQUEST = bytes.fromhex(
    "85aa73657373696f6e5f6964cd3039a77365715f706f7300ac7061796c6f61645f74797065a9746f6b656e5f696473a573686170"
    "659104a464617461dc0010010000002a000000cce7030000007d0000"
)
GRANTED = bytes.fromhex("81a74772616e74656482a86c656173655f696401a874746c5f736563731e")
AT_CAPACITY = bytes.fromhex("81b044656e6965644174436170616369747981b072657472795f61667465725f7365637305")
TENSOR_BYTES = bytes.fromhex(
    "04000000000000000040812001000000000000000824010000000000000004000000000000004000000000000000"
)
TENSOR_FRAME = bytes.fromhex(
    "000000550000000001000000000000006701040000000000000000408120010000000000000008240100000000000000040000000"
    "000000040000000000000000100000000000000040000000000000001000000000000006d"
)
ACK_BODY = bytes.fromhex("0100000001000000000000006700000000000000000008000000000000007265636569766564")
PING_CALL = bytes.fromhex(
    "6e0a10ce2aa6639ff8481296fcd31fe71518f21a5a0a2600240801 1220a1859604acaf56db02b7d3bc90edbdaae33972c0d23366edab"
    "56dbca1f70157a1214 44485450726f746f636f6c2e7270635f70696e67 1a1a12160a14 0101010101010101010101010101010101010101 1801"
)


def test_the_simulator_shares_only_the_host_with_the_package() -> None:
    imported = set()
    for path in Path(__file__).parent.glob("sim*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(name.name for name in node.names)
    ours = {name for name in imported if name.startswith("kwaainet_bridge")}
    assert ours == {
        "kwaainet_bridge",
        "kwaainet_bridge.net",
        "kwaainet_bridge.net.identity",
        "kwaainet_bridge.errors",
    }


# --- documented bytes


def test_the_documented_inference_request() -> None:
    request = InferenceRequest.of_ids(12345, 0, [1, 42, 999, 32000])
    assert request.encode() == REQUEST
    assert InferenceRequest.decode(REQUEST) == request


def test_requests_with_bin_other_orders_and_unknown_keys_are_read() -> None:
    request = InferenceRequest.of_ids(12345, 0, [1, 42, 999, 32000])
    fields = unpack_message(REQUEST)
    fields = {"new": 1, **dict(reversed(fields.items())), "data": request.data}
    assert b"\xc4\x10" in pack_message(fields)
    assert InferenceRequest.decode(pack_message(fields)) == request


def test_an_answer_has_its_keys_in_order_and_may_lack_the_error() -> None:
    answer = InferenceAnswer(7, "logits", [1, 1, 2], np.array([0.5, -2], "<f2").tobytes())
    fields = unpack_message(answer.encode())
    assert list(fields) == ["session_id", "response_type", "shape", "data", "error"]
    assert fields["data"] == [0x00, 0x38, 0x00, 0xC0]
    assert fields["error"] is None
    del fields["error"]
    assert InferenceAnswer.decode(pack_message(fields)) == answer
    assert answer.values().tolist() == [[[0.5, -2]]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("session_id", -1),
        ("session_id", "7"),
        ("seq_pos", 2**32),
        ("seq_pos", 0.0),
        ("payload_type", "logits"),
        ("shape", [5]),
        ("shape", [1, 4]),
        ("data", [256] * 16),
        ("data", "text"),
    ],
)
def test_a_strict_decoder_refuses(key: str, value: Any) -> None:
    fields = unpack_message(REQUEST)
    with pytest.raises(BrokenRules):
        InferenceRequest.decode(pack_message({**fields, key: value}))
    del fields[key]
    with pytest.raises(BrokenRules):
        InferenceRequest.decode(pack_message(fields))


def test_the_documented_lease_outcomes() -> None:
    for outcome, data in ((Granted(1, 30), GRANTED), (DeniedAtCapacity(5), AT_CAPACITY)):
        assert pack_message(outcome_value(outcome)) == data
        assert read_outcome(unpack_message(data)) == outcome
    assert read_outcome("DeniedWrongModel") == "DeniedWrongModel"
    for wrong in ("DeniedForFun", {"Granted": {"lease_id": 1}}, {"Granted": {}, "Denied": {}}, None):
        with pytest.raises(BrokenRules):
            read_outcome(wrong)


def test_the_documented_tensor_frames() -> None:
    tensor = QuantisedTensor.of(np.array([0, 1, -2, 0.5], np.float32))
    assert tensor.data.tolist() == [0, 64, -127, 32]
    assert tensor.encode() == TENSOR_BYTES
    assert TensorFrame(DATA, "g", tensor, (4,), "m").encode() == TENSOR_FRAME
    assert acknowledge("g").encode()[4:] == ACK_BODY
    read = TensorFrame.decode(TENSOR_FRAME[4:])
    assert (read.kind, read.name, read.shape, read.metadata) == (DATA, "g", (4,), "m")
    assert read.tensor is not None
    assert np.abs(read.tensor.values() - [0, 1, -2, 0.5]).max() < 0.01
    for end in range(len(ACK_BODY)):
        with pytest.raises(BrokenRules):
            TensorFrame.decode(ACK_BODY[:end])


@pytest.mark.parametrize(
    "tensor",
    [
        QuantisedTensor(np.zeros(4, np.int8), np.ones(1, "<f2"), (4,), 0),
        QuantisedTensor(np.zeros(4, np.int8), np.ones(2, "<f2"), (4,), 64),
        QuantisedTensor(np.zeros(4, np.int8), np.ones(1, "<f2"), (5,), 64),
        QuantisedTensor(np.zeros(4, np.int8), np.array([np.inf], "<f2"), (4,), 64),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensor: QuantisedTensor) -> None:
    with pytest.raises(BrokenRules):
        TensorFrame.decode(TensorFrame(DATA, "g", tensor, (4,), "").encode()[4:])


def test_the_documented_unary_envelope() -> None:
    call_id, peer = PING_CALL[3:19], PING_CALL[23:61]
    body = sim_dht.ping_request(b"\x01" * 20, validate=True)
    assert sim_envelope.request_message(call_id, peer, sim_dht.PING, body) == PING_CALL
    assert sim_envelope.read_request(PING_CALL[1:]) == (call_id, sim_dht.PING, body)
    head = b"\x0a\x10" + call_id
    answer = bytes.fromhex("18") + head + bytes.fromhex("22040a02082b")
    assert sim_envelope.response_message(call_id, b"\x08\x2b") == answer
    assert sim_envelope.read_response(answer[1:]) == b"\x08\x2b"
    error = bytes.fromhex("28") + head + bytes.fromhex("2214121256616c75654572726f722827626f6f6d2729")
    assert sim_envelope.response_message(call_id, None, "ValueError('boom')") == error
    with pytest.raises(CallError, match="boom"):
        sim_envelope.read_response(error[1:])


def test_required_fields_are_there_even_when_empty() -> None:
    message = sim_envelope.request_message(bytes(16), b"", "p", b"")
    assert message.hex() == "1b0a10" + "00" * 16 + "1a07" + "0a00" + "120170" + "1a00"
    for without in ("120170" + "1a00", "0a00" + "1a00", "0a00" + "120170"):
        call = bytes.fromhex(without)
        with pytest.raises(BrokenRules, match="required"):
            sim_envelope.read_request(b"\x0a\x10" + bytes(16) + sim_envelope.bytes_field(3, call))


def test_the_documented_dht_messages() -> None:
    key = key_id("key1")
    assert key.hex() == "ce27c561a2627a439cecb58acff4927706cc6418"
    assert key_id("my_averager.0b0101").hex() == "c5b668d4fbc04b598e527fd9a2557af877716938"
    find = sim_dht.find_request(b"\x01" * 20, [key])
    assert find.hex() == "1214" + key.hex() + "1a160a14" + "01" * 20
    expiration = 1_780_420_430.0
    store = sim_dht.store_request(b"\x01" * 20, [(key, b"\xc0", sim_dht.pack("value1"), expiration)])
    packed = np.array([expiration], "<f8").tobytes().hex()
    assert store.hex() == (f"1214{key.hex()}1a01c02207a676616c7565312a08{packed}3201003a160a14{'01' * 20}")
    dictionary = bytes.fromhex(
        "c74d5093cb7ff0000000000000cb409f41000000000093"
        "93a3737562c403a27631cb408f440000000000"
        "93c40470656572c401c3cb409f410000000000"
        "93d64092a17401c40103cb4097700000000000"
    )
    entries = [
        Entry("sub", sim_dht.pack("v1"), 1000.5),
        Entry(b"peer", sim_dht.pack(True), 2000.25),
        Entry(("t", 1), sim_dht.pack(3), 1500.0),
    ]
    assert sim_dht.write_dictionary(entries) == dictionary
    assert sim_dht.read_dictionary(dictionary) == entries


def test_later_records_win() -> None:
    held = Dictionary(lambda: 100.0)
    key = key_id("k")
    assert held.store("a", key, b"\xa1x", b"1", 200)
    assert not held.store("b", key, b"\xa1x", b"2", 200)
    assert held.store("b", key, b"\xa1y", b"3", 150)
    assert not held.store("b", key, b"\xa1z", b"4", 99)
    assert held.find(key) == [Entry("x", b"1", 200), Entry("y", b"3", 150)]
    assert not held.store("c", key, b"\xc0", b"5", 180)
    assert held.store("c", key, b"\xc0", b"5", 201)
    assert held.find(key) == [Entry(None, b"5", 201)]
    assert [(s.by, s.subkey, s.accepted) for s in held.log] == [
        ("a", "x", True), ("b", "x", False), ("b", "y", True), ("b", "z", False), ("c", None, False), ("c", None, True),
    ]  # fmt: skip


# --- records


def value(state: int = 2, blocks: range = range(4), peer_id: Any = "Qm1", **more: Any) -> bytes:
    state, throughput, fields = server_value(
        state=state, throughput=3.5, blocks=blocks, peer_id=peer_id, public_name="n", version="kwaai-0.6.2", cache_tokens_left=9,
    )  # fmt: skip
    return sim_dht.pack((state, throughput, {**fields, **more}))


def test_a_record_as_documented() -> None:
    data = value()
    outer = sim_dht.msgpack.unpackb(data)
    assert (outer.code, outer.data[:2]) == (64, b"\x93\x02")
    fields = sim_dht.unpack(data)[2]
    assert list(fields) == [
        "start_block", "end_block", "public_name", "version", "torch_dtype", "using_relay", "cache_tokens_left",
        "adapters", "next_pings", "peer_id", "lease_v1",
    ]  # fmt: skip
    assert read_server("Qm0", data) == ServerRecord("Qm1", range(4), 3.5, "kwaai-0.6.2", leases=True)
    assert prefix_of("meta-llama/Llama-3.1-8B-Instruct") == "Llama-3-1-8B-Instruct"


@pytest.mark.parametrize("version", ["kwaai-0.3.15", "0.3.15", "kwaai-0.10.0", "1.0.0"])
def test_versions_that_readers_take(version: str) -> None:
    assert read_server("Qm0", value(version=version)).version == version


@pytest.mark.parametrize(
    "version", ["kwaai-0.3.14", "0.2.99", "2.3.0.dev2", "kwaai-1.0", "v1.0.0", "bridge-1.0.0", "", None, 1]
)
def test_versions_that_readers_refuse(version: Any) -> None:
    with pytest.raises(Unusable, match="version"):
        read_server("Qm0", value(version=version))


@pytest.mark.parametrize("state", [-1, 0, 1, 3])
def test_only_state_2_counts(state: int) -> None:
    with pytest.raises(Unusable, match="state"):
        read_server("Qm0", value(state=state))


def test_the_peer_id_is_the_field_or_else_the_subkey() -> None:
    assert read_server("Qm0", value()).peer_id == "Qm1"
    assert read_server("Qm0", value(peer_id=None)).peer_id == "Qm0"
    with pytest.raises(Unusable, match="peer id"):
        read_server(7, value(peer_id=None))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        sim_dht.pack([2, 1.0, {}]),
        sim_dht.pack((2, 1.0)),
        sim_dht.pack((2, 1.0, [])),
        value(start_block=None),
        value(start_block=4, end_block=4),
        value(end_block=-1),
    ],
)
def test_records_of_another_form_are_passed_over(data: bytes) -> None:
    with pytest.raises(Unusable):
        read_server("Qm0", data)


def record(name: str, start: int, stop: int, throughput: float = 1.0) -> ServerRecord:
    return ServerRecord(name, range(start, stop), throughput, "0.6.2", leases=True)


def test_chains_are_spans_that_follow_each_other() -> None:
    servers = [
        record("a", 0, 4),
        record("b", 3, 8),
        record("c", 4, 6),
        record("d", 6, 8),
        record("e", 4, 8, 0.5),
    ]
    assert [s.peer_id for s in find_chain(servers, 8)] == ["a", "e"]
    faster = record("f", 4, 8, 2)
    assert [s.peer_id for s in find_chain([*servers, faster], 8)] == ["a", "f"]
    with pytest.raises(NoChain, match="fit together"):
        find_chain([record("a", 0, 4), record("b", 3, 8)], 8)
    with pytest.raises(NoChain, match=r"\[2, 3\]"):
        find_chain([record("a", 0, 2), record("b", 4, 8)], 8)


# --- peers with each other


async def test_two_spans_generate_what_one_model_does() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(3), bootstrap=[boot]) as first,
        simulated_server(blocks=range(3, 8), bootstrap=[boot.address]) as last,
        simulated_client(bootstrap=[boot]) as client,
    ):
        tokens = await client.generate(IDS, 20)
        assert tokens == generate_locally(TINY, IDS, 20, boundaries=[3])
        assert len(set(tokens)) > 3
        assert [r.seq_pos for _, r in first.requests] == [0, *range(4, 23)]
        assert {r.payload_type for _, r in first.requests} == {"token_ids"}
        assert {r.payload_type for _, r in last.requests} == {"hidden_states"}
        assert [r.shape for _, r in last.requests] == [[1, 4, 64]] + [[1, 1, 64]] * 19
        assert {who for who, _ in first.requests + last.requests} == {client.peer_id}
        assert first.greetings == last.greetings == [(client.peer_id, "hello")]
        assert client.failures == client.denials == client.skipped == []
        for peer in (boot, first, last, client):
            assert peer.complaints == []


async def test_the_embedded_model_in_three_spans() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(model=AUSTEN, blocks=range(2), bootstrap=[boot]),
        simulated_server(model=AUSTEN, blocks=range(2, 5), bootstrap=[boot]),
        simulated_server(model=AUSTEN, blocks=range(5, 8), bootstrap=[boot]),
        simulated_client(model=AUSTEN, bootstrap=[boot]) as client,
    ):
        assert await client.generate(IDS, 8) == generate_locally(AUSTEN, IDS, 8, boundaries=[2, 5])


async def test_the_documented_request_reaches_a_live_server() -> None:
    async with simulated_server(blocks=range(4)) as server, simulated_client() as client:
        await client.host.connect(server.address)
        answer = InferenceAnswer.decode(await client.call(server, INFERENCE, REQUEST))
        assert server.requests == [(client.peer_id, InferenceRequest.decode(REQUEST))]
        assert answer.session_id == 12345
        assert answer.error is not None  # this model has 384 tokens
        assert (answer.shape, answer.data) == ([], b"")
        assert await client.hello(server) == "ok"
        assert pack_message(outcome_value(await client.lease(server))) == GRANTED


async def test_identify_names_no_protocol_without_a_slash() -> None:
    async with simulated_bootstrap() as boot, simulated_server(blocks=range(8), bootstrap=[boot]) as server:
        await boot.host.wait_identified()
        described = boot.host.description(server.identity.peer_id).protocols
        assert INFERENCE in described
        assert all(p.startswith("/") for p in described)
        assert await server.dht.ping(boot.identity.peer_id, validate=True) == boot.dht.node_id


async def test_what_a_server_announces_and_withdraws() -> None:
    now = [1000.0]
    async with simulated_bootstrap(clock=lambda: now[0]) as boot:
        async with simulated_server(blocks=range(2, 5), bootstrap=[boot], clock=lambda: now[0]) as server:
            written = boot.dht.held.log
            keys = [key_id(f"tiny-llama-v1.{block}") for block in (2, 3, 4)]
            assert [s.key for s in written] == [
                *keys,
                key_id("_petals.models"),
                key_id("_kwaai.inference.nodes"),
            ]
            assert {s.by for s in written} == {server.peer_id}
            assert {s.expiration for s in written} == {1360.0}
            assert [s.subkey for s in written] == [server.peer_id] * 3 + ["tiny-llama-v1", server.peer_id]
            assert sim_dht.unpack(written[3].value) == {"repository": "kwaai/tiny-llama.v1", "num_blocks": 8}
            assert written[0].value == written[4].value
            assert read_server(None, written[0].value).blocks == range(2, 5)
            round_ = await server.announce()  # within the same second
            assert round_.succeeded
            assert written[-1].accepted
        held = [*boot.dht.held.find(keys[0]), *boot.dht.held.find(key_id("_kwaai.inference.nodes"))]
        assert [sim_dht.unpack(entry.value)[0] for entry in held] == [-1, -1]


async def test_announcing_goes_on_while_one_bootstrap_peer_is_dead() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_bootstrap() as dead,
        simulated_server(blocks=range(8), bootstrap=[dead, boot], period=0.05) as server,
    ):
        assert [*server.announcements[0].accepted.values()] == [[True] * 10] * 2
        await dead.kill()
        round_ = await server.next_announcement()
        while None not in round_.accepted.values():
            round_ = await server.next_announcement()
        assert round_.succeeded
        assert round_.accepted[boot.peer_id] == [True] * 10


async def test_a_reader_says_what_it_left_out() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot], version="0.2.0") as old,
        simulated_server(blocks=range(8), bootstrap=[boot]) as good,
        simulated_client(bootstrap=[boot]) as client,
    ):
        assert [s.peer_id for s in await client.servers()] == [good.peer_id]
        assert {(s.subkey, s.reason) for s in client.skipped} == {
            (old.peer_id, "version 0.2.0 is older than 0.3.15")
        }
        assert len(client.skipped) == 8
        assert [s.peer_id for s in await client.nodes()] == [good.peer_id]
        assert await client.models() == {
            "tiny-llama-v1": {"repository": "kwaai/tiny-llama.v1", "num_blocks": 8}
        }


async def test_a_server_that_warms_up() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot], warming_up=True) as server,
        simulated_client(bootstrap=[boot]) as client,
    ):
        answer = await client.infer(server, InferenceRequest.of_ids(9, 0, IDS))
        assert (answer.session_id, answer.shape, answer.data, answer.error) == (0, [], b"", WARMING_UP)
        with pytest.raises(NoChain):
            await client.generate(IDS, 2)
        assert {s.reason for s in client.skipped} == {"state 0"}
        await server.finish_warming_up()
        assert await client.generate(IDS, 2) == generate_locally(TINY, IDS, 2, boundaries=[])


# --- faults


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(silent=True), "no answer within"),
        (Faults(slow=30), "no answer within"),
        (Faults(dies_after=2), ""),
        (Faults(wrong_shape=True), "shape"),
        (Faults(short_data=True), "bytes in an answer of shape"),
        (Faults(nan=True), "not finite"),
        (Faults(error="out of memory"), "out of memory"),
    ],
)
@pytest.mark.parametrize("blocks", [range(4), range(4, 8)])
async def test_a_client_goes_round_a_server_that_fails(faults: Faults, reason: str, blocks: range) -> None:
    rest = range(4, 8) if blocks.start == 0 else range(4)
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=blocks, bootstrap=[boot], throughput=99, faults=faults) as bad,
        simulated_server(blocks=blocks, bootstrap=[boot]),
        simulated_server(blocks=rest, bootstrap=[boot]),
        simulated_client(bootstrap=[boot], timeout=3 if faults.silent or faults.slow else 10) as client,
    ):
        assert await client.generate(IDS, 5) == generate_locally(TINY, IDS, 5, boundaries=[4])
        (failure,) = client.failures
        assert failure.peer_id == bad.peer_id
        assert reason in failure.reason
        assert bad.killed == (faults.dies_after is not None)
        assert client.blacklist == set()


async def test_faults_may_come_and_go() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot]) as server,
        simulated_client(bootstrap=[boot]) as client,
    ):
        server.faults.error = "no"
        with pytest.raises(NoChain):
            await client.generate(IDS, 2)
        with pytest.raises(ServerFailed, match="no"):
            await client.generate(IDS, 2, attempts=1)
        server.faults.error = None
        assert len(await client.generate(IDS, 2)) == 2


async def test_a_peer_that_refuses_inference_is_blacklisted() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot], throughput=99, refuses=[INFERENCE]) as bad,
        simulated_server(blocks=range(8), bootstrap=[boot]) as good,
        simulated_client(bootstrap=[boot]) as client,
    ):
        assert len(await client.generate(IDS, 2)) == 2
        assert client.blacklist == {bad.peer_id}
        assert "protocols not supported" in client.failures[0].reason
        bad.accept(INFERENCE)
        good.refuse(INFERENCE)  # which the client has spoken with before
        with pytest.raises(NoChain):
            await client.generate(IDS, 2)
        assert client.blacklist == {bad.peer_id, good.peer_id}
        assert bad.requests == []


async def test_peers_without_hello_and_leases_are_used() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot], refuses=[HELLO, LEASE]),
        simulated_client(bootstrap=[boot]) as client,
    ):
        assert len(await client.generate(IDS, 2)) == 2
        assert client.failures == []


async def test_a_denied_lease_is_no_failure() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(
            blocks=range(8), bootstrap=[boot], throughput=99, faults=Faults(at_capacity=True)
        ) as full,
        simulated_client(bootstrap=[boot]) as client,
    ):
        with pytest.raises(NoChain):
            await client.generate(IDS, 2)
        async with simulated_server(blocks=range(8), bootstrap=[boot]) as free:
            assert len(await client.generate(IDS, 2)) == 2
            assert len(free.requests) == 2
        assert client.denials == [(full.peer_id, DeniedAtCapacity(5))] * 2
        assert client.failures == []
        assert client.blacklist == set()
        assert full.requests == []


async def connect(server: SimulatedPeer, *clients: SimulatedPeer) -> None:
    for client in clients:
        await client.host.connect(server.address)


async def test_leases_are_counted_renewed_and_run_out() -> None:
    now = [1000.0]
    async with (
        simulated_server(blocks=range(8), leases=1, clock=lambda: now[0]) as server,
        simulated_client() as one,
        simulated_client() as two,
    ):
        await connect(server, one, two)
        assert await one.lease(server, "tiny-llama-v1") == Granted(1, 30)
        assert await two.lease(server, "kwaai/tiny-llama.v1") == DeniedAtCapacity(5)
        assert await two.lease(server, "other") == "DeniedWrongModel"
        now[0] += 29
        assert await one.lease(server) == Granted(1, 30)
        now[0] += 29
        assert await two.lease(server) == DeniedAtCapacity(5)
        now[0] += 2
        assert await two.lease(server) == Granted(2, 30)


async def test_sessions_have_bare_numbers_and_expire() -> None:
    now = [1000.0]
    async with (
        simulated_server(blocks=range(8), clock=lambda: now[0]) as server,
        simulated_client() as one,
        simulated_client() as two,
    ):
        await connect(server, one, two)

        async def step(client: SimulatedClient, position: int) -> str | None:
            return (await client.infer(server, InferenceRequest.of_ids(5, position, [1, 2]))).error

        assert await step(one, 0) is None
        assert await step(two, 2) is None  # another peer, the same session
        assert await step(one, 2) == "session 5 is at 4, not at 2"
        assert await step(one, 0) is None  # replaced
        assert await step(one, 2) is None
        assert list(server.span.sessions) == [5]
        now[0] += 601
        assert await step(one, 4) == "no session 5"
        assert server.span.sessions == {}


async def test_hidden_states_are_for_later_spans_only() -> None:
    async with (
        simulated_server(blocks=range(4)) as first,
        simulated_server(blocks=range(4, 8)) as last,
        simulated_client() as client,
    ):
        await connect(first, client)
        await connect(last, client)
        hidden = InferenceRequest.of_hidden(1, 0, np.zeros((1, 2, 64)))
        ids = InferenceRequest.of_ids(1, 0, [1, 2])
        assert (await client.infer(first, hidden)).error == "hidden_states for the span from block 0"
        assert (await client.infer(last, ids)).error == "token_ids for the span from block 4"
        answer = await client.infer(last, hidden)
        assert (answer.response_type, answer.shape, len(answer.data)) == ("logits", [1, 1, 384], 768)
        answer = await client.infer(first, ids)
        assert (answer.response_type, answer.shape, len(answer.data)) == ("hidden_states", [1, 2, 64], 256)


# --- what breaks the rules


def bad_call(call_id: bytes, protocol: str, body: bytes) -> bytes:
    call = sim_envelope.bytes_field(2, protocol.encode()) + sim_envelope.bytes_field(3, body)
    return sim_envelope.delimited(sim_envelope.bytes_field(1, call_id) + sim_envelope.bytes_field(3, call))


@pytest.mark.parametrize(
    ("protocol", "message", "complaint"),
    [
        (INFERENCE, bad_call(bytes(16), INFERENCE, REQUEST), "required field peer"),
        (LEASE, sim_envelope.request_message(bytes(15), b"", LEASE, b"\x80"), "16 bytes"),
        (HELLO, sim_envelope.request_message(bytes(16), b"", LEASE, b""), "a request for"),
        (HELLO, b"\xff\xff\xff\xff\x0f", "a message of"),
        (MUX, b"\x01\0\0\0\xc0", "mux frame"),
        (MUX, b"\0\0\0\x80", "a frame of"),
        (TENSOR, b"\0\0\0\1\0", "bytes where"),
    ],
)
async def test_broken_framing_is_complained_about(protocol: str, message: bytes, complaint: str) -> None:
    async with simulated_server(blocks=range(8)) as server, simulated_client() as client:
        await connect(server, client)
        stream = await client.host.open_stream(server.identity.peer_id, protocol)
        await stream.write(message)
        with trio.fail_after(5):
            await stream.wait_ended()
        (told,) = server.complaints
        assert complaint in told
        assert client.peer_id in told
        assert await client.hello(server) == "ok"


async def test_a_bad_body_is_answered_with_an_error() -> None:
    async with simulated_server(blocks=range(8)) as server, simulated_client() as client:
        await connect(server, client)
        with pytest.raises(CallError, match="without session_id"):
            await client.call(server, INFERENCE, b"\x80")
        assert len(server.complaints) == 1


# --- mux and tensors


async def test_mux_requests_are_answered_in_any_order() -> None:
    async with simulated_server(blocks=range(8)) as server, simulated_client() as client:
        await connect(server, client)
        async with client.mux(server) as mux:
            await mux.request(1, "/echo/late", b"one")
            await mux.request(2, "/echo", b"two \xff")
            assert [(await mux.receive()).fields for _ in range(2)] == [
                {"request_id": 2, "status": 200, "body": b"two \xff"},
                {"request_id": 1, "status": 200, "body": b"one"},
            ]
            await mux.request(3, "/other", b"")
            assert (await mux.receive()).fields["status"] == 404
            await mux.send("LeaseRequest", request_id=4, model=None)
            answer = await mux.receive()
            assert (answer.tag, answer.fields) == (
                "LeaseResponse",
                {"request_id": 4, "outcome": Granted(1, 30)},
            )
            await mux.send("LeaseKeepalive", lease_id=1)
            await mux.request(5, "/echo", b"", lease_id=1)
            assert (await mux.receive()).fields["status"] == 200
            await mux.send("LeaseRelease", lease_id=1)
            await mux.request(6, "/echo", b"", lease_id=1)
            assert (await mux.receive()).fields["status"] == 409
        assert server.complaints == []


def test_a_mux_frame_is_a_tagged_map_behind_its_length() -> None:
    frame = MuxFrame("Response", {"request_id": 1, "status": 200, "body": b"\x80"})
    data = frame.encode()
    assert data[:4] == len(data[4:]).to_bytes(4, "little")
    assert unpack_message(data[4:]) == {"Response": {"request_id": 1, "status": 200, "body": [128]}}
    assert MuxFrame.decode(data[4:]) == frame


async def test_a_tensor_is_received_and_acknowledged() -> None:
    async with simulated_server(blocks=range(8)) as server, simulated_client() as client:
        await connect(server, client)
        values = np.linspace(-3, 3, 300, dtype=np.float32).reshape(3, 100)
        answer = await client.send_tensor(server, "weights", values, "step 1")
        assert answer == acknowledge("weights")
        ((who, frame),) = server.tensors
        assert (who, frame.name, frame.metadata, frame.shape) == (
            client.peer_id,
            "weights",
            "step 1",
            (3, 100),
        )
        assert frame.tensor is not None
        assert np.abs(frame.tensor.values() - values).max() < 3 / 127
        stream = await client.host.open_stream(server.identity.peer_id, TENSOR)
        await stream.write(TENSOR_FRAME)
        assert (
            await StreamReader(stream).exactly(4 + len(ACK_BODY))
            == b"\0\0\0" + bytes([len(ACK_BODY)]) + ACK_BODY
        )
        await stream.close()


def repeated(*numbers: int) -> Callable[[], int]:
    return cycle(numbers).__next__


async def test_session_numbers_can_be_given() -> None:
    async with (
        simulated_bootstrap() as boot,
        simulated_server(blocks=range(8), bootstrap=[boot]) as server,
        simulated_client(bootstrap=[boot], session_ids=repeated(2**64 - 1, 7)) as client,
    ):
        await client.generate(IDS, 1)
        await client.generate(IDS, 1)
        assert [r.session_id for _, r in server.requests] == [2**64 - 1, 7]
