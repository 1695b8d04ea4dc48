"""/kwaai/avg/1.0.0: its bytes and rules, beside an encoder written by hand from its page."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import kwaai_avg_by_hand as hand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.config import parse_config
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging import kwaai
from kwaainet_bridge.hivemind.averaging.dialect import dialect_of
from kwaainet_bridge.hivemind.averaging.group import About, Group, Mode, leader_message
from kwaainet_bridge.hivemind.averaging.group_keys import group_key, next_bits, state_key
from kwaainet_bridge.hivemind.averaging.split import share_elements
from kwaainet_bridge.rpc.streams import parse, parts
from kwaainet_bridge.wire.averaging import AveragingData, DownloadData, MessageCode
from kwaainet_bridge.wire.frames import LENGTH_FIRST, FrameDecoder
from kwaainet_bridge.wire.msgpack import pack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import encode_tensor, split_tensor

PAGE = (Path(__file__).parents[2] / "docs" / "protocols" / "kwaai-avg.md").read_text(encoding="utf-8")

LINES = ["float32[40,3]", "bfloat16[]"]
TENSORS = [torch.zeros(40, 3), torch.zeros((), dtype=torch.bfloat16)]
SCHEMA = hand.schema(LINES, 0, 524288)
ID = bytes(range(20))
PEERS = (b"\x00\x02\xaa\x01", b"\x00\x02\xaa\x02")
GATHER = hand.nil_gather()
RUN = dialect_of("kwaai", "run", "")

FLOATS = torch.tensor([1.0, -2.0])
HALVES = torch.tensor([0.5, 0.25, -1.0])
STATE = list(split_tensor(encode_tensor(FLOATS.reshape(2, 1)), 4))

GOLDEN: list[tuple[bytes, Any]] = [
    (
        hand.join(SCHEMA, 1700000010.5, GATHER, "/kwaai/avg/1.0.0/run.0b01"),
        pb.JoinRequest(
            schema_hash=RUN.schema(TENSORS, CompressionType.NONE, 524288),
            expiration=1700000010.5,
            gather=About(None, Mode.NODE, None).packed(),
            group_key=group_key(RUN.record_prefix, "01"),
        ),
    ),
    (hand.END, None),
    (hand.from_leader(2), leader_message(MessageCode.ACCEPTED)),
    (
        hand.from_leader(3, ID, members=PEERS, gathered=(GATHER, GATHER)),
        Group(ID, tuple(map(PeerId, PEERS)), (GATHER, GATHER)).message(),
    ),
    (
        hand.from_leader(17, suggested=PEERS[1]),
        leader_message(MessageCode.GROUP_DISBANDED, suggested=PeerId(PEERS[1])),
    ),
    (
        hand.averaging(4, ID, hand.tensor(hand.floats(1, -2), (2,), "float32"), 2.0),
        AveragingData(
            code=MessageCode.PART_FOR_AVERAGING, group_id=ID, tensor_part=encode_tensor(FLOATS), weight=2.0
        ),
    ),
    (
        hand.averaging(0, b"", hand.tensor(struct.pack("<3e", 0.5, 0.25, -1), (3,), "float32", 2), 2.0),
        AveragingData(tensor_part=encode_tensor(HALVES, CompressionType.FLOAT16), weight=2.0),
    ),
    (
        hand.averaging(5, part=hand.tensor(hand.floats(1, -2), (2,), "float32")),
        AveragingData(code=MessageCode.AVERAGED_PART, tensor_part=encode_tensor(FLOATS)),
    ),
    (hand.averaging(10), AveragingData(code=MessageCode.BAD_GROUP_ID)),
    (hand.frame(b""), pb.DownloadRequest()),
    (
        hand.state_piece(
            hand.tensor(hand.floats(1), (2, 1), "float32", chunks=2),
            metadata=b"\x81\xa9group_key\xa0",
        ),
        DownloadData(metadata=pack({"group_key": ""}), tensor_part=STATE[0]),
    ),
    (hand.state_piece(hand.tensor(hand.floats(-2))), DownloadData(tensor_part=STATE[1])),
    (hand.error("no"), "no"),
]


def written(message: Any) -> bytes:
    if message is None:
        return LENGTH_FIRST.encode_end()
    if isinstance(message, str):
        return LENGTH_FIRST.encode_error(message)
    return LENGTH_FIRST.encode_message(*parts(message))


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_frames(number: int) -> None:
    by_hand, message = GOLDEN[number]
    assert written(message).hex() == by_hand.hex()
    (frame,) = FrameDecoder(1 << 20, order=LENGTH_FIRST).feed(by_hand)
    if message is None or isinstance(message, str):
        assert (frame.marker, frame.error_text) == (1, message or "")
    else:
        assert frame.marker == 0
        again = parse(type(message), frame.payload, "test")
        assert b"".join(parts(again)) == b"".join(parts(message))


def test_the_page_has_these_bytes() -> None:
    rows = re.findall(r"\| `([0-9a-f]{18,})` \|$", PAGE, re.MULTILINE)
    assert rows == [by_hand.hex() for by_hand, _ in GOLDEN]


def test_the_page_names_every_code() -> None:
    told = {
        int(number): name for number, name in re.findall(r"^\| (\d+) \| ([A-Z_]{5,})", PAGE, re.MULTILINE)
    }
    assert told == {code.value: code.name for code in MessageCode if code is not MessageCode.REQUEST_JOIN}


def test_the_example_of_a_node_can_be_read() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (helped,) = parse_config(example, "docs/protocols/kwaai-avg.md").averaging.runs
    assert (helped.network, helped.prefix) == ("kwaainet", "run")


def test_the_ids_and_keys_are_those_of_the_page() -> None:
    calls = RUN.methods.join_group, RUN.methods.aggregate_part, RUN.methods.download_state
    assert [call.name for call in calls] == [f"{hand.NAME}run/{call}" for call in ("join", "parts", "state")]
    assert all(call.order is LENGTH_FIRST for call in calls)
    assert group_key(RUN.record_prefix, "") == "/kwaai/avg/1.0.0/run.0b"
    assert state_key(RUN.record_prefix) == "/kwaai/avg/1.0.0/run.all_averagers"


@pytest.mark.parametrize("prefix", ["", "a.b", "a/b", "a b", "a\n", "ä", "x" * 65])
def test_prefixes_that_fit_no_id_are_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64 letters"):
        dialect_of("kwaai", prefix, "")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="must be hivemind or kwaai"):
        dialect_of("other", "run", "")  # type: ignore[arg-type]


# --- rules


def test_the_schema_tells_shapes_dtypes_compression_and_part_size_apart() -> None:
    def schema(tensors: list[torch.Tensor], compression: int = 0, part_bytes: int = 64) -> bytes:
        return kwaai.schema_hash(tensors, CompressionType(compression), part_bytes)

    assert schema(TENSORS) == hand.schema(LINES, 0, 64)
    others = [
        schema(TENSORS[::-1]),
        schema([torch.zeros(3, 40), TENSORS[1]]),
        schema([torch.zeros(40, 3), torch.zeros(1, dtype=torch.bfloat16)]),
        schema([torch.zeros(40, 3, dtype=torch.float16), TENSORS[1]]),
        schema(TENSORS, 2),
        schema(TENSORS, part_bytes=65),
        schema(TENSORS[:1]),
    ]
    assert len({schema(TENSORS), *others}) == 1 + len(others)
    # a parameter and a bare tensor of the same shape are averaged with each other
    assert schema([torch.zeros(2, requires_grad=True)]) == schema([torch.ones(2)])


BANDWIDTHS = st.lists(
    st.none() | st.just(0.0) | st.integers(1, 4096).map(lambda n: n / 8), min_size=2, max_size=8
)


@given(BANDWIDTHS, st.integers(0, 5000))
def test_shares_are_those_of_exact_numbers(bandwidths: list[float | None], total: int) -> None:
    """To one element: a product may be a whole number, and its rounding just below."""
    if not any(bandwidth is None or bandwidth for bandwidth in bandwidths):
        with pytest.raises(RemoteError, match="nobody in the group averages"):
            share_elements(total, bandwidths, kwaai.scores)
        return
    ours = share_elements(total, bandwidths, kwaai.scores)
    assert sum(ours) == total
    for share, exact in zip(ours, hand.shares(total, bandwidths), strict=True):
        assert abs(share - exact) <= 1


def test_shares_of_an_example() -> None:
    """Bandwidths 100, 1, the mean, 20; in the page's words."""
    assert hand.shares(20_000, [100.0, 1.0, None, 20.0]) == list(
        share_elements(20_000, [100.0, 1.0, None, 20.0], kwaai.scores)
    )
    assert share_elements(1000, [3.0, 9.0], kwaai.scores) == (500, 500)
    assert share_elements(1000, [3.0, 0.0, None], kwaai.scores) == (500, 0, 500)


