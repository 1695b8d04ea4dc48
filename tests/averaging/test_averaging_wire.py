"""The bytes of averaging: against the protobuf library, golden vectors of hivemind 1.1.12, and anything at all."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode, suggested_leader
from kwaainet_bridge.hivemind.averaging.group_keys import group_key, next_bits, schema_hash
from kwaainet_bridge.rpc.streams import parse
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData, MessageCode, code_name
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.pb import expert_pb2
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import encode_tensor

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())["averaging"]
PEERS = [PeerId(bytes([0, 4, n, n, n, n])) for n in range(5)]


def joined(message: AveragingData | DownloadData) -> bytes:
    return b"".join(message.parts())


def test_codes_are_those_of_the_schema() -> None:
    assert {code.name: code.value for code in MessageCode} == dict(pb.MessageCode.items())
    assert code_name(13) == "NOT_LOOKING_FOR_GROUP"
    assert code_name(99) == "code 99"


@pytest.mark.parametrize("code", [0, 4, 5])
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_a_part_has_the_bytes_that_protobuf_gives_it(code: int, weight: float) -> None:
    tensor = torch.arange(5, dtype=torch.float32)
    ours = AveragingData(code=code, group_id=b"group", tensor_part=encode_tensor(tensor), weight=weight)
    theirs = pb.AveragingData(
        code=pb.MessageCode.Name(code),
        group_id=b"group",
        tensor_part=expert_pb2.Tensor(buffer=tensor.numpy().tobytes(), size=[5], dtype="float32"),
        weight=weight,
    )
    assert joined(ours) == theirs.SerializeToString()
    read = AveragingData.read(theirs.SerializeToString())
    assert (read.code, read.group_id, read.weight) == (code, b"group", weight)
    assert read.tensor_part is not None
    assert read.tensor_part.buffer == tensor.numpy().tobytes()


def test_a_refusal_has_no_tensor() -> None:
    assert joined(AveragingData(code=MessageCode.BAD_GROUP_ID)) == bytes.fromhex("080a")
    assert AveragingData.read(bytes.fromhex("080a")).tensor_part is None


def test_a_captured_first_part() -> None:
    """``08 04 1214<gid> 22 16 {0a08 <2 floats> 1201 02 2207"float32"} 29 <f64 2.0>``, as a stock peer sent it."""
    captured = bytes.fromhex("0804 1214" + "aa" * 20 + "2216 0a08 0000803f00000040 120102 2207") + b"float32"
    captured += bytes.fromhex("29 0000000000000040")
    read = AveragingData.read(captured)
    assert (read.code, read.group_id, read.weight) == (4, b"\xaa" * 20, 2.0)
    assert joined(read) == captured


def test_a_piece_of_state_has_the_bytes_that_protobuf_gives_it() -> None:
    tensor = encode_tensor(torch.ones(3))
    ours = DownloadData(metadata=pack({"group_key": "0"}), tensor_part=tensor)
    theirs = pb.DownloadData(
        metadata=pack({"group_key": "0"}),
        tensor_part=expert_pb2.Tensor(buffer=bytes(tensor.buffer), size=[3], dtype="float32"),
    )
    assert joined(ours) == theirs.SerializeToString()
    assert joined(DownloadData.read(theirs.SerializeToString())) == theirs.SerializeToString()


@pytest.mark.parametrize("weight", ["000000000000f07f", "000000000000f87f", "000000000000f0bf"])
def test_weights_that_are_no_weights_are_refused(weight: str) -> None:
    with pytest.raises(RemoteError, match="weight is"):
        AveragingData.read(bytes.fromhex("29" + weight))


def test_a_group_id_of_any_length_is_refused() -> None:
    with pytest.raises(RemoteError, match="group_id has 65 bytes"):
        AveragingData.read(bytes.fromhex("1241") + bytes(65))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (
        AveragingData.read,
        DownloadData.read,
        About.read,
        lambda raw: suggested_leader(parse(pb.MessageFromLeader, raw, "leader")),
        lambda raw: Group.read(
            parse(pb.MessageFromLeader, raw, "leader"), own=PEERS[0], leader=PEERS[1], max_size=4
        ),
    ):
        with contextlib.suppress(RemoteError):
            read(data)


# --- keys -------------------------------------------------------------------------------------------------


def test_schema_hashes_are_those_of_stock_peers() -> None:
    tensors = [
        [torch.zeros(10), torch.zeros(3, 2, dtype=torch.float16)],
        [torch.nn.Parameter(torch.zeros(2))],
    ]
    for vector, ours in zip(GOLDEN["schema_hash"], tensors, strict=True):
        assert schema_hash(ours).hex() == vector["hex"], vector["tensors"]


def test_group_bits_follow_the_group_id_as_in_stock_peers() -> None:
    sample = GOLDEN["group_key_sample"]
    group_id = bytes.fromhex(sample["group_id"])
    assert [next_bits("00", group_id, i, 3, 4) for i in range(3)] == ["00", "01", "11"]  # 0, 1, 3
    assert [int(next_bits("0000", group_id, i, 5, 16), 2) for i in range(5)] == sample["sample_16_5"]
    assert next_bits("1", group_id, 1, 3, 4) == "1"  # as many bits as before
    assert next_bits("101", group_id, 2, 3, None) == "111"  # three peers draw below four
    assert next_bits("", group_id, 0, 3, 4) == ""
    assert group_key("run", "") == "run.0b"


# --- groups -----------------------------------------------------------------------------------------------


def test_what_a_member_says_of_itself_is_packed_as_by_stock_peers() -> None:
    about = About(None, Mode.NODE, {"who": 1})
    assert about.packed().hex() == GOLDEN["data_for_gather"]
    assert About.read(about.packed()) == about


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "not a list"),
        ([None, 0], "not a list of 3"),
        (["fast", 0, pack(1)], "bandwidth"),
        ([None, 3, pack(1)], "mode"),
        ([None, True, pack(1)], "mode"),
        ([None, [], pack(1)], "mode"),
        ([None, 0, "text"], "not bytes"),
        ([None, 0, b"\xc1"], "."),
    ],
)
def test_wrong_words_of_a_member_are_refused(fields: object, error: str) -> None:
    with pytest.raises(RemoteError, match=error):
        About.read(pack(fields))


def test_too_many_words_of_a_member_are_refused() -> None:
    with pytest.raises(RemoteError, match="at most"):
        About.read(bytes(defaults.AVERAGING_GATHER_BYTES + 1))


def test_a_group_travels_whole() -> None:
    group = Group(b"g" * 20, tuple(PEERS[:3]), (b"a", b"b", b"c"))
    assert Group.read(group.message(), own=PEERS[0], leader=PEERS[2], max_size=3) == group


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (Group(b"", tuple(PEERS[:2]), (b"", b"")), "its id"),
        (Group(b"g" * 65, tuple(PEERS[:2]), (b"", b"")), "its id"),
        (Group(b"g", tuple(PEERS), (b"",) * 5), "5 members, at most 4"),
        (Group(b"g", (PEERS[0], PEERS[1], PEERS[1]), (b"",) * 3), "twice"),
        (Group(b"g", (PEERS[1], PEERS[2]), (b"",) * 2), "not in it"),
        (Group(b"g", (PEERS[0], PEERS[2]), (b"",) * 2), "not in it"),
        (Group(b"g", tuple(PEERS[:2]), (b"",)), "1 gathered"),
    ],
)
def test_groups_that_cannot_be_ours_are_refused(group: Group, error: str) -> None:
    with pytest.raises(RemoteError, match=error):
        Group.read(group.message(), own=PEERS[0], leader=PEERS[1], max_size=4)


@pytest.mark.parametrize(
    ("bandwidth", "sound"),
    [(None, True), (0, True), (2.5, True), (-1.0, False), (math.inf, False), (math.nan, False)],
)
def test_words_with_any_number_for_a_bandwidth_are_read(bandwidth: float | None, sound: bool) -> None:
    assert About.read(pack([bandwidth, 0, pack("data")])).sound == sound
