from __future__ import annotations

from dht_nodes import peer_id

from kwaainet_bridge.hivemind.dht import Contact, DhtId
from kwaainet_bridge.hivemind.dht.contacts import Backoff, Contacts

PEER = peer_id(1)


def test_the_pause_doubles_up_to_a_limit_and_ends_with_success() -> None:
    backoff = Backoff(base=5.0, limit=60.0)
    now, pauses = 0.0, []
    for _ in range(6):
        backoff.failed(PEER, now=now)
        backoff.failed(PEER, now=now + 1)  # while it is left alone: not counted
        pause = next(t for t in range(100) if backoff.allows(PEER, now=now + t))
        pauses.append(pause)
        now += pause
    assert pauses == [5, 10, 20, 40, 60, 60]
    backoff.failed(PEER, now=now)
    backoff.succeeded(PEER)
    assert backoff.allows(PEER, now=now)
    backoff.failed(PEER, now=now)
    assert backoff.allows(PEER, now=now + 5)


def test_failures_without_end_do_not_overflow() -> None:
    backoff = Backoff(base=1.0, limit=2.0)
    for n in range(3000):
        backoff.failed(PEER, now=10.0 * n)
    assert backoff.allows(PEER, now=30_000.0)


def test_a_bounded_number_of_failing_peers_is_remembered() -> None:
    backoff = Backoff(max_peers=3)
    for n in range(10):
        backoff.failed(peer_id(n), now=0.0)
    assert [n for n in range(10) if not backoff.allows(peer_id(n), now=1.0)] == [7, 8, 9]


class Heard:
    def __init__(self) -> None:
        self.now = 0.0
        self.met: list[Contact] = []
        self.doubted: list[Contact] = []
        self.contacts = Contacts(
            DhtId(0),
            peer_id(0),
            clock=lambda: self.now,
            on_met=self.met.append,
            on_doubt=self.doubted.append,
        )


def test_new_nodes_are_met_once() -> None:
    heard = Heard()
    heard.contacts.heard_from(DhtId(5), PEER)
    heard.contacts.answered(DhtId(5), PEER)
    assert heard.met == [Contact(DhtId(5), PEER)]
    heard.contacts.failed(PEER, back_off=False)
    assert heard.contacts.table.contacts() == []
    heard.contacts.answered(DhtId(5), PEER)
    assert len(heard.met) == 2


def test_clients_and_this_node_are_not_remembered() -> None:
    heard = Heard()
    heard.contacts.heard_from(None, PEER)
    heard.contacts.heard_from(DhtId(0), PEER)
    heard.contacts.heard_from(DhtId(9), peer_id(0))
    assert heard.met == []
    assert heard.contacts.table.contacts() == []
    assert not heard.contacts.may_ask(Contact(DhtId(0), PEER))
    assert not heard.contacts.may_ask(Contact(DhtId(9), peer_id(0)))


def test_a_peer_that_fails_searches_is_left_alone_even_if_it_keeps_asking_us() -> None:
    heard = Heard()
    heard.contacts.failed(PEER, back_off=True)
    heard.contacts.heard_from(DhtId(5), PEER)
    assert not heard.contacts.may_ask(Contact(DhtId(5), PEER))
    heard.now = 5.0
    assert heard.contacts.may_ask(Contact(DhtId(5), PEER))


def test_an_imposter_makes_the_holder_of_a_node_id_doubted_not_replaced() -> None:
    heard = Heard()
    heard.contacts.heard_from(DhtId(5), PEER)
    heard.contacts.heard_from(DhtId(5), peer_id(2))
    assert heard.met == heard.doubted == [Contact(DhtId(5), PEER)]
