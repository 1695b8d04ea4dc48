"""A pool that no few peers can empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.wire.peer_id import PeerId

PEERS = [PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(40)]


@pytest.mark.parametrize("greedy", [1, 2, 7, 30])
def test_greedy_peers_leave_something(greedy: int) -> None:
    pool = FairPool(1000)
    while sum(pool.reserve(peer, 1) for peer in PEERS[:greedy]):
        pass
    assert all(pool.held(peer) == pytest.approx(1000 / (greedy + 1), abs=2) for peer in PEERS[:greedy])
    assert pool.reserve(PEERS[-1], 10)


def test_what_is_too_much_is_not_taken() -> None:
    pool = FairPool(100)
    assert not pool.reserve(PEERS[0], 101)
    assert (pool.held(PEERS[0]), pool.used, len(pool)) == (0, 0, 0)


def test_the_limit_of_one_peer() -> None:
    pool = FairPool(100, per_peer=3)
    assert pool.reserve(PEERS[0], 3)
    assert not pool.reserve(PEERS[0], 1)
    pool.release(PEERS[0], 1)
    assert pool.reserve(PEERS[0], 1)
    assert pool.reserve(PEERS[1], 1)


def test_who_has_nothing_is_forgotten() -> None:
    pool = FairPool(100)
    for peer in PEERS:
        pool.reserve(peer, 2)
        pool.release(peer, 1)
        pool.release(peer, 1)
    assert (pool.used, len(pool)) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans())))
def test_used_is_the_sum_and_never_above_the_limit(steps: list[tuple[int, int, bool]]) -> None:
    pool = FairPool(200, per_peer=90)
    for number, amount, take in steps:
        peer = PEERS[number]
        if take:
            pool.reserve(peer, amount)
        else:
            pool.release(peer, min(amount, pool.held(peer)))
        assert pool.used == sum(map(pool.held, PEERS)) <= pool.limit
        assert all(pool.held(peer) <= 90 for peer in PEERS)
