"""How sessions of KwaaiNet callers begin, wait for each other and end; with a toy engine, in simulated time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing
from kwaai_world import peer

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import AllocationFailed, EngineError, InvalidRequest, Refusal
from kwaainet_bridge.kwaai.lease import Leases, Places
from kwaainet_bridge.kwaai.sessions import Sessions
from kwaainet_bridge.wire.kwaai_lease import Denied, Granted

ONE, TWO = peer(1), peer(2)
LENGTH = 100


class ToySession:
    def __init__(self, engine):
        self.engine = engine
        self.position = 0
        self.promised = 0
        self.steps = 0
        self.need(min(engine.max_length, defaults.CACHE_PROMISE_TOKENS))

    def need(self, tokens):
        more = max(0, tokens - self.promised)
        if more > self.engine.cache_bytes_left:
            raise AllocationFailed(f"Could not allocate {more} bytes: out of memory")
        self.promised += more
        self.engine.cache_bytes_left -= more

    async def step(self, tokens, *, seconds=0.0, error=None):
        self.steps += 1
        assert self.steps == 1, "two steps at a time"
        try:
            await trio.sleep(seconds)
            if error is not None:
                raise error
            self.need(self.position + tokens)
            self.position += tokens
        finally:
            self.steps -= 1


class ToyEngine:
    """What sessions need of an engine: a cache of some tokens in one block of one byte."""

    blocks = range(1)
    cache_bytes_per_token = 1
    max_length = LENGTH

    def __init__(self, tokens):
        self.cache_bytes_total = self.cache_bytes_left = tokens
        self.open = 0

    @asynccontextmanager
    async def open_session(self, blocks, batch_size, max_length, *, peer):
        assert (blocks, batch_size) == (self.blocks, 1)
        assert peer is not None
        assert max_length == min(self.max_length, self.cache_bytes_total)
        session = ToySession(self)
        self.open += 1
        try:
            yield session
        finally:
            assert not session.steps
            self.open -= 1
            self.cache_bytes_left += session.promised


class Desk:
    """Sessions on a toy engine, with leases beside them."""

    def __init__(self, nursery, *, tokens=16 * LENGTH):
        self.engine = ToyEngine(tokens)
        self.places = Places(
            Leases(iter(range(1, 1000)).__next__),
            lambda: [self.sessions],
            lambda name: name == "m",
            clock=trio.current_time,
        )
        self.connected = {ONE, TWO}
        self.sessions = self.made(nursery)

    def made(self, nursery):
        return Sessions(
            self.engine,
            self.places,
            nursery,
            connected=lambda: self.connected,
            clock=trio.current_time,
        )

    async def step(self, who, number, position, tokens=1, **how):
        async with self.sessions.step(who, number, position, tokens) as session:
            await session.step(tokens, **how)


@pytest.fixture
async def desk():
    async with trio.open_nursery() as nursery:
        yield Desk(nursery)
        nursery.cancel_scope.cancel()


# --- time


async def test_a_silent_session_is_closed_after_its_time(desk, autojump_clock):
    await desk.step(ONE, 1, 0, 3)
    await trio.sleep(defaults.KWAAI_SESSION_IDLE_SECONDS - 1)
    await desk.step(ONE, 1, 3)
    await trio.sleep(defaults.KWAAI_SESSION_IDLE_SECONDS - 1)
    assert (desk.sessions.open_sessions, desk.engine.open) == (1, 1)
    await trio.sleep(2)
    assert (desk.sessions.open_sessions, desk.engine.open) == (0, 0)
    assert desk.engine.cache_bytes_left == desk.engine.cache_bytes_total
    with pytest.raises(Refusal, match="you have no session 1 here"):
        await desk.step(ONE, 1, 4)


async def test_no_task_is_left_without_sessions_and_the_next_one_is_tended_too(desk, autojump_clock):
    for _ in range(2):
        await desk.step(ONE, 1, 0)
        assert len(desk.sessions._nursery.child_tasks) == 1
        await trio.sleep(defaults.KWAAI_SESSION_IDLE_SECONDS + 1)
        assert desk.engine.open == 0
        assert not desk.sessions._nursery.child_tasks


async def test_a_session_whose_step_takes_longer_than_that_is_not_idle(desk, autojump_clock):
    await desk.step(ONE, 1, 0)
    await desk.step(ONE, 1, 1, seconds=3 * defaults.KWAAI_SESSION_IDLE_SECONDS)
    await desk.step(ONE, 1, 2)
    assert desk.sessions.open_sessions == 1
    await trio.sleep(defaults.KWAAI_SESSION_IDLE_SECONDS + 2)
    assert desk.engine.open == 0


# --- one step at a time


async def test_a_second_request_waits_and_a_third_is_refused(desk, autojump_clock):
    await desk.step(ONE, 1, 0)
    order = []

    async def step(position, seconds):
        await desk.step(ONE, 1, position, seconds=seconds)
        order.append(position)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, 1, 5)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(step, 2, 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Refusal, match="session 1 has a request that runs and one that waits"):
            await desk.step(ONE, 1, 3)
        await desk.step(ONE, 2, 0)  # other sessions are not concerned
        await desk.step(TWO, 1, 0)
    assert order == [1, 2]


async def test_the_retry_of_a_step_whose_caller_left_begins_anew(desk, autojump_clock):
    """The caller gives up; its step is cancelled; the position is unknown, so the session is gone."""
    await desk.step(ONE, 1, 0, 10)
    with trio.move_on_after(1):
        await desk.step(ONE, 1, 10, seconds=100)
    assert desk.engine.open == 0
    with pytest.raises(Refusal, match="begin one with seq_pos 0"):
        await desk.step(ONE, 1, 10)
    await desk.step(ONE, 1, 0, 11)
    assert desk.engine.open == 1


async def test_a_retry_that_waits_for_the_cancelled_step_gets_its_answer(desk, autojump_clock):
    await desk.step(ONE, 1, 0, 10)
    first = trio.CancelScope()

    async def left():
        with first:
            await desk.step(ONE, 1, 10, seconds=100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(left)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(desk.step, ONE, 1, 0, 11)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
    assert desk.engine.open == 1
    await desk.step(ONE, 1, 11)


async def test_who_waited_for_a_session_that_ended_is_told(desk, autojump_clock):
    await desk.step(ONE, 1, 0)

    async def fails():
        with pytest.raises(EngineError):
            await desk.step(ONE, 1, 1, seconds=5, error=EngineError("broken"))

    async def waits():
        with pytest.raises(Refusal, match="session 1 has ended: begin one with seq_pos 0, not 2"):
            await desk.step(ONE, 1, 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(waits)
    assert desk.engine.open == 0
    assert not desk.sessions._live


async def test_a_waiting_request_that_is_cancelled_leaves_nothing(desk, autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: desk.step(ONE, 1, 0, seconds=5))
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await desk.step(ONE, 1, 0)
    await desk.step(ONE, 1, 1)
    assert desk.engine.open == 1


async def test_a_request_that_is_wrong_leaves_the_session_as_it_was(desk, autojump_clock):
    await desk.step(ONE, 1, 0, 4)
    with pytest.raises(InvalidRequest):
        await desk.step(ONE, 1, 4, error=InvalidRequest("no"))
    await desk.step(ONE, 1, 4)
    with pytest.raises(InvalidRequest):
        await desk.step(ONE, 2, 0, error=InvalidRequest("no"))
    assert desk.engine.open == 1  # a first step that fails opens none


# --- room


async def test_a_session_that_was_left_makes_room_for_another_of_its_peer(desk, autojump_clock):
    for number in range(8):
        await desk.step(ONE, number, 0)
        await trio.sleep(1)
    with pytest.raises(Refusal, match="your sessions hold 800 tokens"):
        await desk.step(ONE, 8, 0)
    await trio.sleep(defaults.KWAAI_LEFT_SESSION_SECONDS - 8)
    await desk.step(ONE, 0, 1)
    await trio.sleep(2)
    await desk.step(ONE, 8, 0)  # in the place of the one that was used longest ago
    assert sorted(number for _, number in desk.sessions._live) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert desk.sessions.open_sessions == 8


async def test_sessions_of_peers_that_have_gone_make_room_for_anybody(desk, autojump_clock, monkeypatch):
    """They are free places from the moment on that they may be taken for left, and end when the room is needed."""
    monkeypatch.setattr(defaults, "KWAAI_ROOM_SHARE", 0.0)
    resized(desk, 200, 1000)
    for number in range(4):
        await desk.step(ONE, number, 0, 100)
        await trio.sleep(1)
    assert desk.sessions.room() == (1000 - 4 * 128) // 200
    desk.connected = {TWO}
    assert desk.sessions.room() == (1000 - 4 * 128) // 200  # it may be back in a moment
    await trio.sleep(defaults.KWAAI_LEFT_SESSION_SECONDS)
    assert desk.sessions.room() == 1000 // 200
    desk.engine.cache_bytes_left -= 450  # of sessions in the other network
    await desk.step(TWO, 1, 0, 100)  # the oldest two end for this
    await desk.step(ONE, 3, 100, 1)  # those that are left go on
    assert sorted(desk.sessions._live) == sorted([(ONE, 1), (ONE, 2), (ONE, 3), (TWO, 1)])


async def test_sessions_of_peers_that_have_gone_leave_room_for_other_protocols(desk, autojump_clock):
    """Nobody of those asks for it here; what peers hold that are connected stays."""
    resized(desk, 200, 1000)
    for number in range(2):
        await desk.step(ONE, number, 0, 100)
        await trio.sleep(1)
    await desk.step(TWO, 1, 0, 100)
    desk.connected = {TWO}
    await trio.sleep(defaults.KWAAI_LEFT_SESSION_SECONDS + 3)
    assert desk.sessions.open_sessions == 3  # there is room
    desk.engine.cache_bytes_left -= 480  # of sessions in the other network
    await trio.sleep(defaults.KWAAI_ROOM_SECONDS + 1)
    assert sorted(desk.sessions._live) == sorted([(ONE, 1), (TWO, 1)])
    assert desk.engine.cache_bytes_left >= 250
    desk.engine.cache_bytes_left -= 200
    await trio.sleep(defaults.KWAAI_ROOM_SECONDS + 1)
    assert list(desk.sessions._live) == [(TWO, 1)]


async def test_sessions_of_peers_that_are_here_make_no_room_for_those_of_others(desk, autojump_clock):
    desk.engine.cache_bytes_left -= 15 * LENGTH
    await desk.step(ONE, 1, 0)
    await trio.sleep(defaults.KWAAI_LEFT_SESSION_SECONDS * 2)
    with pytest.raises(
        Refusal, match="the KV cache has no room for a session of 100 tokens: try again in 5 s"
    ):
        await desk.step(TWO, 1, 0)
    assert desk.sessions.uses() == {ONE: 1}


async def test_a_refused_replacement_gives_its_place_back(desk, autojump_clock):
    await desk.step(ONE, 1, 0)
    desk.sessions.accepting = False
    with pytest.raises(Refusal, match="shutting down"):
        await desk.step(ONE, 1, 0)
    assert desk.engine.open == 0
    assert desk.engine.cache_bytes_left == desk.engine.cache_bytes_total
    assert desk.sessions._share.used == 0


def resized(desk, maximum, total):
    """The desk with a longest session and a cache of so many tokens."""
    desk.engine.max_length = maximum
    desk.engine.cache_bytes_total = desk.engine.cache_bytes_left = total
    desk.sessions = desk.made(desk.sessions._nursery)
    return desk


@pytest.mark.parametrize(
    ("limits", "tokens", "counted"),
    [
        ((8192, 16384), 1, 128),
        ((8192, 16384), 1500, 1500),
        ((8192, 16384), 8000, 8000),
        ((100, 16384), 1, 100),
        ((8192, 256), 1, 128),
    ],
)
async def test_what_a_session_takes_at_first(limits, tokens, counted, desk, autojump_clock):
    resized(desk, *limits)
    await desk.step(ONE, 1, 0, tokens)
    assert desk.sessions._share.held(ONE) == counted
    assert desk.engine.cache_bytes_left == limits[1] - counted


async def test_a_session_takes_more_as_it_needs_it(desk, autojump_clock):
    resized(desk, 1000, 4000)
    await desk.step(ONE, 1, 0, 128)
    for position in range(128, 1000):
        await desk.step(ONE, 1, position)
        assert position < desk.sessions._share.held(ONE) <= position + 1 + defaults.CACHE_AHEAD_TOKENS
    assert desk.engine.cache_bytes_left == 3000
    with pytest.raises(Refusal, match=r"has room for 1000 tokens, 1000 \+ 1 are more: none may be longer"):
        await desk.step(ONE, 1, 1000)
    assert desk.sessions.open_sessions == 1
    await desk.step(ONE, 1, 0)
    assert desk.sessions._share.held(ONE) == 128


async def test_one_peer_s_sessions_grow_no_further_than_what_is_left_for_others(desk, autojump_clock):
    resized(desk, 1000, 1000)
    await desk.step(ONE, 1, 0, 200)
    await desk.step(ONE, 2, 0, 200)
    with pytest.raises(
        Refusal, match="your sessions hold 400 tokens of the KV cache, the rest is for others"
    ):
        await desk.step(ONE, 2, 200, 220)
    await desk.step(TWO, 1, 0, 200)
    await trio.sleep(defaults.KWAAI_LEFT_SESSION_SECONDS)
    await desk.step(ONE, 2, 200, 220)  # where it was, in the room of the one that was left
    assert desk.sessions.uses() == {ONE: 1, TWO: 1}


async def test_a_step_for_which_the_cache_has_no_room_leaves_the_session_as_it_was(desk, autojump_clock):
    resized(desk, 1000, 1000)
    await desk.step(ONE, 1, 0, 128)
    desk.engine.cache_bytes_left -= 872  # of sessions in the other network
    with pytest.raises(AllocationFailed, match="out of memory"):
        await desk.step(ONE, 1, 128)
    desk.engine.cache_bytes_left += 872
    await desk.step(ONE, 1, 128)


async def test_places_are_counted_by_the_usual_length_but_one_that_can_begin_may(desk, autojump_clock):
    resized(desk, 8192, 3 * defaults.KWAAI_SESSION_TOKENS)
    assert desk.sessions.room() == 3
    for left, room in ((2 * defaults.KWAAI_SESSION_TOKENS - 1, 1), (200, 1), (128, 1), (127, 0)):
        desk.engine.cache_bytes_left = left
        assert desk.sessions.room() == room


# --- leases


async def test_leased_places_are_not_for_others(desk, autojump_clock):
    desk.engine.cache_bytes_left = 2 * LENGTH
    assert isinstance(desk.places.grant(ONE, "m"), Granted)
    await desk.step(TWO, 1, 0)
    with pytest.raises(Refusal, match="at capacity: all free places are leased: try again in 5 s"):
        await desk.step(TWO, 2, 0)
    assert desk.places.grant(peer(3), None) == Denied("DeniedAtCapacity", 5)
    await desk.step(ONE, 1, 0)
    with pytest.raises(Refusal, match="no room"):
        await desk.step(TWO, 2, 0)


async def test_a_lease_that_is_not_used_ends(desk, autojump_clock):
    desk.engine.cache_bytes_left = LENGTH
    desk.places.grant(ONE, None)
    await trio.sleep(defaults.KWAAI_LEASE_SECONDS - 3)
    with pytest.raises(Refusal, match="try again in 3 s"):
        await desk.step(TWO, 1, 0)
    await trio.sleep(3)
    await desk.step(TWO, 1, 0)


# --- the end


async def test_draining_goes_on_with_what_runs_until_it_is_silent(desk, autojump_clock):
    await desk.step(ONE, 1, 0)
    await desk.step(TWO, 1, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.sessions.drain)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Refusal, match="shutting down and takes no new sessions"):
            await desk.step(peer(3), 1, 0)
        start = trio.current_time()
        for position in range(1, 6):
            await trio.sleep(defaults.KWAAI_DRAIN_IDLE_SECONDS - 2)
            await desk.step(ONE, 1, position)
        assert desk.sessions.uses() == {ONE: 1}
    # silent from the last step on, and looked at once a second at most
    ended = start + 5 * (defaults.KWAAI_DRAIN_IDLE_SECONDS - 2) + defaults.KWAAI_DRAIN_IDLE_SECONDS
    assert ended <= trio.current_time() <= ended + 1.5
    assert desk.engine.open == 0


async def test_closing_waits_for_no_step_and_leaves_no_session(desk, autojump_clock):
    await desk.step(ONE, 1, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: desk.step(ONE, 2, 0, seconds=50))
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
        await desk.sessions.close()
        assert trio.current_time() == before
        assert desk.engine.open == 1
    assert desk.engine.open == 0


@pytest.mark.parametrize("how", ["close", "end_sessions", "drain"])
async def test_a_session_whose_step_is_refused_meanwhile_ends_too(desk, autojump_clock, how):
    """A refusal leaves a session as it was, but not here."""
    await desk.step(ONE, 7, 0)
    refused = InvalidRequest("no room for more")
    async with trio.open_nursery() as nursery:

        async def step():
            with pytest.raises(InvalidRequest, match="no room for more"):
                await desk.step(ONE, 7, 1, seconds=5, error=refused)

        nursery.start_soon(step)
        await trio.sleep(1)
        began = trio.current_time()
        await getattr(desk.sessions, how)()
    await trio.sleep(0.1)
    if how != "drain":
        assert trio.current_time() - began < 6
    assert (desk.engine.open, desk.sessions.open_sessions) == (0, 0)


async def test_a_session_that_steps_while_others_are_ended_is_waited_for(desk, autojump_clock, monkeypatch):
    """Closing one takes a while, in which the client of another may begin a step."""
    for number in (1, 2):
        await desk.step(ONE, number, 0)

    close = desk.sessions._close

    async def slowly(live):
        await trio.sleep(1)
        await close(live)

    monkeypatch.setattr(desk.sessions, "_close", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.sessions.end_sessions)
        await trio.sleep(0.5)
        nursery.start_soon(partial(desk.step, ONE, 2, 1, seconds=5))
    assert desk.sessions.open_sessions == 0
