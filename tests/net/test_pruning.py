"""Which connections can go, and which of several is used: rules without a network."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.pruning import Protection, expendable, preferred
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C, D = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(4))
NOBODY = Protection()


@dataclass
class Pretended:
    remote: PeerId
    initiator: bool = False
    opened_at: float = 0.0
    used_at: float = 0.0
    in_use: bool = False
    leaving: bool = False


def peers(connections: list[Pretended]) -> list[PeerId]:
    return [c.remote for c in connections]


def test_the_longest_unused_goes_first() -> None:
    many = [Pretended(A, used_at=3), Pretended(B, used_at=1), Pretended(C, used_at=2)]
    assert peers(expendable(many, NOBODY, opened_before=0)) == [B, C, A]


def test_inbound_goes_before_outbound() -> None:
    many = [Pretended(A, initiator=True, used_at=1), Pretended(B, used_at=2)]
    assert peers(expendable(many, NOBODY, opened_before=0)) == [B, A]


@pytest.mark.parametrize("kept", [{"in_use": True}, {"opened_at": 5}, {"leaving": True}])
def test_some_stay(kept: dict) -> None:
    many = [Pretended(A, **kept), Pretended(B)]
    assert peers(expendable(many, NOBODY, opened_before=4)) == [B]


def test_protection_ends_with_its_last_tag() -> None:
    protection = Protection()
    protection.add(A, "bootstrap")
    protection.add(A, "bootstrap")
    protection.add(A, "session")
    for tag in ("bootstrap", "session", "bootstrap"):
        assert peers(expendable([Pretended(A), Pretended(B)], protection, opened_before=0)) == [B]
        protection.remove(A, tag)
    assert A not in protection


def test_protection_is_removed_once_only() -> None:
    protection = Protection()
    protection.add(A, "one")
    with pytest.raises(ValueError, match="not protected as 'other'"):
        protection.remove(A, "other")
    with pytest.raises(ValueError, match="not protected"):
        protection.remove(B, "one")
    protection.remove(A, "one")
    with pytest.raises(ValueError, match="not protected"):
        protection.remove(A, "one")


def both_ends(dialled_by_smaller: list[bool], times: list[float]) -> tuple[int, int]:
    """Which connection each end prefers, of those between A and B in the order they were opened."""
    at_a = [
        Pretended(B, initiator=mine, opened_at=t) for mine, t in zip(dialled_by_smaller, times, strict=True)
    ]
    at_b = [
        Pretended(A, initiator=not mine, opened_at=t)
        for mine, t in zip(dialled_by_smaller, times, strict=True)
    ]
    return tuple(
        connections.index(preferred(own, connections, simultaneous=10))
        for own, connections in ((A, at_a), (B, at_b))
    )


@pytest.mark.parametrize(
    ("dialled_by_smaller", "times", "expected"),
    [
        ([True, False], [0, 1], 0),
        ([False, True], [0, 1], 1),
        ([True, False], [0, 11], 1),  # the smaller one has lost the first
        ([False, True], [0, 11], 1),
        ([True, True], [0, 1], 1),  # the newest of equals
        ([False, False, False], [0, 1, 2], 2),
        ([False, True, False], [0, 1, 2], 1),
    ],
)
def test_both_ends_prefer_the_same_connection(dialled_by_smaller, times, expected) -> None:
    assert both_ends(dialled_by_smaller, times) == (expected, expected)


def test_the_order_in_which_both_dials_arrive_does_not_matter() -> None:
    """Each end may see its own dial finish first."""
    at_a = [Pretended(B, initiator=True), Pretended(B, initiator=False)]
    at_b = [Pretended(A, initiator=True), Pretended(A, initiator=False)]
    assert preferred(A, at_a, simultaneous=10).initiator
    assert not preferred(B, at_b, simultaneous=10).initiator


def test_none_of_none() -> None:
    assert preferred(A, [], simultaneous=10) is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(connections=100), (80, 60)),
        (Limits(connections=100, connections_high=90, connections_low=10), (90, 10)),
        (Limits(connections=50, connections_high=90, connections_low=70), (50, 50)),  # few descriptors
        (Limits(connections=100, connections_high=20), (20, 20)),
    ],
)
def test_watermarks_stay_in_order(limits: Limits, expected) -> None:
    assert (limits.high, limits.low) == expected
