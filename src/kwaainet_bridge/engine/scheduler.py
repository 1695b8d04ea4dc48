"""What the compute thread does next. No I/O, no clock, no tensors: requests and times in, batches out.

Three kinds of requests wait here. A *step* is small: all steps that are ready, of any session, run as one ragged batch
through all blocks. Everything larger is a sequence of pieces, of which one runs at a time: a long prompt (*inference*),
or a forward or backward pass (*batch*). Inference goes first: a batch of steps and a piece of a prompt take turns where
both wait, and pieces of other passes run when neither does, or when they have waited for ``patience`` seconds. Where
nothing else waits, steps are held back a moment for others that are about to come (:mod:`.gathering`).

Among peers, whoever has been given least of its share comes first, except that every other choice goes to whoever has
waited longest, if that is more than ``patience``; so nobody waits for ever, however many others come.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kwaainet_bridge.engine.gathering import Gathering

MAX_IDLE_PEERS = 256
"""Peers without requests of which is remembered what they were given."""


class Priority(enum.IntEnum):
    """The kinds of requests: lower goes first."""

    STEP = 0
    INFERENCE = 1
    BATCH = 2


@dataclass(slots=True, eq=False)
class _Request:
    key: int
    peer: Hashable
    tokens: int
    since: float
    """When it came, or when its last piece ended."""


class FairQueue:
    """Requests of one kind, by peer. With ``in_turn`` none of a peer's begins before its former one has ended."""

    def __init__(self, patience: float, shares: Mapping[Hashable, float], *, in_turn: bool = False) -> None:
        self._patience = patience
        self._in_turn = in_turn
        self._shares = shares
        self._requests: dict[int, _Request] = {}
        self._peers: dict[Hashable, dict[int, _Request]] = {}
        self._given: dict[Hashable, float] = {}
        self.tokens = 0
        """Of all requests together."""
        self._level = 0.0
        """What the peer had been given that was chosen last: newcomers start from here, not from nothing."""
        self._oldest_next = False

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def add(self, request: _Request) -> None:
        self._requests[request.key] = request
        self.tokens += request.tokens
        if request.peer not in self._peers:
            self._peers[request.peer] = {}
            self._given[request.peer] = max(self._given.get(request.peer, 0.0), self._level)
        self._peers[request.peer][request.key] = request

    def remove(self, key: int) -> None:
        request = self._requests.pop(key)
        self.tokens -= request.tokens
        mine = self._peers[request.peer]
        del mine[key]
        if not mine:
            del self._peers[request.peer]
            if len(self._given) - len(self._peers) > MAX_IDLE_PEERS:
                self._forget_peers()

    def _forget_peers(self) -> None:
        """Of those without requests remember the half that were given most, if it is more than newcomers start from."""
        idle = {p: v for p, v in self._given.items() if p not in self._peers and v > self._level}
        remembered = heapq.nlargest(MAX_IDLE_PEERS // 2, idle, key=idle.__getitem__)
        self._given = {p: self._given[p] for p in (*self._peers, *remembered)}

    def charge(self, peer: Hashable, amount: float) -> None:
        """Count what a peer was given, in shares of its own."""
        if peer in self._given:
            self._given[peer] += amount / self._shares.get(peer, 1.0)

    def touch(self, key: int, now: float) -> None:
        """A piece of the request ended: it begins to wait again."""
        self._requests[key].since = now

    def choose(self, now: float) -> _Request:
        """Whose turn it is; it stays in the queue. There must be somebody."""
        peer = min(self._peers, key=lambda p: (self._given[p], next(iter(self._peers[p]))))
        chosen = next(iter(self._peers[peer].values()))
        waiting: Iterable[_Request] = self._requests.values()
        if self._in_turn:
            waiting = (next(iter(of.values())) for of in self._peers.values())
        oldest = min(waiting, key=lambda r: (r.since, r.key))
        self._oldest_next = not self._oldest_next
        if not self._oldest_next and now - oldest.since > self._patience:
            return oldest
        self._level = max(self._level, self._given[peer])
        return chosen

    def choose_many(self, now: float, tokens: int) -> list[_Request]:
        """Requests of up to ``tokens`` tokens together, at least one; all leave the queue."""
        chosen: list[_Request] = []
        room = tokens
        late = [r for r in self._requests.values() if now - r.since > self._patience]
        for request in late:
            if chosen and request.tokens > room - tokens // 2:
                break
            room -= request.tokens
            chosen.append(self._leave(request))
        heap = [(self._given[p], next(iter(of)), p) for p, of in self._peers.items()]
        heapq.heapify(heap)
        while heap:
            given, _, peer = heapq.heappop(heap)
            request = next(iter(self._peers[peer].values()))
            if chosen and request.tokens > room:
                break
            self._level = max(self._level, given)
            room -= request.tokens
            chosen.append(self._leave(request))
            if peer in self._peers:
                heapq.heappush(heap, (self._given[peer], next(iter(self._peers[peer])), peer))
        return chosen

    def _leave(self, request: _Request) -> _Request:
        self.charge(request.peer, request.tokens)
        self.remove(request.key)
        return request


@dataclass(slots=True)
class Scheduler:
    """Decides; the caller runs what :meth:`next` says, one batch at a time, and tells :meth:`done`.

    ``batch_tokens`` bounds the tokens of all steps of a batch together; ``patience`` is in seconds, as all times. Peers
    in ``shares`` get so many times what others get while all wait.
    """

    batch_tokens: int
    patience: float
    shares: Mapping[Hashable, float] = field(default_factory=dict)
    _queues: tuple[FairQueue, FairQueue, FairQueue] = field(init=False)
    _running: list[_Request] = field(default_factory=list)
    _running_kind: Priority = Priority.STEP
    _last_inference: Priority = Priority.INFERENCE
    _last_step: float = float("-inf")
    _batch_since: float = 0.0
    _gathering: Gathering = field(default_factory=Gathering)
    held_until: float | None = field(default=None, init=False)
    """When :meth:`next` is to be asked again if nothing changes before, after it held steps back."""

    def __post_init__(self) -> None:
        step, inference = (FairQueue(self.patience, self.shares) for _ in range(2))
        # a pass keeps what its gradients need until it ends: those of one peer should not add up
        self._queues = step, inference, FairQueue(self.patience, self.shares, in_turn=True)

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def submit(
        self, key: int, priority: Priority, now: float, *, peer: Hashable = None, tokens: int = 1
    ) -> None:
        """A new request. Keys are unique and grow with time. A step has at most ``batch_tokens`` tokens."""
        queue = self._queues[priority]
        if priority is Priority.BATCH and not queue:
            self._batch_since = now
        queue.add(_Request(key, peer, tokens, now))

    def cancel(self, key: int) -> None:
        """Forget a request, if it is there: no piece of it is chosen any more."""
        for queue in self._queues:
            if key in queue:
                queue.remove(key)

    def keys(self) -> Iterator[int]:
        """All requests that wait, those included of which a piece runs."""
        for queue in self._queues:
            yield from queue._requests  # noqa: SLF001  # its own

    def contended(self, now: float) -> bool:
        """Whether sessions step beside what runs: pieces should be small then."""
        return bool(self._queues[Priority.STEP]) or now - self._last_step < self.patience

    def next(self, now: float) -> list[int]:
        """The steps that run together, or the one request of which a piece runs; empty if nothing does."""
        steps, prompts, passes = self._queues
        self.held_until = None
        if steps and not prompts and not passes and steps.tokens < self.batch_tokens:
            self.held_until = self._gathering.held_until(now, len(steps))
            if self.held_until is not None:
                return []
        if passes and (now - self._batch_since >= self.patience or not (steps or prompts)):
            self._running_kind = Priority.BATCH
        elif steps and (self._last_inference is Priority.INFERENCE or not prompts):
            self._running_kind = Priority.STEP
        elif prompts:
            self._running_kind = Priority.INFERENCE
        else:
            return []
        queue = self._queues[self._running_kind]
        if self._running_kind is Priority.STEP:
            self._running = queue.choose_many(now, self.batch_tokens)
            self._last_step = now
        else:
            self._running = [queue.choose(now)]
        if self._running_kind is not Priority.BATCH:
            self._last_inference = self._running_kind
        return [request.key for request in self._running]

    def done(self, now: float, seconds: float, *, finished: bool = True) -> None:
        """What :meth:`next` returned has run, for so long; ``finished`` False: the request has more pieces."""
        if self._running_kind is not Priority.STEP:
            (request,) = self._running
            queue = self._queues[self._running_kind]
            queue.charge(request.peer, seconds)
            if request.key in queue:  # not cancelled meanwhile
                if finished:
                    queue.remove(request.key)
                else:
                    queue.touch(request.key, now)
            if self._running_kind is Priority.BATCH:
                self._batch_since = now
        else:
            waiting = self._queues[Priority.STEP]
            tokens = waiting.tokens + sum(request.tokens for request in self._running)
            fit = tokens <= self.batch_tokens  # else they will not run together, however long they wait
            self._gathering.ended(now, seconds, len(self._running) + len(waiting) if fit else 0)
        self._running = []
