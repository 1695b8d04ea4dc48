"""The scheduler in simulated time: every request runs once, nobody starves, nobody gets more than a share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge.engine.scheduler import MAX_IDLE_PEERS, Priority, Scheduler

BATCH_TOKENS = 8
PATIENCE = 0.5
STEP, INFERENCE, BATCH = Priority


@dataclass
class Job:
    """What a caller submits: ``pieces`` many runs are its whole."""

    priority: Priority
    peer: str
    tokens: int = 1
    pieces: int = 1
    arrives: float = 0.0
    cancelled_at: float | None = None
    runs: list[tuple[float, float]] = field(default_factory=list)


def simulate(
    jobs: list[Job],
    *,
    cost: Callable[[list[Job]], float] = lambda _batch: 0.01,
    until: float = float("inf"),
    shares: dict[str, float] | None = None,
) -> tuple[Scheduler, list[tuple[float, list[Job]]]]:
    """Run what the scheduler says, one batch after the other; the batches with the times when they began."""
    scheduler, history, now = Scheduler(BATCH_TOKENS, PATIENCE, shares or {}), [], 0.0
    coming = sorted(range(len(jobs)), key=lambda i: jobs[i].arrives)
    keys = {index: key for key, index in enumerate(coming)}
    of_key = {key: jobs[index] for index, key in keys.items()}
    cancels = sorted(
        (job.cancelled_at, keys[i]) for i, job in enumerate(jobs) if job.cancelled_at is not None
    )

    def advance(to: float) -> None:
        while coming and jobs[coming[0]].arrives <= to:
            index = coming.pop(0)
            job = jobs[index]
            if job.cancelled_at is None or job.cancelled_at > job.arrives:
                scheduler.submit(keys[index], job.priority, job.arrives, peer=job.peer, tokens=job.tokens)
        while cancels and cancels[0][0] <= to:
            scheduler.cancel(cancels.pop(0)[1])

    while now < until:
        advance(now)
        chosen = scheduler.next(now)
        if not chosen:
            wake = [scheduler.held_until] if scheduler.held_until is not None else []
            wake += [jobs[coming[0]].arrives] if coming else []
            if not wake:
                break
            now = max(now, min(wake))
            continue
        batch = [of_key[key] for key in chosen]
        history.append((now, batch))
        seconds = cost(batch)
        for job in batch:
            job.runs.append((now, now + seconds))
        advance(now + seconds)
        now += seconds
        scheduler.done(now, seconds, finished=len(batch[0].runs) >= batch[0].pieces)
    return scheduler, history


jobs = st.lists(
    st.builds(
        Job,
        priority=st.sampled_from(Priority),
        peer=st.sampled_from("abcd"),
        tokens=st.integers(1, BATCH_TOKENS),
        pieces=st.integers(1, 5),
        arrives=st.floats(0, 2),
        cancelled_at=st.one_of(st.none(), st.floats(0, 3)),
    ),
    max_size=30,
)


@given(jobs, st.floats(0.001, 0.5))
def test_everything_runs_once_and_nothing_after_it_was_cancelled(todo: list[Job], seconds: float) -> None:
    for job in todo:
        if job.priority is STEP:
            job.pieces = 1
    scheduler, history = simulate(todo, cost=lambda batch: seconds * len(batch))
    for job in todo:
        if job.cancelled_at is None:
            assert len(job.runs) == job.pieces
        else:
            assert len(job.runs) <= job.pieces
            assert all(began < job.cancelled_at for began, _ in job.runs)
        assert all(began >= job.arrives for began, _ in job.runs)
    for _, batch in history:
        if batch[0].priority is STEP:
            assert all(job.priority is STEP for job in batch)
            assert sum(job.tokens for job in batch) <= BATCH_TOKENS
        else:
            assert len(batch) == 1
    assert len(scheduler) == 0
    assert list(scheduler.keys()) == []


def test_all_that_is_ready_and_fits_runs_together() -> None:
    todo = [Job(STEP, peer) for peer in "aabcdefg"] + [Job(STEP, "h")]
    _, history = simulate(todo)
    assert [len(batch) for _, batch in history] == [8, 1]


def test_steps_and_pieces_of_prompts_take_turns() -> None:
    todo = [Job(INFERENCE, "long", pieces=20)]
    todo += [Job(STEP, "a", arrives=0.055 + 0.0001 * i, tokens=BATCH_TOKENS) for i in range(10)]
    _, history = simulate(todo)
    kinds = [batch[0].priority for _, batch in history]
    assert kinds[:6] == [INFERENCE] * 6
    assert kinds[6:26] == [STEP, INFERENCE] * 10
    assert kinds[26:] == [INFERENCE] * 4


def test_passes_wait_for_inference_but_not_for_ever() -> None:
    busy = [Job(STEP, "a", arrives=i * 0.01) for i in range(500)]
    train = Job(BATCH, "b", pieces=6)
    simulate([*busy, train])
    starts = [began for began, _ in train.runs]
    assert starts[0] <= PATIENCE + 0.02
    for before, after in zip(train.runs, starts[1:], strict=False):
        assert after - before[1] <= PATIENCE + 0.02
    alone = Job(BATCH, "b", pieces=6)
    simulate([alone])
    assert alone.runs[-1][1] < 0.07


def test_pieces_are_to_be_small_while_sessions_step() -> None:
    scheduler = Scheduler(BATCH_TOKENS, PATIENCE)
    scheduler.submit(0, INFERENCE, 0.0)
    assert not scheduler.contended(0.0)
    scheduler.submit(1, STEP, 0.0)
    assert scheduler.contended(0.0)
    assert scheduler.next(0.0) == [1]
    scheduler.done(0.1, 0.1)
    assert scheduler.contended(0.4)
    assert not scheduler.contended(0.6)


@settings(deadline=None)
@given(
    greedy=st.integers(1, 40),
    kind=st.sampled_from(Priority),
    seconds=st.floats(0.01, 0.1),
    late=st.floats(0, 1),
)
def test_a_peer_with_one_request_does_not_wait_behind_all_of_another(
    greedy: int, kind: Priority, seconds: float, late: float
) -> None:
    flood = [Job(kind, "greedy", tokens=4, arrives=i * 0.001) for i in range(greedy)]
    modest = Job(kind, "modest", tokens=4, arrives=late)
    simulate([*flood, modest], cost=lambda _batch: seconds)
    # one batch that runs, one for whoever has waited longest, and then it is its turn
    assert modest.runs[0][0] <= late + 3 * seconds + 1e-9


@settings(deadline=None)
@given(st.sampled_from([INFERENCE, BATCH]), st.integers(2, 5), st.integers(1, 6))
def test_peers_get_the_same_time_however_much_they_ask(kind: Priority, peers: int, factor: int) -> None:
    """Pieces of the first peer are longer, and it has several requests."""
    todo = [Job(kind, "p0", pieces=10_000) for _ in range(factor)]
    todo += [Job(kind, f"p{i}", pieces=10_000) for i in range(1, peers)]
    _, history = simulate(
        todo, cost=lambda batch: 0.03 if batch[0].peer == "p0" else 0.01, until=min(10.0, PATIENCE)
    )
    time: Counter[str] = Counter()
    for _, batch in history:
        time[batch[0].peer] += 0.03 if batch[0].peer == "p0" else 0.01
    assert max(time.values()) - min(time.values()) <= 0.04


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(Priority), st.integers(1, 3))
def test_nobody_starves_among_endless_newcomers(kind: Priority, tokens: int) -> None:
    """Twice as many requests come as can be served, each of another peer. An earlier one still gets its turn."""
    spent = [Job(kind, "spent", tokens=BATCH_TOKENS, arrives=i * 0.0001) for i in range(20)]
    newcomers = [Job(kind, f"new{i}", tokens=BATCH_TOKENS, arrives=i * 0.05) for i in range(200)]
    late = Job(kind, "spent", tokens=tokens, arrives=1.0)
    simulate([*spent, *newcomers, late], cost=lambda _batch: 0.1, until=30)
    # those before it in the line of who waits longest, every other turn
    assert late.runs
    assert late.runs[0][0] <= 1.0 + PATIENCE + 2 * 0.1 * (20 + 20) + 0.5


def test_peers_that_left_are_forgotten() -> None:
    scheduler = Scheduler(BATCH_TOKENS, PATIENCE)
    for key in range(5 * MAX_IDLE_PEERS):
        scheduler.submit(key, STEP, 0.0, peer=f"peer {key}")
        assert scheduler.next(0.0) == [key]
        scheduler.done(0.0, 0.0)
    assert len(scheduler._queues[STEP]._given) <= MAX_IDLE_PEERS + 1


@pytest.mark.parametrize("kind", [Priority.INFERENCE, Priority.BATCH])
def test_a_peer_with_a_larger_share_gets_more_while_others_wait(kind: Priority) -> None:
    """Every other choice goes to whoever has waited longest beyond the patience: the others get something, too."""
    jobs = [Job(kind, peer, pieces=1000) for peer in "ab"]
    simulate(jobs, until=PATIENCE, shares={"a": 3.0})
    given = [len(job.runs) for job in jobs]
    assert given[0] == pytest.approx(3 * given[1], rel=0.15)
    jobs = [Job(kind, peer, pieces=1000) for peer in "ab"]
    simulate(jobs, until=20 * PATIENCE, shares={"a": 1000.0})
    assert len(jobs[1].runs) >= 1


def test_a_share_is_of_no_use_alone() -> None:
    jobs = [Job(Priority.BATCH, "a", pieces=10)]
    simulate(jobs, shares={"a": 0.01})
    assert len(jobs[0].runs) == 10


def test_a_peers_passes_run_one_after_the_other() -> None:
    """Each keeps tensors for its gradients from its first piece to its last. Prompts keep nothing, and take turns."""
    jobs = [Job(BATCH, "a", pieces=30) for _ in range(4)] + [Job(BATCH, "b", pieces=30) for _ in range(2)]
    prompts = [Job(INFERENCE, "c", pieces=30) for _ in range(2)]
    for kind in (jobs, prompts):
        simulate(kind, cost=lambda _batch: 2 * PATIENCE)
        assert all(len(job.runs) == 30 for job in kind)
    for one, other in ((0, 1), (1, 2), (2, 3), (4, 5)):
        assert jobs[one].runs[-1] < jobs[other].runs[0]
    assert jobs[4].runs[0][0] < jobs[0].runs[-1][0]  # that of another peer does not wait for them
    assert prompts[1].runs[0] < prompts[0].runs[-1]
