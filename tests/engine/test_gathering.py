"""Steps that wait a moment for others, in simulated time: sessions that come again after each reply, in a loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge.defaults import GATHER_MAX_PAUSE, GATHER_SHARE
from kwaainet_bridge.engine.scheduler import Priority, Scheduler

BATCH_TOKENS = 64
Cost = Callable[[int], float]


def memory_bound(steps: int) -> float:
    """Seconds of a batch that mostly reads weights."""
    return 0.06 + 0.001 * steps


@dataclass
class Run:
    """What became of a simulated while."""

    steps: int = 0
    sizes: list[int] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    """How long nothing ran although something was ready, each time that this was so."""
    durations: list[float] = field(default_factory=list)
    """Of the batch before each of those."""


def decode(
    away: list[Callable[[], float]],
    *,
    cost: Cost = memory_bound,
    until: float = 60.0,
    gather: bool = True,
    tokens: int = 1,
) -> Run:
    """One session for each of ``away``, which says how long after a reply it comes again."""
    scheduler, run, now, last = Scheduler(BATCH_TOKENS, 0.5), Run(), 0.0, 0.0
    coming = sorted((first(), session) for session, first in enumerate(away))
    sessions: dict[int, int] = {}
    keys = iter(range(10**9))

    def arrive(to: float) -> None:
        while coming and coming[0][0] <= to:
            at, session = coming.pop(0)
            key = next(keys)
            sessions[key] = session
            scheduler.submit(key, Priority.STEP, at, peer=session, tokens=tokens)

    ready_since: float | None = None
    while now < until:
        arrive(now)
        if len(scheduler) and ready_since is None:
            ready_since = now
        chosen = scheduler.next(now)
        if not chosen and scheduler.held_until is not None and not gather:
            scheduler._gathering._expected = 0
            chosen = scheduler.next(now)
        if not chosen:
            wake = [at for at in (scheduler.held_until, coming[0][0] if coming else None) if at is not None]
            now = min(wake)
            continue
        assert ready_since is not None
        if now > ready_since:
            run.held.append(now - ready_since)
            run.durations.append(last)
        ready_since = None
        last = cost(len(chosen))
        run.steps, run.sizes = run.steps + len(chosen), [*run.sizes, len(chosen)]
        now += last
        arrive(now)
        scheduler.done(now, last)
        coming += [(now + away[sessions[key]](), sessions.pop(key)) for key in chosen]
        coming.sort()
    return run


def one_after_the_other(sessions: int, apart: float) -> list[Callable[[], float]]:
    """A client that deals with its replies one by one."""
    return [lambda n=n: (n + 1) * apart for n in range(sessions)]


def test_sessions_that_come_soon_run_together() -> None:
    away = one_after_the_other(16, 0.002)
    gathered, apart = decode(away), decode(away, gather=False)
    assert set(gathered.sizes[5:]) == {16}
    assert max(apart.sizes[5:]) < 16
    assert gathered.steps > 1.25 * apart.steps


def test_a_session_alone_never_waits() -> None:
    assert decode([lambda: 0.001]).held == []


def test_a_session_that_leaves_is_waited_for_once() -> None:
    """And the others, who came, go on together."""
    stays = 8

    def leaves() -> Callable[[], float]:
        replies = iter([0.001, 0.001])
        return lambda: next(replies, 1e9)

    run = decode([*[lambda: 0.001] * stays, leaves()])
    assert set(run.sizes[-100:]) == {stays}
    assert sum(seconds > 0.002 for seconds in run.held) == 1


@pytest.mark.parametrize("far", [1, 4, 12])
def test_what_waiting_in_vain_costs_is_little(far: int) -> None:
    """Sessions that come at once beside others whose way is longer than anyone waits."""
    chance = random.Random(1)
    away = [*[lambda: 0.0001] * 4, *[lambda: chance.uniform(0.1, 0.4)] * far]
    gathered, apart = decode(away, until=120.0), decode(away, until=120.0, gather=False)
    assert gathered.steps > 0.97 * apart.steps


def test_after_waiting_in_vain_it_is_tried_less_often_and_again_when_it_pays() -> None:
    state = {"far": True}
    # the second comes while the first runs alone: both are in the next batch, and it is far when that has ended
    away = [lambda: 0.0, lambda: 0.045 if state["far"] else 0.01]
    run = decode(away, cost=lambda _steps: 0.06, until=200.0)
    assert 0 < len(run.held) < 1.5 * len(run.sizes) / GATHER_MAX_PAUSE + 10
    state["far"] = False
    run = decode(away, cost=lambda _steps: 0.06, until=200.0)
    assert set(run.sizes[-50:]) == {2}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0.0001, 0.3), st.floats(0.0001, 0.3)), min_size=1, max_size=20),
    st.floats(0.001, 0.1),
    st.floats(0.0, 0.01),
    st.integers(0, 1 << 30),
)
def test_nothing_is_held_longer_than_a_share_of_the_last_batch(
    ranges: list[tuple[float, float]], fixed: float, each: float, seed: int
) -> None:
    chance = random.Random(seed)
    away: list[Callable[[], float]] = [
        lambda low=low, high=high: chance.uniform(low, high) for low, high in ranges
    ]
    run = decode(away, cost=lambda steps: fixed + each * steps, until=5.0)
    for seconds, duration in zip(run.held, run.durations, strict=True):
        assert seconds <= GATHER_SHARE * duration + 1e-9


def test_what_fills_a_batch_is_not_held() -> None:
    scheduler = Scheduler(4, 0.5)
    for key in range(8):
        scheduler.submit(key, Priority.STEP, 0.0, peer=key)
    assert len(scheduler.next(0.0)) == 4
    scheduler.done(1.0, 1.0)
    assert len(scheduler.next(1.0)) == 4  # four more may come, and would not fit
    scheduler.done(2.0, 1.0)
    scheduler.submit(8, Priority.STEP, 2.0)
    assert scheduler.next(2.0) == []
    assert scheduler.held_until == 2.0 + GATHER_SHARE


@pytest.mark.parametrize(("sessions", "tokens"), [(2, 40), (3, 30), (100, 1)])
def test_steps_that_do_not_fit_into_one_batch_do_not_wait_for_each_other(sessions: int, tokens: int) -> None:
    away = [lambda: 0.049] * sessions
    gathered = decode(away, cost=lambda _steps: 0.1, tokens=tokens)
    apart = decode(away, cost=lambda _steps: 0.1, tokens=tokens, gather=False)
    assert gathered.steps >= 0.99 * apart.steps


def one_of_two(after: float) -> Scheduler:
    """Two steps ran together for so many seconds, and one has come again, as number 2: it is held."""
    scheduler = Scheduler(BATCH_TOKENS, 0.5)
    for key in range(2):
        scheduler.submit(key, Priority.STEP, 0.0, peer=key)
    assert scheduler.next(0.0) == [0, 1]
    scheduler.done(after, after)
    scheduler.submit(2, Priority.STEP, after)
    assert scheduler.next(after) == []
    return scheduler


def test_nothing_is_held_for_long_after_a_batch_that_took_very_long() -> None:
    assert one_of_two(after=20.0).held_until == 20.5


@pytest.mark.parametrize("kind", [Priority.INFERENCE, Priority.BATCH])
def test_nothing_is_held_beside_other_work(kind: Priority) -> None:
    """The thread would compute that meanwhile, and whoever waits for it has waited longer."""
    scheduler = one_of_two(after=1.0)
    scheduler.submit(3, kind, 1.1)
    assert scheduler.next(1.1) in ([2], [3])
    assert scheduler.held_until is None


def test_held_steps_can_be_cancelled() -> None:
    scheduler = one_of_two(after=1.0)
    scheduler.cancel(2)
    assert scheduler.next(1.1) == []
    assert scheduler.held_until is None
