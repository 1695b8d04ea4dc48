"""The verdict on whether a host can be dialled, check by check."""

from __future__ import annotations

import pytest

from kwaainet_bridge import defaults
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.reachability import Check, Reachability, Verdict
from kwaainet_bridge.wire.peer_id import PeerId

HERE = Address("ip4", "5.5.5.5", 31330)


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + bytes([number]) * 32)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class World:
    def __init__(self, *, listens: bool = True) -> None:
        self.clock = Clock()
        self.reachability = Reachability(listens=listens, clock=self.clock)

    def check(
        self, number: int, reachable: bool, *, outside: bool = True, address: Address | None = None
    ) -> None:
        self.clock.now += 1
        self.reachability.note(Check(peer(number), "AutoNAT", reachable, outside, self.clock.now, address))

    @property
    def verdict(self) -> Verdict:
        return self.reachability.verdict


@pytest.fixture
def world() -> World:
    return World()


def test_nobody_was_asked(world: World) -> None:
    assert world.verdict is Verdict.UNKNOWN
    assert world.reachability.evidence == "no peer has tried to dial it yet"


def test_one_peer_got_through(world: World) -> None:
    world.check(1, True, address=HERE)
    assert world.verdict is Verdict.PUBLIC
    assert world.reachability.proved == [HERE]
    world.clock.now += 9
    assert world.reachability.evidence == (
        "1 of 1 peers got through at /ip4/5.5.5.5/tcp/31330 (AutoNAT), the last tried 9 s ago"
    )


def test_nobody_gets_through_and_relays_make_the_difference(world: World) -> None:
    world.check(1, False)
    assert world.verdict is Verdict.UNREACHABLE
    world.reachability.relays = 2
    assert world.verdict is Verdict.RELAYED
    assert world.reachability.evidence.endswith("; places at 2 relays")
    world.reachability.relays = 0
    assert world.verdict is Verdict.UNREACHABLE


def test_half_of_the_peers_are_enough(world: World) -> None:
    for number, reachable in enumerate([True, False, True, False]):
        world.check(number, reachable)
    assert world.verdict is Verdict.PUBLIC
    world.check(5, False)
    assert world.verdict is Verdict.UNREACHABLE


def test_one_failure_does_not_end_a_good_verdict(world: World) -> None:
    world.check(1, True)
    assert not world.reachability.in_doubt
    world.check(1, False)
    assert world.verdict is Verdict.PUBLIC
    assert world.reachability.in_doubt
    world.check(1, False)
    assert world.verdict is Verdict.UNREACHABLE
    assert not world.reachability.in_doubt
    world.check(1, True)
    assert world.verdict is Verdict.PUBLIC


def test_a_peer_counts_once_however_often_it_is_asked(world: World) -> None:
    for _ in range(5):
        world.check(1, False)
    world.check(2, True)
    assert world.verdict is Verdict.PUBLIC


def test_old_checks_count_no_longer(world: World) -> None:
    for number in range(3):
        world.check(number, False)
    world.clock.now += defaults.CHECK_LIFETIME_SECONDS + 1
    world.check(4, True, address=HERE)
    assert world.verdict is Verdict.PUBLIC


@pytest.mark.parametrize(("reachable", "verdict"), [(False, Verdict.UNREACHABLE), (True, Verdict.PUBLIC)])
def test_a_verdict_stands_while_nobody_can_tell(world: World, reachable: bool, verdict: Verdict) -> None:
    """Otherwise a private host would give up its relays, only since the peers that could dial it have gone."""
    for number in range(5):
        world.check(number, reachable)
    world.check(5, not reachable)  # outvoted, and the last
    world.clock.now += 10 * defaults.CHECK_LIFETIME_SECONDS
    assert world.verdict is verdict


def test_of_a_host_that_has_moved_new_checks_count(world: World) -> None:
    for number in range(5):
        world.check(number, True, address=HERE)
    world.clock.now += 1
    world.reachability.moved()
    assert world.verdict is Verdict.PUBLIC  # nobody knows better yet
    world.check(1, False)
    world.check(2, False)
    assert world.verdict is Verdict.UNREACHABLE
    assert world.reachability.proved == []


def test_many_neighbours_do_not_make_it_forget_those_outside(world: World) -> None:
    world.check(1, False)
    for number in range(2, 3 * defaults.REMEMBERED_CHECKS):
        world.check(number, True, outside=False)
    assert world.verdict is Verdict.UNREACHABLE


def test_neighbours_count_only_as_long_as_nobody_outside_has_tried(world: World) -> None:
    world.check(1, True, outside=False)
    assert world.verdict is Verdict.PUBLIC
    assert "1 of 1 peers of its own network" in world.reachability.evidence
    world.check(2, False)
    assert world.verdict is Verdict.UNREACHABLE
    world.check(3, True, outside=False)
    assert world.verdict is Verdict.UNREACHABLE


def test_a_host_that_does_not_listen_needs_no_check() -> None:
    world = World(listens=False)
    assert world.verdict is Verdict.UNREACHABLE
    world.check(1, True)
    world.reachability.relays = 1
    assert world.verdict is Verdict.RELAYED
    assert world.reachability.evidence == "it does not listen; places at 1 relays"


def test_it_remembers_a_few_checks_only(world: World) -> None:
    for number in range(3 * defaults.REMEMBERED_CHECKS):
        world.check(number, reachable=False)
    assert f"0 of {defaults.REMEMBERED_CHECKS} peers" in world.reachability.evidence
