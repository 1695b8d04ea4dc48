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
    shares = [pool.share(peer) for peer in PEERS[:greedy]]
    while sum(share.reserve(1) for share in shares):
        pass
    assert all(share.held == pytest.approx(1000 / (greedy + 1), abs=2) for share in shares)
    assert pool.share(PEERS[-1]).reserve(10)


def test_what_is_too_much_is_not_taken() -> None:
    pool = FairPool(100)
    share = pool.share(PEERS[0])
    assert not share.reserve(101)
    assert (share.held, pool.used) == (0, 0)


def test_the_limit_of_one_peer() -> None:
    pool = FairPool(100, per_peer=3)
    share = pool.share(PEERS[0])
    assert share.reserve(3)
    assert not share.reserve(1)
    share.release(1)
    assert share.reserve(1)
    assert pool.share(PEERS[1]).reserve(1)


def test_a_share_is_kept_while_it_is_held_and_not_longer() -> None:
    pool = FairPool(100)
    share = pool.share(PEERS[0])
    share.reserve(1)
    assert pool.share(PEERS[0]) is share
    share.release(1)
    del share
    assert len(pool) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans())))
def test_used_is_the_sum_and_never_above_the_limit(steps: list[tuple[int, int, bool]]) -> None:
    pool = FairPool(200, per_peer=90)
    shares = [pool.share(peer) for peer in PEERS[:6]]
    for number, amount, take in steps:
        share = shares[number]
        if take:
            share.reserve(amount)
        else:
            share.release(min(amount, share.held))
        assert pool.used == sum(s.held for s in shares) <= pool.limit
        assert all(s.held <= 90 for s in shares)
