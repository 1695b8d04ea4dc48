"""Finding the nodes nearest to some keys by asking ever nearer ones (Kademlia's iterative lookup).

Source of the semantics: hivemind 1.1.12, ``dht/traverse.py``: a beam of the nearest known nodes per key,
which ends when every node of the beam was asked. Unlike stock, a node that does not answer leaves the beam,
so the result holds only nodes that did; a question carries all keys for which the peer would be asked anyway;
and a peer that lets us wait, or that invents neighbours, does not keep the search from its end.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.routing import Contact


@dataclass(frozen=True, slots=True)
class Step:
    """What one peer answered for one target: whom it knows, and whether the target needs no more search."""

    neighbours: Sequence[Contact]
    finished: bool = False


Ask = Callable[[Contact, Sequence[DhtId]], Awaitable[dict[DhtId, Step] | None]]
"""Asks one node about some targets; None if it failed. Raises nothing that the search should survive."""

MayAsk = Callable[[Contact], bool]
"""Whether a node may be asked at all; others are no candidates, and count against nobody who names them."""


def _anybody(_contact: Contact) -> bool:
    return True


@dataclass(slots=True)
class _Source:
    """How the nodes fared that one node named."""

    waiting: int = 0
    slow: int = 0
    answered: int = 0
    failed: int = 0

    @property
    def trusted(self) -> bool:
        return self.failed < defaults.DHT_FALSE_NEIGHBOURS or self.failed <= 3 * self.answered

    @property
    def on_trial(self) -> bool:
        """It may not have more of its nodes asked before one of those that were has answered, or is slow."""
        if self.answered:
            return False
        asked = self.waiting + self.slow
        return self.waiting >= defaults.DHT_FALSE_NEIGHBOURS or asked >= defaults.DHT_SLOW_NEIGHBOURS


class Beam:
    """The search for one target: who is known, who was asked, who is next. No I/O.

    Nodes that are late hold up the search only until ``enough`` others have answered. A node that named
    several nodes of which hardly any answers is believed no more: anybody can invent neighbours.
    """

    def __init__(
        self,
        target: DhtId,
        *,
        width: int,
        max_asked: int,
        enough: int = defaults.DHT_REPLICAS,
        may_ask: MayAsk = _anybody,
    ) -> None:
        self.target = target
        self.width = width
        self.finished = False
        self._max_asked = max_asked
        self._may_ask = may_ask
        self._enough = enough
        self._candidates: list[tuple[int, Contact]] = []  # nearest first, without those that failed
        self._known: set[DhtId] = set()
        self._asked: set[DhtId] = set()
        self._waiting: set[DhtId] = set()  # asked, not answered yet
        self._slow: set[DhtId] = set()  # asked, and known not to have answered soon
        self._answers = 0
        self._next: Contact | None = None
        self._next_is_known = False  # until something changes
        self._named_by: dict[DhtId, DhtId] = {}
        self._sources: dict[DhtId, _Source] = {}

    def offer(self, contacts: Iterable[Contact], *, source: DhtId | None = None) -> None:
        """Learn of nodes, from the node ``source``. A node id keeps the peer under which it was met first."""
        if source is not None and not self._sources.setdefault(source, _Source()).trusted:
            return
        for contact in contacts:
            if contact.node_id not in self._known and self._may_ask(contact):
                self._known.add(contact.node_id)
                if source is not None:
                    self._named_by[contact.node_id] = source
                # no two of them are equally far, so that contacts are never compared
                bisect.insort(self._candidates, (self.target ^ contact.node_id, contact))
                self._next_is_known = False

    def next(self) -> Contact | None:
        """The nearest node of the beam that was not asked yet.

        Those whose source is on trial neither have their turn nor take the places of others.
        """
        if self.finished or len(self._asked) >= self._max_asked:
            return None
        if not self._next_is_known:
            self._next = self._find_next()
            self._next_is_known = True
        return self._next

    def _find_next(self) -> Contact | None:
        asked = 0
        for _, contact in self._candidates:
            if contact.node_id in self._asked:
                asked += 1
                if asked == self.width:
                    return None
            elif not self._source_of(contact.node_id).on_trial:
                return contact
        return None

    def _source_of(self, node_id: DhtId) -> _Source:
        """Who named it; somebody new for nodes that this node knew itself."""
        named_by = self._named_by.get(node_id)
        return _Source() if named_by is None else self._sources[named_by]

    def would_ask(self, contact: Contact) -> bool:
        """Whether the node belongs to the beam, or would, and was not asked yet."""
        if self.finished or contact.node_id in self._asked or len(self._asked) >= self._max_asked:
            return False
        if len(self._candidates) < self.width:
            return True
        return self.target.distance(contact.node_id) <= self._candidates[self.width - 1][0]

    def asked(self, contact: Contact) -> None:
        self.offer([contact])
        self._next_is_known = False
        self._asked.add(contact.node_id)
        self._waiting.add(contact.node_id)
        self._source_of(contact.node_id).waiting += 1

    def answered(self, contact: Contact, step: Step | None) -> None:
        """Take in an answer, or with None the failure of a node."""
        node_id = contact.node_id
        self._next_is_known = False
        self._waiting.discard(node_id)
        source = self._source_of(node_id)
        if node_id in self._slow:
            source.slow -= 1
        else:
            source.waiting -= 1
        if step is None:
            self._drop({node_id})
            source.failed += 1
            if not source.trusted:
                self._forget(self._named_by[node_id])
            return
        self._answers += 1
        source.answered += 1
        if not self.finished:
            self.offer(step.neighbours, source=node_id)
            self.finished = step.finished

    def _drop(self, node_ids: set[DhtId]) -> None:
        self._candidates = [place for place in self._candidates if place[1].node_id not in node_ids]

    def _forget(self, source: DhtId) -> None:
        """Leave out what only ``source`` has named and nobody was asked about; others may still name it."""
        named = {node_id for node_id, by in self._named_by.items() if by == source} - self._asked
        self._drop(named)
        self._known -= named

    @property
    def waiting(self) -> int:
        """Nodes that were asked and have not answered."""
        return len(self._waiting)

    def took_long(self, slow: AbstractSet[DhtId]) -> None:
        """Learn which nodes do not answer soon: some others have their turn that the same sources have named.

        What a node knows is not lost because the first few of its neighbours have died.
        """
        for node_id in (slow & self._waiting) - self._slow:
            self._slow.add(node_id)
            source = self._source_of(node_id)
            source.waiting -= 1
            source.slow += 1
            self._next_is_known = False

    def exhausted(self, late: AbstractSet[DhtId] = frozenset()) -> bool:
        """Nothing more is to be waited for: finished, or every node of the beam has answered or is ``late``."""
        if self.finished:
            return True
        awaited = self._waiting - late if self._answers >= self._enough else self._waiting
        return not awaited and self.next() is None

    def nearest(self) -> list[Contact]:
        """The nodes of the beam that answered, nearest first."""
        answered = self._asked - self._waiting
        return [contact for _, contact in self._candidates if contact.node_id in answered][: self.width]


@dataclass(eq=False, slots=True)
class _Call:
    contact: Contact
    beams: list[Beam]
    started: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


async def search(
    targets: Iterable[DhtId],
    seeds: Iterable[Contact],
    ask: Ask,
    *,
    background: trio.Nursery,
    width: int = defaults.DHT_BUCKET_SIZE,
    workers: int = defaults.DHT_SEARCH_WORKERS,
    targets_per_call: int = defaults.DHT_KEYS_PER_QUERY,
    max_asked: int = defaults.DHT_PEERS_PER_SEARCH,
    may_ask: MayAsk = _anybody,
) -> dict[DhtId, list[Contact]]:
    """Find up to ``width`` live nodes nearest to each target, nearest first, starting from ``seeds``.

    At most ``workers`` calls of ``ask`` run at a time, each with at most ``targets_per_call`` targets, besides
    those that are late: they take several times as long as answers usually took. Such are waited for only where
    few others answer; when the search ends they go on in ``background``. Nodes that ``may_ask`` does not admit, as
    the own one, are left out. Has no deadline: ``ask`` does. Raises NetworkError once ``background`` is cancelled, and
    what ``ask`` raises. Cancelled: all its calls are cancelled, nothing remains.
    """
    beams = {target: Beam(target, width=width, max_asked=max_asked, may_ask=may_ask) for target in targets}
    seeds = list(seeds)
    for beam in beams.values():
        beam.offer(seeds)
    calls: set[_Call] = set()
    errors: list[Exception] = []
    times: list[float] = []  # that answers took, the shortest first
    progress = trio.Event()

    async def make(call: _Call) -> None:
        steps = None
        try:
            with call.scope:
                steps = await ask(call.contact, [beam.target for beam in call.beams])
                if steps is not None:
                    bisect.insort(times, trio.current_time() - call.started)
        except Exception as e:
            errors.append(e)  # raised by the search
        finally:
            calls.discard(call)
            for beam in call.beams:
                beam.answered(call.contact, None if steps is None else steps.get(beam.target, Step(())))
            progress.set()

    try:
        while not errors and not background.cancel_scope.cancel_called:
            usual = times[len(times) // 2] if times else 0.0
            patience = max(defaults.DHT_PATIENCE_SECONDS, defaults.DHT_PATIENCE_FACTOR * usual)
            now = trio.current_time()
            punctual = [call for call in calls if call.started + patience > now]
            late = {call.contact.node_id for call in calls if call.started + patience <= now}
            slow = {call.contact.node_id for call in calls if call.started + patience / 2 <= now}
            for beam in beams.values():
                beam.took_long(slow)
            open_beams = [beam for beam in beams.values() if not beam.exhausted(late)]
            if not open_beams:
                return {target: beam.nearest() for target, beam in beams.items()}
            choice = _choose(open_beams, targets_per_call) if len(punctual) < workers else None
            if choice is None:
                progress = trio.Event()
                half = patience / 2
                turns = (
                    call.started + (half if call.started + half > now else patience) for call in punctual
                )
                with trio.move_on_at(min(turns, default=math.inf)):
                    await progress.wait()
                continue
            call = _Call(*choice, now)
            for beam in call.beams:
                beam.asked(call.contact)
            calls.add(call)
            background.start_soon(make, call)
    except BaseException:
        _cancel(calls)
        raise
    _cancel(calls)
    await trio.lowlevel.checkpoint_if_cancelled()  # the node's own searches end with it, and that is no error
    raise errors[0] if errors else NetworkError("the DHT node has stopped")


def _cancel(calls: Iterable[_Call]) -> None:
    for call in calls:
        call.scope.cancel()


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
