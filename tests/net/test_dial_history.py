"""Results of dials, and the pauses between them; time and chance are the test's."""

from __future__ import annotations

import random

import pytest

from kwaainet_bridge import defaults
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.dial_history import DialHistory
from kwaainet_bridge.wire.peer_id import PeerId

A, B = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(2))
HERE = Address("ip4", "8.8.8.8", 1)
THERE = Address("ip4", "8.8.4.4", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> DialHistory:
    return DialHistory(clock=clock, rng=random.Random(1))


def test_pauses_double_up_to_a_bound_and_are_random(clock: Clock, history: DialHistory) -> None:
    pauses = []
    for _ in range(40):
        history.failed(A, HERE, "tcp", "refused")
        [result] = history.of(A)
        pauses.append(result.retry_at - clock.now)
        assert history.waiting(A, HERE) == result
        assert history.seconds_left(result) == pytest.approx(pauses[-1])
        clock.now = result.retry_at
        assert history.waiting(A, HERE) is None
    bounds = [min(defaults.DIAL_MAX_BACKOFF_SECONDS, 2.0 * 2**i) for i in range(40)]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len(set(pauses)) == 40


def test_failures_without_end_do_not_overflow(clock: Clock, history: DialHistory) -> None:
    for _ in range(3000):
        history.failed(A, HERE, "tcp", "refused")
    [result] = history.of(A)
    assert result.failures == 3000
    assert result.retry_at - clock.now <= defaults.DIAL_MAX_BACKOFF_SECONDS


def test_success_clears_it(clock: Clock, history: DialHistory) -> None:
    for _ in range(5):
        history.failed(A, HERE, "tcp", "refused")
    history.succeeded(A, HERE)
    assert history.waiting(A, HERE) is None
    history.failed(A, HERE, "dns", "unknown")
    [result] = history.of(A)
    assert (result.failures, result.hop, result.error) == (1, "dns", "unknown")


def test_forgiving_is_by_address(history: DialHistory) -> None:
    for address in (HERE, THERE):
        history.failed(A, address, "tcp", "refused")
    history.forgive(A, [HERE])
    assert history.waiting(A, HERE) is None
    assert history.waiting(A, THERE) is not None
    history.forgive(B, [HERE])


def test_peers_do_not_share_failures(history: DialHistory) -> None:
    history.failed(A, HERE, "tcp", "refused")
    assert history.waiting(B, HERE) is None
    assert history.of(B) == []


def test_it_is_bounded(history: DialHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_DIALLED_PEERS", 3)
    peers = [PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(5)]
    for peer in peers:
        for port in range(1, 100):
            history.failed(peer, Address("ip4", "8.8.8.8", port), "tcp", "refused")
    assert [bool(history.of(peer)) for peer in peers] == [False, False, True, True, True]
    assert len(history.of(peers[-1])) == defaults.MAX_ADDRESSES_PER_PEER
    assert history.of(peers[-1])[-1].address.port == 99
