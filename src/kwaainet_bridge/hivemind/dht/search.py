"""Finding the nodes nearest to some keys by asking ever nearer ones (Kademlia's iterative lookup).

Source of the semantics: hivemind 1.1.12, ``dht/traverse.py``: a beam of the nearest known nodes per key,
which ends when every node of the beam was asked. Unlike stock, a node that does not answer leaves the beam,
so the result holds only nodes that did; and a question carries all keys for which the peer would be asked
anyway.
"""

from __future__ import annotations

import bisect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.routing import Contact


@dataclass(frozen=True, slots=True)
class Step:
    """What one peer answered for one target: whom it knows, and whether the target needs no more search."""

    neighbours: Sequence[Contact]
    finished: bool = False


Ask = Callable[[Contact, Sequence[DhtId]], Awaitable[dict[DhtId, Step] | None]]
"""Asks one node about some targets; None if it failed. Raises nothing that the search should survive."""


class Beam:
    """The search for one target: who is known, who was asked, who is next. No I/O."""

    def __init__(self, target: DhtId, *, width: int, max_asked: int) -> None:
        self.target = target
        self.width = width
        self.finished = False
        self._max_asked = max_asked
        self._candidates: list[tuple[int, Contact]] = []  # nearest first, without those that failed
        self._known: set[DhtId] = set()
        self._asked: set[DhtId] = set()
        self._waiting: set[DhtId] = set()  # asked, not answered yet

    def offer(self, contacts: Iterable[Contact]) -> None:
        """Learn of nodes. A node id keeps the peer under which it was met first."""
        for contact in contacts:
            if contact.node_id not in self._known:
                self._known.add(contact.node_id)
                place = (self.target.distance(contact.node_id), contact)
                bisect.insort(self._candidates, place, key=lambda place: place[0])

    def next(self) -> Contact | None:
        """The nearest node of the beam that was not asked yet."""
        if self.finished or len(self._asked) >= self._max_asked:
            return None
        for _, contact in self._candidates[: self.width]:
            if contact.node_id not in self._asked:
                return contact
        return None

    def would_ask(self, contact: Contact) -> bool:
        """Whether the node belongs to the beam, or would, and was not asked yet."""
        if self.finished or contact.node_id in self._asked or len(self._asked) >= self._max_asked:
            return False
        if len(self._candidates) < self.width:
            return True
        return self.target.distance(contact.node_id) <= self._candidates[self.width - 1][0]

    def asked(self, contact: Contact) -> None:
        self.offer([contact])
        self._asked.add(contact.node_id)
        self._waiting.add(contact.node_id)

    def answered(self, contact: Contact, step: Step | None) -> None:
        """Take in an answer, or with None the failure of a node."""
        self._waiting.discard(contact.node_id)
        if step is None:
            self._candidates = [place for place in self._candidates if place[1].node_id != contact.node_id]
        elif not self.finished:
            self.offer(step.neighbours)
            self.finished = step.finished

    @property
    def waiting(self) -> int:
        """Nodes that were asked and have not answered."""
        return len(self._waiting)

    @property
    def exhausted(self) -> bool:
        """Nothing more will come: finished, or every node of the beam has answered."""
        return self.finished or (not self._waiting and self.next() is None)

    def nearest(self) -> list[Contact]:
        """The nodes of the beam that answered, nearest first."""
        answered = self._asked - self._waiting
        return [contact for _, contact in self._candidates if contact.node_id in answered][: self.width]


async def search(
    targets: Iterable[DhtId],
    seeds: Iterable[Contact],
    ask: Ask,
    *,
    width: int = defaults.DHT_BUCKET_SIZE,
    workers: int = defaults.DHT_SEARCH_WORKERS,
    targets_per_call: int = defaults.DHT_KEYS_PER_QUERY,
    max_asked: int = defaults.DHT_PEERS_PER_SEARCH,
) -> dict[DhtId, list[Contact]]:
    """Find up to ``width`` live nodes nearest to each target, nearest first, starting from ``seeds``.

    At most ``workers`` calls of ``ask`` run at a time, each with at most ``targets_per_call`` targets. Nodes
    that must not be asked, as the own one, ``ask`` fails. Has no deadline: ``ask`` does. Cancelled: running
    calls are cancelled, nothing else remains.
    """
    beams = {target: Beam(target, width=width, max_asked=max_asked) for target in targets}
    seeds = list(seeds)
    for beam in beams.values():
        beam.offer(seeds)
    running = 0
    progress = trio.Event()

    async def call(contact: Contact, asked: list[Beam]) -> None:
        nonlocal running
        steps = await ask(contact, [beam.target for beam in asked])
        for beam in asked:
            beam.answered(contact, None if steps is None else steps.get(beam.target, Step(())))
        running -= 1
        progress.set()

    async with trio.open_nursery() as nursery:
        while True:
            open_beams = [beam for beam in beams.values() if not beam.exhausted]
            if not open_beams:
                nursery.cancel_scope.cancel()  # answers for beams that finished early
                break
            choice = _choose(open_beams, targets_per_call) if running < workers else None
            if choice is None:
                progress = trio.Event()
                await progress.wait()
                continue
            contact, asked = choice
            for beam in asked:
                beam.asked(contact)
            running += 1
            nursery.start_soon(call, contact, asked)
    return {target: beam.nearest() for target, beam in beams.items()}


def _choose(beams: list[Beam], targets_per_call: int) -> tuple[Contact, list[Beam]] | None:
    """Whom to ask next, and about what: the target with the fewest calls open, then the nearest node."""
    chosen: tuple[tuple[int, int], Contact, Beam] | None = None
    for beam in beams:
        contact = beam.next()
        if contact is not None:
            rank = (beam.waiting, beam.target.distance(contact.node_id))
            if chosen is None or rank < chosen[0]:
                chosen = (rank, contact, beam)
    if chosen is None:
        return None
    _, contact, primary = chosen
    others = [beam for beam in beams if beam is not primary and beam.would_ask(contact)]
    others.sort(key=lambda beam: beam.target.distance(contact.node_id))
    return contact, [primary, *others[: targets_per_call - 1]]
