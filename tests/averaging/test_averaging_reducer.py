"""The reducing machine: averages in order, senders that fail, values that would spoil a sum, deadlines."""

from __future__ import annotations

import math

import pytest
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.reducer import Reducer, all_finite, check_values
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C = PEERS = [PeerId(bytes([0, 2, n, n])) for n in range(3)]


def give(
    reducer: Reducer, sender: PeerId, values: list[float], weight: float = 1.0, now: float = 0.0
) -> list[int]:
    part = torch.tensor(values, dtype=torch.float32)
    reducer.check(part, weight)
    return reducer.add(sender, part, weight, now=now)


def average(reducer: Reducer, number: int) -> list[float]:
    found = reducer.average(number)
    assert found is not None
    return found.tolist()


def test_a_part_is_averaged_once_everybody_gave_it() -> None:
    reducer = Reducer([2, 1], PEERS, now=0)
    assert give(reducer, A, [1, 2]) == []
    assert give(reducer, B, [3, 4], 2.0) == []
    assert give(reducer, C, [5, 6], 1.0) == [0]
    assert average(reducer, 0) == [3.0, 4.0]
    assert not reducer.done
    for peer in PEERS:
        give(reducer, peer, [7])
    assert reducer.done
    assert average(reducer, 1) == [7.0]


def test_who_failed_is_left_out_of_what_it_did_not_give() -> None:
    reducer = Reducer([1, 1], PEERS, now=0)
    give(reducer, A, [1])
    give(reducer, B, [3])
    give(reducer, C, [5])
    assert average(reducer, 0) == [3.0]
    assert give(reducer, A, [1]) == give(reducer, B, [3]) == []
    assert reducer.fail(C, "gone", now=0) == [1]
    assert average(reducer, 1) == [2.0]
    with pytest.raises(LookupError, match="part 0 was not completed last: that was 1"):
        reducer.average(0)
    assert reducer.failed == {C: "gone"}


def test_a_failure_can_complete_only_what_others_gave() -> None:
    reducer = Reducer([1], PEERS, now=0)
    give(reducer, A, [4])
    assert reducer.fail(B, "first", now=0) == []
    assert reducer.fail(B, "second", now=0) == []
    assert reducer.fail(C, "gone", now=0) == [0]
    assert average(reducer, 0) == [4.0]
    assert reducer.failed == {B: "first", C: "gone"}
    assert reducer.fail(A, "too late", now=0) == []


def test_if_nobody_has_weight_there_is_no_average() -> None:
    reducer = Reducer([1], [A, B], now=0)
    give(reducer, A, [4], 0.0)
    assert give(reducer, B, [4], 0.0) == [0]
    assert reducer.average(0) is None


def test_a_share_without_parts_is_done_at_once() -> None:
    reducer = Reducer([], PEERS, now=0)
    assert reducer.done
    assert reducer.deadline() == math.inf
    with pytest.raises(RemoteError, match="more than 0 parts"):
        reducer.expected(A)


def test_parts_out_of_turn_are_refused() -> None:
    reducer = Reducer([1, 2], PEERS, now=0)
    assert reducer.expected(A) == 1
    with pytest.raises(RemoteError, match="2 elements, not 1"):
        give(reducer, A, [1, 2])
    give(reducer, A, [1])
    with pytest.raises(RemoteError, match="sent part 1 before part 0"):
        give(reducer, A, [1, 2])
    with pytest.raises(RemoteError, match="not in the group"):
        reducer.expected(PeerId(bytes([0, 1, 9])))
    reducer.fail(B, "silent", now=0)
    with pytest.raises(RemoteError, match="left out: silent"):
        give(reducer, B, [1])


