"""What a host tells of its addresses, and what it makes of how peers see it."""

from __future__ import annotations

import errno

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.net import own_addresses
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.own_addresses import OwnAddresses
from kwaainet_bridge.wire.peer_id import PeerId

LISTENING = [Address("ip4", "127.0.0.1", 31330), Address("ip6", "::1", 31330)]
OUTSIDE = Address("ip4", "5.5.5.5", 31330)


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


class Told:
    def __init__(self, announced: list[Address] | None = None) -> None:
        self.changes = 0
        self.own = OwnAddresses(LISTENING, announced or [], self._changed)

    def _changed(self) -> None:
        self.changes += 1


@pytest.fixture
def told() -> Told:
    return Told()


def test_interfaces_are_told(told: Told) -> None:
    assert told.own.told == tuple(LISTENING)
    assert not told.changes


def test_announced_addresses_take_their_place() -> None:
    assert Told([OUTSIDE]).own.told == (OUTSIDE,)


def test_what_peers_see_is_not_told_before_it_is_proved(told: Told) -> None:
    told.own.seen(peer(1), OUTSIDE, local_port=31330)
    assert told.own.told == tuple(LISTENING)
    assert told.own.for_checks() == [OUTSIDE, *LISTENING]
    assert told.own.for_punching() == [OUTSIDE]
    told.own.prove([OUTSIDE, LISTENING[0]])
    told.own.prove([OUTSIDE])
    assert told.own.told == (*LISTENING, OUTSIDE)
    assert told.changes == 1
    told.own.prove([])
    assert told.own.told == tuple(LISTENING)
    assert told.changes == 2


def test_relayed_addresses_come_last(told: Told) -> None:
    relayed = OUTSIDE.through(peer(9))
    told.own.relay([relayed])
    told.own.prove([OUTSIDE])
    assert told.own.told == (*LISTENING, OUTSIDE, relayed)
    assert told.own.direct == (*LISTENING, OUTSIDE)


def test_many_interfaces_do_not_crowd_out_what_leads_here() -> None:
    """Others keep the first 32 addresses of a peer."""
    bridges = [Address("ip4", f"172.17.{number}.1", 31330) for number in range(100)]
    own = OwnAddresses(bridges, [], lambda: None)
    relayed = [OUTSIDE.through(peer(number)) for number in range(100)]
    own.prove([OUTSIDE])
    own.relay(relayed)
    kept = own.told[: defaults.MAX_ADDRESSES_PER_PEER]
    assert OUTSIDE in kept
    assert bridges[0] in kept
    assert relayed[0] in kept


def test_the_port_of_another_socket_says_nothing(told: Told) -> None:
    """A dial left from any port: the router is supposed to forward the one that is listened on."""
    told.own.seen(peer(1), Address("ip4", "5.5.5.5", 50123), local_port=40404)
    assert told.own.supposed() == [OUTSIDE]
    told.own.seen(peer(1), Address("ip4", "5.5.5.5", 50124), local_port=31330)
    assert told.own.supposed() == [Address("ip4", "5.5.5.5", 50124), OUTSIDE]


def test_a_router_that_shows_another_port_to_each_peer(told: Told) -> None:
    """Only the port that the operator may have forwarded is worth a check then."""
    for number in range(5):
        told.own.seen(peer(number), Address("ip4", "5.5.5.5", 50000 + number), local_port=31330)
    assert told.own.supposed() == [OUTSIDE]


def test_without_a_socket_of_the_family_nothing_is_supposed() -> None:
    own = OwnAddresses(LISTENING[:1], [], lambda: None)
    own.seen(peer(1), Address("ip6", "2a00::1", 5), local_port=40404)
    assert own.supposed() == []


def test_one_liar_among_many_is_not_passed_on(told: Told) -> None:
    for number in range(4):
        told.own.seen(peer(number), OUTSIDE, local_port=31330)
    told.own.seen(peer(9), Address("ip4", "9.9.9.9", 80), local_port=31330)
    assert told.own.supposed() == [OUTSIDE]
    for number in range(4):
        told.own.unseen(peer(number))
    assert told.own.supposed() == [Address("ip4", "9.9.9.9", 80), Address("ip4", "9.9.9.9", 31330)]


def test_few_observers_are_remembered(told: Told) -> None:
    for number in range(1000):
        told.own.seen(peer(number), Address("ip4", f"5.5.{number % 200}.1", 31330), local_port=31330)
    assert len(told.own._seen) == defaults.MAX_OBSERVERS
    assert len(told.own.supposed()) == defaults.MAX_SUPPOSED_ADDRESSES


async def test_interfaces_are_looked_at_again_after_a_failure(
    told: Told, monkeypatch: pytest.MonkeyPatch, autojump_clock
) -> None:
    """Without file descriptors nobody can look. That must not end the host, which has them back some time."""
    looks: list[float] = []

    def look(_listening: object) -> list[Address]:
        looks.append(trio.current_time())
        if len(looks) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return [OUTSIDE]

    monkeypatch.setattr(own_addresses, "reachable_forms", look)
    moves: list[float] = []
    with trio.move_on_after(3.5 * defaults.INTERFACES_SECONDS):
        await told.own.follow_interfaces(lambda: moves.append(trio.current_time()))
    assert told.own.told == (OUTSIDE,)
    assert len(looks) == 3
    assert len(moves) == told.changes == 1
