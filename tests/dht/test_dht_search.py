from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
from dht_nodes import peer_id

from kwaainet_bridge.hivemind.dht import Contact, DhtId
from kwaainet_bridge.hivemind.dht.search import Beam, Step, search

KEY = DhtId(0)


def contact(node_id: int) -> Contact:
    return Contact(DhtId(node_id), peer_id(node_id % 2**200))


class Network:
    """Nodes that answer with those they know that are nearest to what they are asked about."""

    def __init__(self, known: dict[Contact, list[Contact]], *, delay: float = 0.0) -> None:
        self.known = known
        self.delay = delay
        self.down: set[Contact] = set()
        self.done_at: dict[DhtId, Contact] = {}
        self.calls: list[tuple[Contact, list[DhtId]]] = []
        self.running = 0
        self.most_running = 0

    @classmethod
    def random(cls, size: int, *, rng: random.Random) -> Network:
        """Each node knows the 20 nearest to itself and 20 others."""
        contacts = [contact(rng.getrandbits(160)) for _ in range(size)]
        return cls(
            {
                c: list(
                    {
                        *sorted(contacts, key=lambda other: c.node_id.distance(other.node_id))[:20],
                        *rng.sample(contacts, min(20, size)),
                    }
                )
                for c in contacts
            }
        )

    async def ask(self, contact: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        self.calls.append((contact, list(targets)))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await trio.sleep(self.delay)
        finally:
            self.running -= 1
        if contact in self.down:
            return None
        return {
            target: Step(
                sorted(self.known[contact], key=lambda c: c.node_id.distance(target))[:20],
                finished=self.done_at.get(target) == contact,
            )
            for target in targets
        }

    def nearest(self, target: DhtId, count: int) -> list[Contact]:
        alive = self.known.keys() - self.down
        return sorted(alive, key=lambda c: c.node_id.distance(target))[:count]


async def test_nearest_nodes_are_found_from_afar() -> None:
    rng = random.Random(1)
    network = Network.random(400, rng=rng)
    targets = [DhtId.random(rng) for _ in range(10)]
    seeds = rng.sample(sorted(network.known, key=lambda c: c.node_id), 3)
    found = await search(targets, seeds, network.ask)
    for target in targets:
        assert found[target][:5] == network.nearest(target, 5)
        assert len(found[target]) == 20


async def test_nodes_that_fail_are_replaced_by_farther_ones() -> None:
    rng = random.Random(2)
    network = Network.random(60, rng=rng)
    network.down = set(network.nearest(KEY, 60)[::2])
    found = await search([KEY], network.known, network.ask)
    assert found[KEY] == network.nearest(KEY, 20)


async def test_nothing_is_found_without_seeds_or_targets() -> None:
    network = Network({})
    assert await search([KEY], [], network.ask) == {KEY: []}
    assert await search([], [contact(1)], network.ask) == {}
    assert network.calls == []


async def test_a_target_that_is_done_stops_its_search_at_once(autojump_clock: trio.testing.MockClock) -> None:
    network = Network({contact(n): [contact(m) for m in range(1, 60)] for n in range(1, 60)}, delay=1.0)
    network.done_at[KEY] = contact(1)
    await search([KEY], [contact(1)], network.ask)
    assert network.calls == [(contact(1), [KEY])]

    # the answers of others that are still under way are not waited for
    async def slow_others(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.sleep(0.5 if c == contact(1) else 1000)
        return {target: Step((), finished=c == contact(1)) for target in targets}

    started = trio.current_time()
    await search([KEY], [contact(n) for n in range(1, 5)], slow_others)
    assert trio.current_time() - started == 0.5


async def test_each_peer_is_asked_once_and_about_all_targets_it_serves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rng = random.Random(3)
    network = Network.random(12, rng=rng)
    network.delay = 1.0
    targets = [DhtId.random(rng) for _ in range(20)]
    await search(targets, list(network.known)[:1], network.ask, workers=3, targets_per_call=16)
    assert network.most_running <= 3
    assert all(len(asked) <= 16 for _, asked in network.calls)
    pairs = [(c, target) for c, asked in network.calls for target in asked]
    assert len(pairs) == len(set(pairs)) == 12 * 20
    assert len(network.calls) == 24  # two calls for each peer: 16 targets and 4


async def test_invented_neighbours_do_not_keep_a_search_going() -> None:
    invented = iter(range(2**150, 0, -(2**140)))

    async def ask(_contact: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        calls.append(1)
        await trio.lowlevel.checkpoint()
        return {target: Step([contact(next(invented))]) for target in targets}

    calls: list[int] = []
    await search([KEY], [contact(2**155)], ask, max_asked=50)
    assert len(calls) == 50


async def test_cancellation_leaves_no_call_behind(autojump_clock: trio.testing.MockClock) -> None:
    network = Network({contact(1): []}, delay=100.0)
    with trio.move_on_after(1) as scope:
        await search([KEY], [contact(1)], network.ask)
    assert scope.cancelled_caught
    assert network.running == 0


async def test_a_bug_in_a_callback_is_not_taken_for_a_failed_peer() -> None:
    async def ask(_contact: Contact, _targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        await search([KEY], [contact(1)], ask)


def test_a_node_id_keeps_the_peer_under_which_it_was_met() -> None:
    beam = Beam(KEY, width=3, max_asked=10)
    beam.offer([Contact(DhtId(1), peer_id(1))])
    beam.offer([Contact(DhtId(1), peer_id(2))])
    assert beam.next() == Contact(DhtId(1), peer_id(1))


def test_a_beam_asks_its_nearest_only() -> None:
    beam = Beam(KEY, width=2, max_asked=10)
    beam.offer([contact(n) for n in (5, 3, 9)])
    assert beam.would_ask(contact(4))
    assert not beam.would_ask(contact(6))
    for number in (3, 5):
        nearest = beam.next()
        assert nearest == contact(number)
        beam.asked(nearest)
    assert beam.next() is None
    assert not beam.exhausted  # answers are due
    beam.answered(contact(3), None)
    assert beam.next() == contact(9)
    beam.answered(contact(5), Step([contact(1)]))
    assert beam.next() == contact(1)
    assert beam.nearest() == [contact(5)]
