"""How many dials strangers can make a host begin."""

from __future__ import annotations

from kwaainet_bridge.net.dial_quota import DialQuota
from kwaainet_bridge.wire.peer_id import PeerId


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def test_a_peer_has_few_and_all_together_some() -> None:
    now = 0.0
    quota = DialQuota(5, per_peer=2, seconds=60, clock=lambda: now)
    assert [quota.take(peer(1)) for _ in range(3)] == [True, True, False]
    assert [quota.take(peer(n)) for n in range(2, 6)] == [True, True, True, False]
    now = 59.9
    assert not quota.take(peer(9))
    now = 60.0
    assert [quota.take(peer(1)) for _ in range(3)] == [True, True, False]
    assert len(quota._recent) == 2
