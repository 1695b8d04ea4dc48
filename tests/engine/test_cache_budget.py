"""Admission of sessions by bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.budget import CacheBudget
from kwaainet_bridge.errors import AllocationFailed


async def hold(
    budget: CacheBudget, num_bytes: int, timeout: float, log: list[Any], release: trio.Event
) -> None:
    try:
        async with budget.reserve(num_bytes, timeout=timeout):
            log.append(num_bytes)
            await release.wait()
    except AllocationFailed as error:
        log.append(str(error))


async def test_bytes_are_counted_and_returned() -> None:
    budget = CacheBudget(100)
    async with budget.reserve(60, timeout=0), budget.reserve(40, timeout=0):
        assert budget.left == 0
        with pytest.raises(AllocationFailed) as refused:
            async with budget.reserve(1, timeout=0):
                raise AssertionError
        assert str(refused.value) == "Could not allocate 1 bytes immediately: out of memory"
    assert budget.left == 100
    with pytest.raises(RuntimeError, match="of the caller"):
        async with budget.reserve(60, timeout=0):
            raise RuntimeError("of the caller")
    assert budget.left == 100


async def test_what_never_fits_fails_at_once() -> None:
    with pytest.raises(AllocationFailed, match=r"^Could not allocate 101 bytes immediately: out of memory$"):
        async with CacheBudget(100).reserve(101, timeout=60):
            raise AssertionError


async def test_first_come_first_served(autojump_clock: trio.testing.MockClock) -> None:
    """Of those who wait, a small one does not overtake a big one. Who does not wait takes what is free."""
    budget, log, release = CacheBudget(100), [], trio.Event()
    async with trio.open_nursery() as nursery:
        first = trio.Event()
        for num_bytes, event in [(80, first), (90, release), (10, release)]:
            nursery.start_soon(hold, budget, num_bytes, 60, log, event)
            await trio.testing.wait_all_tasks_blocked()
        assert log == [80]
        async with budget.reserve(20, timeout=0):
            with pytest.raises(AllocationFailed, match="immediately"):
                async with budget.reserve(5, timeout=0):
                    raise AssertionError
        assert log == [80]
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert set(log) == {80, 90, 10}
        release.set()
    assert budget.left == 100


async def test_waiting_ends(autojump_clock: trio.testing.MockClock) -> None:
    """After its time, the next in the queue gets its chance."""
    budget, log, release = CacheBudget(100), [], trio.Event()
    async with trio.open_nursery() as nursery:
        for num_bytes, timeout in [(80, 0), (90, 3), (20, 60)]:
            nursery.start_soon(hold, budget, num_bytes, timeout, log, release)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(2.9)
        assert log == [80]
        await trio.sleep(0.2)
        assert log[0] == 80
        assert set(log[1:]) == {20, "Could not allocate 90 bytes within 3 s: out of memory"}
        release.set()
    assert budget.left == 100


async def test_cancelled_in_the_queue_others_move_up() -> None:
    budget, log, release = CacheBudget(100), [], trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, budget, 80, 0, log, release)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as impatient:
            impatient.start_soon(hold, budget, 90, 60, log, release)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(hold, budget, 20, 60, log, release)
            await trio.testing.wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert log == [80, 20]
        release.set()
    assert budget.left == 100


async def test_cancelled_in_the_moment_of_being_granted() -> None:
    budget, log, release = CacheBudget(100), [], trio.Event()
    async with trio.open_nursery() as nursery:
        async with budget.reserve(100, timeout=0):
            nursery.start_soon(hold, budget, 70, 60, log, release)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert budget.left == 100


async def test_sessions_cost_what_their_cache_takes(engine: Engine) -> None:
    # keys and values, 2 kv heads, head size 16, float32
    assert engine.cache_bytes_per_token == 2 * 2 * 16 * 4
    assert engine.cache_bytes_total == defaults.CACHE_TOKENS * BLOCKS * engine.cache_bytes_per_token
    async with engine.open_session(range(1, 4), 2, 100):
        assert (
            engine.cache_bytes_total - engine.cache_bytes_left == 3 * 2 * 100 * engine.cache_bytes_per_token
        )
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_small_cache_under_many_opens_and_cancellations(llama_folder: Any) -> None:
    per_session = BLOCKS * 16 * 256
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=3 * 16))
    served = []

    async def use(index: int) -> None:
        with trio.CancelScope() as scope:
            async with engine.open_session(range(BLOCKS), 1, 16, timeout=30) as session:
                assert 0 <= engine.cache_bytes_left <= 2 * per_session
                await session.step(torch.zeros(1, 4, HIDDEN))
                if index % 3 == 0:
                    scope.cancel()
                await session.step(torch.zeros(1, 1, HIDDEN))
                served.append(index)

    async with trio.open_nursery() as nursery:
        for index in range(12):
            nursery.start_soon(use, index)
    assert sorted(served) == [index for index in range(12) if index % 3]
    assert engine.cache_bytes_left == engine.cache_bytes_total == 3 * per_session
    with pytest.raises(AllocationFailed):
        async with engine.open_session(range(BLOCKS), 1, 49):
            raise AssertionError
    await engine.aclose()
