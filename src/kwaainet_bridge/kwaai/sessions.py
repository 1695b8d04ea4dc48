"""Sessions of KwaaiNet callers: who has which, how much of the KV cache each peer's may take, and when they end.

KwaaiNet names a session by a number alone, that its caller chose; here it is the caller's own. There is no message that
opens or closes one: position 0 begins it, silence ends it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, ServedSession, Session
from kwaainet_bridge.errors import AllocationFailed, InvalidRequest, Refusal
from kwaainet_bridge.kwaai.lease import Places
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Live:
    """A session of one caller; ``session`` is None before it is open and after it was closed."""

    peer: PeerId
    number: int
    lock: trio.Lock = field(default_factory=trio.Lock)
    session: Session | None = None
    opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    counted: int = 0
    """Tokens of KV cache that count as its peer's."""
    began: float = 0.0
    last_used: float = 0.0

    def snapshot(self) -> ServedSession | None:
        """What it is and holds now; None if it is not open."""
        if self.session is None:
            return None
        held = self.session.snapshot()
        return ServedSession(
            peer=self.peer,
            name=str(self.number),
            blocks=held.blocks,
            adapter=held.adapter,
            began=self.began,
            idle_since=None if self.lock.locked() else self.last_used,
            session=held,
        )


class Sessions:
    """The sessions on one engine's blocks, all of them. ``clock`` gives seconds, as trio's deadlines count them.

    A task in ``nursery`` closes those that are idle, as long as there are any. The engine gives sessions room in the KV
    cache as they need it. No peer gets more of it than is left for all others, nor more than
    ``defaults.KWAAI_SESSIONS_PER_PEER`` sessions; beyond, and where the cache is full, the oldest session is closed
    that has been idle for ``defaults.KWAAI_LEFT_SESSION_SECONDS``, of its own or of a peer that is not among
    ``connected``: many who come, ask and go would keep all others out until their time is over.
    """

    def __init__(
        self,
        engine: Engine,
        places: Places,
        nursery: trio.Nursery,
        *,
        connected: Callable[[], Collection[PeerId]],
        clock: Callable[[], float],
    ) -> None:
        self.accepting = True
        """Whether new sessions are taken; running ones go on either way."""
        self._engine = engine
        self._places = places
        self._nursery = nursery
        self._connected = connected
        self._clock = clock
        self._live: dict[tuple[PeerId, int], _Live] = {}
        self._counts: Counter[PeerId] = Counter()
        self._token_bytes: int = len(engine.blocks) * engine.cache_bytes_per_token
        self._share = FairPool(engine.cache_bytes_total // self._token_bytes)
        self._idle_seconds = defaults.KWAAI_SESSION_IDLE_SECONDS
        self._changed = trio.Event()
        self._is_tended = False
        self._closing = False

    @property
    def open_sessions(self) -> int:
        return self._counts.total()

    def sessions(self) -> list[ServedSession]:
        """Those that are open."""
        return [view for live in self._live.values() if (view := live.snapshot()) is not None]

    def room(self) -> int:
        """How many more sessions of the usual length fit into the KV cache; at least one, if one can begin.

        What those hold that others' may take the place of is free.
        """
        left = self._engine.cache_bytes_left // self._token_bytes + sum(s.counted for s in self._left())
        return left // min(defaults.KWAAI_SESSION_TOKENS, self._longest) or int(left >= self._first(1))

    def uses(self) -> Mapping[PeerId, int]:
        """How many sessions each peer has."""
        return self._counts

    @asynccontextmanager
    async def step(self, peer: PeerId, number: int, position: int, tokens: int) -> AsyncIterator[Session]:
        """The session for one request of ``tokens`` tokens at ``position``; it is the block's alone.

        Position 0 begins a session, in the place of the peer's former one of that number; any other must be where the
        session is. One request waits while another one of the same session runs: its caller has given up the first
        and tries again, while the last piece of work of that one is still running. A third is refused. Leaving the
        block by an error of the request itself leaves the session as it was; by anything else, cancellation included,
        closes it, since nobody knows then how far its caller is.

        Raises Refusal, InvalidRequest or AllocationFailed with what is wrong and what would be right.
        """
        key = peer, number
        live = self._live.get(key)
        if live is None:
            if position:
                raise Refusal(f"you have no session {number} here: begin one with seq_pos 0, not {position}")
            live = self._live[key] = _Live(peer, number)
        if live.lock.statistics().tasks_waiting:
            raise Refusal(
                f"session {number} has a request that runs and one that waits: wait for their answers"
            )
        try:
            live.lock.acquire_nowait()
        except trio.WouldBlock:
            await live.lock.acquire()
        try:
            async with self._used(live, position, tokens) as session:
                yield session
        finally:
            if live.session is None and not live.lock.statistics().tasks_waiting:
                del self._live[key]
            live.lock.release()

    @asynccontextmanager
    async def _used(self, live: _Live, position: int, tokens: int) -> AsyncIterator[Session]:
        if position == 0:
            await self._close(live)
            session = await self._open(live, tokens)
        else:
            session = await self._at(live, position, tokens)
        try:
            yield session
        except (InvalidRequest, Refusal, AllocationFailed):
            if position == 0 or self._closing:
                await self._close(live)
            raise
        except BaseException:
            await self._close(live)
            raise
        live.last_used = self._clock()
        if self._closing:
            await self._close(live)

    async def _at(self, live: _Live, position: int, tokens: int) -> Session:
        session, number = live.session, live.number
        if session is None:  # closed while this request waited for it
            raise Refusal(f"session {number} has ended: begin one with seq_pos 0, not {position}")
        if session.position != position:
            raise Refusal(
                f"session {number} is at position {session.position}: seq_pos {position} is not there"
            )
        end = position + tokens
        if end > self._longest:
            raise Refusal(
                f"session {number} has room for {self._longest} tokens, {position} + {tokens} are more: "
                "none may be longer"
            )
        if end > live.counted:
            await self._count(live, min(self._longest, end + defaults.CACHE_AHEAD_TOKENS))
        return session

    async def _count(self, live: _Live, tokens: int) -> None:
        """Have so many tokens of KV cache counted as those of the peer's session, in the place of ones that it left."""
        while not self._share.reserve(live.peer, tokens - live.counted):
            if not await self._close_left(live.peer, of_others=True):
                raise Refusal(self._too_many(live.peer))
        live.counted = tokens

    async def _open(self, live: _Live, tokens: int) -> Session:
        if not self.accepting:
            raise Refusal("this server is shutting down and takes no new sessions: go on with another one")
        if self._places.paused:
            raise Refusal("this server is paused by its operator: go on with another one")
        if tokens > self._longest:
            raise InvalidRequest(f"a session may have {self._longest} tokens here, {tokens} are more")
        counted = self._first(tokens)
        while (obstacle := self._obstacle(live.peer, counted)) is not None:
            of_others = self._counts[live.peer] < defaults.KWAAI_SESSIONS_PER_PEER
            if not await self._close_left(live.peer, of_others=of_others):
                raise Refusal(f"{obstacle}: try again in {self._places.retry_after} s, or another server")
        try:
            live.session = await live.opened.enter_async_context(
                self._engine.open_session(self._engine.blocks, 1, self._longest, peer=live.peer)
            )
        except BaseException:
            self._share.release(live.peer, counted)
            raise
        live.counted = counted
        live.began = live.last_used = self._clock()
        self._counts[live.peer] += 1
        if not self._is_tended:
            self._is_tended = True
            self._nursery.start_soon(self._tend)
        return live.session

    @property
    def _longest(self) -> int:
        return min(self._engine.max_length, self._share.limit)

    def _first(self, tokens: int) -> int:
        """What a session takes of the KV cache, in tokens, whose first request has that many."""
        return min(self._longest, max(tokens, defaults.CACHE_PROMISE_TOKENS))

    def _obstacle(self, peer: PeerId, tokens: int) -> str | None:
        """Why ``peer`` gets no session now that takes so many tokens; None once they count as the peer's."""
        if self._counts[peer] >= defaults.KWAAI_SESSIONS_PER_PEER:
            return f"one peer may have {defaults.KWAAI_SESSIONS_PER_PEER} sessions here, and you have"
        if tokens * self._token_bytes > self._engine.cache_bytes_left:
            return f"the KV cache has no room for a session of {tokens} tokens"
        if not self._places.may_begin(peer, self):
            return "this server is at capacity: all free places are leased"
        if not self._share.reserve(peer, tokens):
            return self._too_many(peer)
        return None

    def _too_many(self, peer: PeerId) -> str:
        return f"your sessions hold {self._share.held(peer)} tokens of the KV cache, the rest is for others"

    async def _close_left(self, peer: PeerId, *, of_others: bool) -> bool:
        """Close the session that has been idle longest of those that may have been left; the peer's own come first."""
        own = [s for s in self._idle() if s.peer == peer and s.last_used <= self._left_before]
        left = own or (self._left() if of_others else [])
        if not left:
            return False
        await self._end(min(left, key=lambda s: s.last_used))
        return True

    def _left(self) -> list[_Live]:
        """Sessions whose peers have gone, that have been idle for so long that these will hardly come back."""
        connected = set(self._connected())
        return [s for s in self._idle() if s.last_used <= self._left_before and s.peer not in connected]

    @property
    def _left_before(self) -> float:
        return self._clock() - defaults.KWAAI_LEFT_SESSION_SECONDS

    def _idle(self) -> list[_Live]:
        return [s for s in self._live.values() if s.session is not None and not s.lock.locked()]

    async def _tend(self) -> None:
        """Close what is idle for too long, and make room for other protocols' sessions, until there are no sessions."""
        try:
            while self._counts:
                first = min(s.last_used for s in self._live.values() if s.session is not None)
                wait = max(1.0, first + self._idle_seconds - self._clock())  # one that runs may be overdue
                changed = self._changed
                with trio.move_on_after(min(wait, defaults.KWAAI_ROOM_SECONDS)):
                    await changed.wait()
                await self.close_idle(self._clock())
                await self._keep_room()
        finally:
            self._is_tended = False

    async def _keep_room(self) -> None:
        """Close sessions that were left while too little of the KV cache is free: others do not ask for it here."""
        least = self._engine.cache_bytes_total * defaults.KWAAI_ROOM_SHARE
        while self._engine.cache_bytes_left < least and (left := self._left()):
            await self._end(min(left, key=lambda s: s.last_used))

    async def close_idle(self, now: float) -> None:
        """Close the sessions whose last request ended too long before ``now``."""
        for live in self._idle():
            if live.last_used + self._idle_seconds <= now and not live.lock.locked():
                log.debug("session %d of %s: idle for %g s", live.number, live.peer, self._idle_seconds)
                await self._end(live)

    async def _end(self, live: _Live) -> None:
        """Close an idle session and forget it."""
        live.lock.acquire_nowait()
        try:
            await self._close(live)
        finally:
            if not live.lock.statistics().tasks_waiting:
                self._live.pop((live.peer, live.number), None)
            live.lock.release()

    async def _close(self, live: _Live) -> None:
        """Free what an open session holds. The caller has its lock."""
        if live.session is None:
            return
        live.session = None
        with trio.CancelScope(shield=True):
            await live.opened.aclose()
        live.opened = AsyncExitStack()
        self._share.release(live.peer, live.counted)
        live.counted = 0
        self._counts[live.peer] -= 1
        if not self._counts[live.peer]:
            del self._counts[live.peer]
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def drain(self) -> None:
        """Take no new sessions; return once all have been silent for ``defaults.KWAAI_DRAIN_IDLE_SECONDS``."""
        self.accepting = False
        self._idle_seconds = defaults.KWAAI_DRAIN_IDLE_SECONDS
        self._notify()
        while self._counts:
            await self._changed.wait()

    async def end_sessions(self) -> None:
        """Close all; return once those that run a step have ended it and are closed."""
        self._closing = True
        try:
            await self._end_idle()
            while self._counts:
                await self._changed.wait()
        finally:
            self._closing = False

    async def _end_idle(self) -> None:
        # closing one takes a while, in which a step of another may begin
        while idle := self._idle():
            await self._end(idle[0])

    async def close(self) -> None:
        """Take no new sessions and close all; one that runs a step is closed when that has ended."""
        self.accepting = False
        self._closing = True
        await self._end_idle()