@pytest.mark.parametrize(
    ("values", "weight"),
    [
        ([math.nan], 1.0),
        ([math.inf], 1.0),
        ([-math.inf], 0.0),
        ([1e30], 1e9),
        ([math.nan], 0.0),
        ([2e36], 1.0),
    ],
)
def test_values_that_would_spoil_a_sum_are_refused(values: list[float], weight: float) -> None:
    reducer = Reducer([1], [A, B], now=0)
    with pytest.raises(RemoteError, match="value times its weight"):
        give(reducer, A, values, weight)
    assert reducer.received(A) == 0


def test_a_full_group_of_the_largest_values_has_a_finite_average() -> None:
    senders = [PeerId(bytes([0, 1, n])) for n in range(defaults.AVERAGING_MAX_GROUP)]
    reducer = Reducer([1], senders, now=0)
    for sender in senders:
        give(reducer, sender, [9e35])
    assert average(reducer, 0) == pytest.approx([9e35], rel=1e-5)


def test_values_over_the_norm_are_refused() -> None:
    reducer = Reducer([2], [A], now=0, max_rms=10.0)
    with pytest.raises(RemoteError, match=r"root mean square 10\.0\d+ exceeds 10"):
        give(reducer, A, [10.0, 10.1])
    give(reducer, A, [10.0, 10.0])
    with pytest.raises(RemoteError, match="not finite"):
        check_values(torch.tensor([math.nan]), math.inf)
    for limit in (math.inf, 3.1e38):
        check_values(torch.full((3,), 3e38), limit)
        with pytest.raises(RemoteError, match="not finite"):
            check_values(torch.tensor([1.0, -math.inf]), limit)
    check_values(torch.empty(0), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype: torch.dtype, value: float) -> None:
    good = torch.linspace(-100, 100, 1003, dtype=dtype)
    assert all_finite([good, torch.empty(0, dtype=dtype)])
    for place in (0, 500, 1002):
        bad = good.clone()
        bad[place] = value
        assert not all_finite([good, bad])


def test_only_floats_are_averaged() -> None:
    with pytest.raises(RemoteError, match=r"dtype torch\.bool"):
        Reducer([1], [A], now=0).check(torch.tensor([True]), 1.0)


def test_half_precision_is_summed_in_single() -> None:
    reducer = Reducer([1], [A, B], now=0)
    for sender in (A, B):
        part = torch.tensor([60000.0], dtype=torch.float16)
        reducer.check(part, 1.0)
        reducer.add(sender, part, 1.0, now=0)
    assert average(reducer, 0) == [60000.0]


def test_whoever_is_late_is_known_at_the_deadline() -> None:
    reducer = Reducer([1, 1, 1, 1], PEERS, now=100.0)
    first = 100.0 + defaults.AVERAGING_PART_SECONDS
    assert reducer.deadline() == first
    give(reducer, A, [1], now=101)
    assert reducer.late(first - 0.1) == []
    assert reducer.late(first) == [B, C]
    give(reducer, B, [1], now=110)
    give(reducer, C, [1], now=114)
    assert reducer.deadline() == 114 + defaults.AVERAGING_PART_SECONDS
    # a slow part makes the next one's deadline later
    for sender in PEERS:
        give(reducer, sender, [1], now=117)
    assert reducer.deadline() == 117 + 3 * defaults.AVERAGING_PART_FACTOR
    # but not so much later that others give us up
    for sender in PEERS:
        give(reducer, sender, [1], now=137)
    assert reducer.deadline() == 137 + defaults.AVERAGING_RESULT_SECONDS / 2
    for sender in PEERS:
        give(reducer, sender, [1], now=138)
    assert reducer.done
    assert reducer.late(1e9) == []


def test_deadlines_follow_the_time_that_a_part_has() -> None:
    reducer = Reducer([1, 1, 1], PEERS, now=100.0, part_seconds=2.0)
    assert reducer.deadline() == 102
    for now in (101, 110):  # the second part took long
        for sender in PEERS:
            give(reducer, sender, [1], now=now)
    assert reducer.deadline() == 110 + 2 * 2.0
