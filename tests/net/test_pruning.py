"""Which connections can go, and which of several is used: rules without a network."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.membership import Membership
from kwaainet_bridge.net.pruning import Pruning, preferred
from kwaainet_bridge.wire.peer_id import PeerId

A, B, C, D = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(4))


@dataclass
class Pretended:
    remote: PeerId
    initiator: bool = False
    opened_at: float = 0.0
    used_at: float = 0.0
    in_use: bool = False
    leaving: bool = False
    used: bool = True


def peers(connections: list[Pretended]) -> list[PeerId]:
    return [c.remote for c in connections]


def pruning(*, networks: dict[str, list[str]] | None = None, **limits) -> Pruning:
    return Pruning(Limits(**limits), Membership(networks or {}))


def expendable(many: list[Pretended], *, opened_before: float = 0) -> list[PeerId]:
    return peers(pruning().expendable(many, opened_before=opened_before))


def test_the_longest_unused_goes_first() -> None:
    many = [Pretended(A, used_at=3), Pretended(B, used_at=1), Pretended(C, used_at=2)]
    assert expendable(many) == [B, C, A]


def test_inbound_goes_before_outbound() -> None:
    many = [Pretended(A, initiator=True, used_at=1), Pretended(B, used_at=2)]
    assert expendable(many) == [B, A]


@pytest.mark.parametrize("kept", [{"in_use": True}, {"opened_at": 5}, {"leaving": True}])
def test_some_stay(kept: dict) -> None:
    many = [Pretended(A, **kept), Pretended(B)]
    assert expendable(many, opened_before=4) == [B]


def test_protection_ends_with_its_last_tag() -> None:
    rules = pruning()
    protection = rules.protection
    protection.add(A, "bootstrap")
    protection.add(A, "bootstrap")
    protection.add(A, "session")
    for tag in ("bootstrap", "session", "bootstrap"):
        assert peers(rules.expendable([Pretended(A), Pretended(B)], opened_before=0)) == [B]
        protection.remove(A, tag)
    assert A not in protection


def test_protection_is_removed_once_only() -> None:
    protection = pruning().protection
    protection.add(A, "one")
    with pytest.raises(ValueError, match="not protected as 'other'"):
        protection.remove(A, "other")
    with pytest.raises(ValueError, match="not protected"):
        protection.remove(B, "one")
    protection.remove(A, "one")
    with pytest.raises(ValueError, match="not protected"):
        protection.remove(A, "one")


# --- strangers and networks

PETALS = {"petals": ["DHTProtocol."]}
BOTH = {"kwaainet": ["/kwaai/"], "petals": ["DHTProtocol."]}


def many_peers(number: int, *, first: int = 0) -> list[PeerId]:
    return [PeerId(b"\x12\x20" + (first + i).to_bytes(32, "big")) for i in range(number)]


class Meeting:
    """A host's connections: some of members of a network, some of strangers, at the time 1000."""

    def __init__(self, *, networks: dict[str, list[str]] = PETALS, **limits) -> None:
        self.membership = Membership(networks)
        self.pruning = Pruning(Limits(**limits), self.membership)
        self.connections: list[Pretended] = []

    def meet(self, number: int, speaking: str = "/ipfs/kad/1.0.0", **known) -> list[Pretended]:
        new = [
            Pretended(peer, **{"used": False, **known})
            for peer in many_peers(number, first=len(self.connections))
        ]
        for connection in new:
            self.membership.speaks(connection.remote, [speaking])
        self.connections += new
        return new

    def surplus(self) -> list[Pretended]:
        return self.pruning.surplus(self.connections, opened_before=970)

    def first_to_go(self, number: int) -> list[Pretended]:
        """When this host is full."""
        return self.pruning.expendable(self.connections, opened_before=1000)[:number]


def test_strangers_beyond_their_number_go_the_longest_unused_first() -> None:
    meeting = Meeting(connections=1000, strangers=3)
    meeting.meet(5, "DHTProtocol.rpc_ping")
    strangers = [meeting.meet(1, used_at=t)[0] for t in (5, 3, 4, 1, 2)]
    assert meeting.surplus() == [strangers[3], strangers[4]]
    meeting.connections.remove(strangers[3])
    meeting.connections.remove(strangers[4])
    assert meeting.surplus() == []


@pytest.mark.parametrize("kept", [{"used": True}, {"in_use": True}, {"opened_at": 980.0}])
def test_who_is_no_stranger(kept: dict) -> None:
    """A stock client lists no protocol of its swarm: it is known by using one, and has time to."""
    meeting = Meeting(connections=1000, strangers=0)
    meeting.meet(50, **kept)
    assert meeting.surplus() == []


