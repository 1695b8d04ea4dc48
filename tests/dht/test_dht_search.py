from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import trio
from dht_nodes import peer_id

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import Contact, DhtId
from kwaainet_bridge.hivemind.dht.search import Beam, Step
from kwaainet_bridge.hivemind.dht.search import search as search_in

KEY = DhtId(0)


def contact(node_id: int) -> Contact:
    return Contact(DhtId(node_id), peer_id(node_id % 2**200))


async def search(
    targets: Iterable[DhtId], seeds: Iterable[Contact], ask: Any, **options: Any
) -> dict[DhtId, list[Contact]]:
    """Search, and then cancel the calls that nobody waits for any more."""
    async with trio.open_nursery() as nursery:
        found = await search_in(targets, seeds, ask, background=nursery, **options)
        nursery.cancel_scope.cancel()
    return found


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
    network.delay = 0.1
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


async def test_cancellation_leaves_no_call_behind(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network({contact(1): []}, delay=100.0)
    with trio.move_on_after(1) as scope:
        await search_in([KEY], [contact(1)], network.ask, background=nursery)
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert network.running == 0


async def test_a_bug_in_a_callback_is_not_taken_for_a_failed_peer() -> None:
    async def ask(_contact: Contact, _targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        with pytest.raises(ZeroDivisionError):
            await search_in([KEY], [contact(1)], ask, background=nursery)


@pytest.mark.parametrize("_attempt", range(20))  # the order of tasks is random
async def test_a_search_that_is_cancelled_together_with_its_background_ends_without_an_error(
    _attempt: int,
) -> None:
    answer = trio.Event()

    async def ask(_contact: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await answer.wait()
        return {target: Step([contact(2)]) for target in targets}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(search_in, [KEY], [contact(1)], ask, background=nursery))
        await trio.testing.wait_all_tasks_blocked()
        answer.set()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()  # the search may be about to go on


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
    assert not beam.exhausted()  # answers are due
    beam.answered(contact(3), None)
    assert beam.next() == contact(9)
    beam.answered(contact(5), Step([contact(1)]))
    assert beam.next() == contact(1)
    assert beam.nearest() == [contact(5)]


def test_nodes_that_may_not_be_asked_are_no_candidates_and_cost_their_source_nothing() -> None:
    banned = {contact(n) for n in range(1, 9)}
    beam = Beam(KEY, width=3, max_asked=10, may_ask=lambda contact: contact not in banned)
    beam.offer([contact(1), contact(20)])
    assert beam.next() == contact(20)
    beam.asked(contact(20))
    beam.answered(contact(20), Step([*sorted(banned, key=lambda c: c.node_id), contact(10)]))
    assert beam.next() == contact(10)
    banned.clear()  # they may be asked from now on, if they are named again
    beam.asked(contact(10))
    beam.answered(contact(10), Step([contact(2), contact(3)]))
    assert beam.next() == contact(2)


async def test_late_answers_are_not_waited_for_where_others_came(
    autojump_clock: trio.testing.MockClock,
) -> None:
    late = [contact(n) for n in range(1, 10)]
    came: list[Contact] = []

    async def ask(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.sleep(3.0 if c in late else 0.2)
        came.append(c)
        return {target: Step(()) for target in targets}

    async with trio.open_nursery() as nursery:
        found = await search_in([KEY], [contact(n) for n in range(1, 30)], ask, background=nursery)
        assert trio.current_time() < 2.0  # three times the slowest of the others, for each round of workers
        assert found[KEY] == [contact(n) for n in range(10, 21)]
    assert set(late) < set(came)  # they answered in the background
    started = trio.current_time()
    few = [contact(n) for n in range(6, 14)]
    assert (await search([KEY], few, ask))[KEY] == few
    assert trio.current_time() - started == 3.0


async def test_a_node_is_believed_though_the_nearest_that_it_names_are_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Only one of those asked first knows who is near; the first of these have died, as neighbours do."""
    seeds = [contact(n) for n in range(100, 110)]
    silent, near = [contact(n) for n in (1, 2, 3)], [contact(n) for n in (4, 5)]

    async def ask(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.sleep(3.0 if c in silent else 0.05)
        if c in silent:
            return None
        return {target: Step([*silent, *near] if c == seeds[0] else seeds) for target in targets}

    found = await search([KEY], seeds, ask)
    assert found[KEY][:2] == near
    assert trio.current_time() < 2.0


async def test_invented_silent_neighbours_delay_a_search_for_a_bounded_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seeds = [contact(n) for n in range(1000, 1010)]
    invented = [contact(n) for n in range(1, 21)]
    asked: list[Contact] = []

    async def ask(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        asked.append(c)
        await trio.sleep(3.0 if c in invented else 0.05)
        return (
            None if c in invented else {target: Step(invented if c == seeds[0] else ()) for target in targets}
        )

    found = await search([KEY], seeds, ask)
    assert found[KEY] == seeds
    assert len(set(asked) & set(invented)) == defaults.DHT_SLOW_NEIGHBOURS
    assert trio.current_time() < 1.5


async def test_late_answers_count_that_come_before_the_end(autojump_clock: trio.testing.MockClock) -> None:
    async def ask(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        await trio.sleep({1: 0.7, 2: 0.1}.get(c.node_id, 0.4))
        return {target: Step([contact(c.node_id + 1)] if c != contact(2) else ()) for target in targets}

    found = await search([KEY], [contact(1), contact(10)], ask, max_asked=12)
    assert found[KEY][:2] == [contact(1), contact(2)]


async def test_one_liar_costs_a_few_questions(autojump_clock: trio.testing.MockClock) -> None:
    rng = random.Random(4)
    network = Network.random(60, rng=rng)
    network.delay = 0.1
    await search([KEY], network.known, network.ask)
    honest = len(network.calls)
    liars = network.nearest(KEY, 30)[::6]
    invented = [contact(n) for n in range(1, 200)]
    for liar in liars:
        network.known[liar] = rng.sample(invented, 20)
    known = set(network.known)

    async def ask(c: Contact, targets: Sequence[DhtId]) -> dict[DhtId, Step] | None:
        if c not in known:
            asked_in_vain.append(c)
            return None
        return await network.ask(c, targets)

    asked_in_vain: list[Contact] = []
    network.calls.clear()
    found = await search([KEY], network.known, ask)
    assert found[KEY] == network.nearest(KEY, 20)
    assert len(network.calls) == honest
    assert len(asked_in_vain) <= 8 * len(liars)  # four each, and those that were under way


def test_what_a_liar_named_may_be_named_by_others() -> None:
    beam = Beam(KEY, width=20, max_asked=100)
    beam.offer([contact(100), contact(200)])
    for n in (100, 200):
        beam.asked(contact(n))
    beam.answered(contact(100), Step([contact(n) for n in range(1, 21)]))
    for n in range(1, 5):
        beam.asked(contact(n))
        beam.answered(contact(n), None)
    assert beam.next() is None
    beam.answered(contact(200), Step([contact(20), contact(4)]))
    assert beam.next() == contact(20)  # and not the one that failed already
    beam.offer([contact(19)], source=DhtId(100))
    assert not beam.would_ask(contact(4))
    beam.asked(contact(20))
    beam.answered(contact(20), Step(()))
    assert beam.next() is None
    assert beam.nearest() == [contact(20), contact(100), contact(200)]