@given(BANDWIDTHS.filter(any))
def test_all_who_average_take_the_same_time_and_nobody_could_take_less(
    bandwidths: list[float | None],
) -> None:
    scores = kwaai.scores(bandwidths)
    if len(scores) == 2:
        return
    given = [b for b in bandwidths if b]
    each = [sum(given) / len(given) if b is None else b for b in bandwidths]
    times = [
        (1 + (len(each) - 2) * score / sum(scores)) / b
        for score, b in zip(scores, each, strict=True)
        if score
    ]
    assert max(times) == pytest.approx(min(times))
    idle = [1 / b for score, b in zip(scores, each, strict=True) if b and not score]
    assert all(time >= max(times) * (1 - 1e-9) for time in idle)


@pytest.mark.parametrize("bandwidth", [-1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_fails_the_group(bandwidth: float) -> None:
    with pytest.raises(RemoteError, match="finite and at least 0"):
        kwaai.scores([1.0, None, bandwidth])


def test_a_sum_beyond_float64_fails_the_group() -> None:
    with pytest.raises(RemoteError, match="sum is infinite"):
        kwaai.scores([1e308, 1e308, 1e308])


@given(st.binary(min_size=1, max_size=64), st.text("01", max_size=6), st.data())
def test_bits_are_those_of_the_page_and_members_go_apart(
    group_id: bytes, bits: str, data: st.DataObject
) -> None:
    target = data.draw(st.none() | st.integers(2, 16))
    size = data.draw(st.integers(2, target or 20))
    after = [next_bits(bits, group_id, place, size, target, numbers=kwaai.numbers) for place in range(size)]
    assert after == [hand.next_bits(bits, group_id, place, size, target) for place in range(size)]
    if len(bits) >= 5:
        assert len(set(after)) == size