def test_a_protected_peer_is_no_stranger() -> None:
    meeting = Meeting(connections=1000, strangers=0)
    [bootstrap, other] = meeting.meet(2)
    meeting.pruning.protection.add(bootstrap.remote, "bootstrap")
    assert meeting.surplus() == [other]


def test_no_strangers_at_all() -> None:
    meeting = Meeting(connections=1000, strangers=0)
    strangers = meeting.meet(3)
    assert meeting.surplus() == strangers
    assert meeting.pruning.few == 0


def test_without_networks_nobody_is_a_stranger() -> None:
    meeting = Meeting(networks={}, connections=1000, strangers=0)
    meeting.meet(700)
    assert meeting.surplus() == []
    assert meeting.pruning.few == 800


def test_a_tenth_of_the_places_are_for_strangers() -> None:
    assert Limits().most_strangers == 200
    assert Limits(connections=50).most_strangers == 5
    assert Limits(connections=50, strangers=0).most_strangers == 0


def test_above_the_watermark_strangers_go_before_any_swarm_peer() -> None:
    meeting = Meeting(connections=100, strangers=30)
    members = meeting.meet(75, "DHTProtocol.rpc_ping", used=True, used_at=1)
    strangers = meeting.meet(20, initiator=True, used_at=900)
    assert meeting.surplus() == strangers  # 95 are more than 80; of 75 none would have to go
    meeting.meet(10, "DHTProtocol.rpc_ping", used=True, used_at=2)
    assert meeting.surplus() == strangers + members[:25]  # now 60 are left, as without strangers


def test_strangers_who_come_all_at_once_take_no_swarm_peers_place() -> None:
    """They are young, so that none of them can go yet; then it is they who go."""
    meeting = Meeting(connections=1000)
    meeting.meet(700, "DHTProtocol.rpc_ping", used=True)
    strangers = meeting.meet(300, opened_at=999)
    assert meeting.surplus() == []
    assert meeting.first_to_go(300) == strangers  # while new ones keep coming
    for stranger in strangers:
        stranger.opened_at = 900
    assert meeting.surplus() == strangers


def test_young_swarm_peers_count_at_once() -> None:
    meeting = Meeting(connections=100)
    old = meeting.meet(60, "DHTProtocol.rpc_ping")
    meeting.meet(30, "DHTProtocol.rpc_ping", opened_at=999)
    assert meeting.surplus() == old[:30]


def test_a_network_beyond_its_quota_goes_before_the_others() -> None:
    meeting = Meeting(networks=BOTH, connections=10, connections_per_network={"kwaainet": 2})
    petals = meeting.meet(3, "DHTProtocol.rpc_ping", used_at=1)
    kwaai = [meeting.meet(1, "/kwaai/kad/1.0.0", used_at=t)[0] for t in (10, 11, 12, 13)]
    [client] = meeting.meet(1, used=True, used_at=0)
    [stranger] = meeting.meet(1, used_at=20)
    assert meeting.first_to_go(99) == [stranger, *kwaai[:2], client, *petals, *kwaai[2:]]


def test_connections_in_use_count_against_a_quota_and_stay() -> None:
    meeting = Meeting(connections=10, connections_per_network={"petals": 2})
    meeting.meet(2, "DHTProtocol.rpc_ping", used=True, in_use=True)
    [idle] = meeting.meet(1, "DHTProtocol.rpc_ping", used_at=50)
    [client] = meeting.meet(1, used=True, used_at=1)
    assert meeting.first_to_go(9) == [idle, client]


def test_membership_is_what_peers_serve_or_use() -> None:
    membership = Membership(BOTH)
    membership.speaks(A, ["/ipfs/kad/1.0.0", "DHTProtocol.rpc_find"])
    assert membership.of(A) == "petals"
    membership.speaks(A, ["/ipfs/ping/1.0.0"])
    assert membership.of(A) == "petals"
    membership.speaks(A, ["/kwaai/kad/1.0.0"])  # in both: the first counts
    membership.speaks(A, ["DHTProtocol.rpc_find"])
    assert membership.of(A) == "kwaainet"
    membership.forget(A)
    assert membership.of(A) is None
    membership.speaks(A, ["/ipfs/kad/1.0.0", "/ipfs/DHTProtocol.rpc_find"])
    assert membership.of(A) is None
    membership.forget(B)


# --- several connections to one peer


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
