"""Admission of sessions by pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.budget import PageBudget
from kwaainet_bridge.errors import AllocationFailed

ONE = range(1)
PAGE = defaults.PAGE_TOKENS


@asynccontextmanager
async def reserve(
    budget: PageBudget, pages: int, timeout: float, *, growing: bool = False, blocks: range = ONE
) -> AsyncIterator[None]:
    await budget.take(
        blocks, pages, timeout=timeout, refusal=lambda when: f"no {pages} {when}", growing=growing
    )
    try:
        yield
    finally:
        budget.give_back(blocks, pages)


async def hold(
    budget: PageBudget,
    pages: int,
    timeout: float,
    log: list[Any],
    release: trio.Event,
    *,
    growing: bool = False,
) -> None:
    try:
        async with reserve(budget, pages, timeout, growing=growing):
            log.append(pages)
            await release.wait()
    except AllocationFailed as error:
        log.append(str(error))


async def test_pages_are_counted_and_returned() -> None:
    budget = PageBudget(100, 1)
    async with reserve(budget, 60, 0), reserve(budget, 40, 0):
        assert budget.left == 0
        with pytest.raises(AllocationFailed) as refused:
            async with reserve(budget, 1, 0):
                raise AssertionError
        assert str(refused.value) == "no 1 immediately"
    assert budget.left == 100


async def test_each_block_has_its_own() -> None:
    budget = PageBudget(100, 4)
    async with reserve(budget, 80, 0, blocks=range(2)), reserve(budget, 100, 0, blocks=range(2, 4)):
        assert budget.left == 2 * 20
        with pytest.raises(AllocationFailed):
            async with reserve(budget, 1, 0, blocks=range(1, 3)):
                raise AssertionError
        assert budget.take_now(range(2), 20)
        assert not budget.take_now(range(1), 1)
        budget.give_back(range(2), 20)
    assert budget.left == 400


async def test_what_never_fits_fails_at_once() -> None:
    with pytest.raises(AllocationFailed, match=r"^no 101 immediately$"):
        async with reserve(PageBudget(100, 1), 101, 60):
            raise AssertionError


async def test_first_come_first_served(autojump_clock: trio.testing.MockClock) -> None:
    """Of those who wait, a small one does not overtake a big one. Who does not wait takes what is free."""
    budget, log, release = PageBudget(100, 1), [], trio.Event()
    async with trio.open_nursery() as nursery:
        first = trio.Event()
        for pages, event in [(80, first), (90, release), (10, release)]:
            nursery.start_soon(hold, budget, pages, 60, log, event)
            await trio.testing.wait_all_tasks_blocked()
        assert log == [80]
        async with reserve(budget, 20, 0):
            with pytest.raises(AllocationFailed, match="immediately"):
                async with reserve(budget, 5, 0):
                    raise AssertionError
        assert log == [80]
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert set(log) == {80, 90, 10}
        release.set()
    assert budget.left == 100


async def test_what_lives_and_grows_goes_before_what_begins(autojump_clock: trio.testing.MockClock) -> None:
    budget, log, release = PageBudget(100, 1), [], trio.Event()
    async with trio.open_nursery() as nursery:
        first = trio.Event()
        for pages, event, growing in [
            (90, first, False),
            (60, release, False),
            (50, release, True),
            (30, release, True),
        ]:
            nursery.start_soon(partial(hold, growing=growing), budget, pages, 60, log, event)
            await trio.testing.wait_all_tasks_blocked()
        assert budget.growing
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (log[0], set(log[1:])) == (90, {50, 30})
        assert not budget.growing
        release.set()
    assert budget.left == 100
    assert 60 in log


async def test_waiting_ends(autojump_clock: trio.testing.MockClock) -> None:
    """After its time, the next in the queue gets its chance."""
    budget, log, release = PageBudget(100, 1), [], trio.Event()
    async with trio.open_nursery() as nursery:
        for pages, timeout in [(80, 0), (90, 3), (20, 60)]:
            nursery.start_soon(hold, budget, pages, timeout, log, release)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(2.9)
        assert log == [80]
        await trio.sleep(0.2)
        assert log[0] == 80
        assert set(log[1:]) == {20, "no 90 within 3 s"}
        release.set()
    assert budget.left == 100


async def test_cancelled_in_the_queue_others_move_up() -> None:
    budget, log, release = PageBudget(100, 1), [], trio.Event()
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
    budget, log, release = PageBudget(100, 1), [], trio.Event()
    async with trio.open_nursery() as nursery:
        async with reserve(budget, 100, 0):
            nursery.start_soon(hold, budget, 70, 60, log, release)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert budget.left == 100


def promised(engine: Engine, blocks: int = BLOCKS) -> float:
    """Pages that are promised in each of so many blocks."""
    taken = engine.cache_bytes_total - engine.cache_bytes_left
    return taken / (blocks * PAGE * engine.cache_bytes_per_token)


async def test_sessions_cost_what_their_cache_takes(engine: Engine) -> None:
    # keys and values, 2 kv heads, head size 16, float32
    assert engine.cache_bytes_per_token == 2 * 2 * 16 * 4
    assert engine.cache_bytes_total == defaults.CACHE_TOKENS * BLOCKS * engine.cache_bytes_per_token
    async with engine.open_session(range(1, 4), 2, 100):
        assert promised(engine, 3) == 2 * 7  # 100 tokens begin seven pages
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_long_session_costs_what_it_uses(engine: Engine) -> None:
    """And what it is promised beyond that; going back gives nothing away that was promised."""
    first, ahead = defaults.CACHE_PROMISE_TOKENS // PAGE, defaults.CACHE_AHEAD_TOKENS // PAGE
    async with engine.open_session(range(BLOCKS), 1, 256) as session:
        assert promised(engine) == first
        await session.step(torch.zeros(1, 128, HIDDEN))
        assert promised(engine) == first
        await session.step(torch.zeros(1, 1, HIDDEN))
        assert promised(engine) == 128 // PAGE + 1 + ahead
        await session.step(torch.zeros(1, 127, HIDDEN))
        assert promised(engine) == 256 // PAGE
        assert engine._room.allocator.free(0) == engine._room.budget.pages - 256 // PAGE
        await session.step(torch.zeros(1, 1, HIDDEN), start_from_position=16)
        assert engine._room.allocator.free(0) == engine._room.budget.pages - 2
    assert engine.cache_bytes_left == engine.cache_bytes_total
    assert engine._room.allocator.free(0) == engine._room.budget.pages


async def test_a_session_that_outgrows_the_cache_waits_and_is_refused(
    llama_folder: Any, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own state stays: once others have ended it goes on."""
    monkeypatch.setattr(defaults, "CACHE_PROMISE_TOKENS", PAGE)
    monkeypatch.setattr(defaults, "CACHE_AHEAD_TOKENS", PAGE)
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=4 * PAGE))
    all_of_it = 4 * PAGE
    tokens = torch.randn(1, all_of_it, HIDDEN)
    async with engine.open_session(range(BLOCKS), 1, all_of_it, peer="12D3KooWsomeone") as session:
        first = await session.step(tokens[:, : 2 * PAGE])
        async with engine.open_session(range(BLOCKS), 1, all_of_it) as other:
            await other.step(tokens[:, :PAGE])
            began = trio.current_time()
            with pytest.raises(AllocationFailed) as refused:
                await session.step(tokens[:, 2 * PAGE :])
            waited = trio.current_time() - began
            num_bytes = BLOCKS * PAGE * engine.cache_bytes_per_token
            assert str(refused.value) == (
                f"Could not allocate {num_bytes} bytes within 20 s: out of memory. The session of 12D3KooWsomeone is at "
                f"token 32 and needs room for 64: go on with another server, or later with a new session"
            )
            assert waited == pytest.approx(defaults.CACHE_GROWTH_SECONDS)
            assert session.position == 2 * PAGE
            async with trio.open_nursery() as nursery:
                outputs = []

                async def rest() -> None:
                    outputs.append(await session.step(tokens[:, 2 * PAGE :]))

                nursery.start_soon(rest)
                await trio.sleep(1)
                other.close()
        whole = await engine.forward(tokens, range(BLOCKS))
        assert torch.allclose(torch.cat([first, *outputs], 1), whole, atol=1e-4)
    assert engine.cache_bytes_left == engine.cache_bytes_total
    await engine.aclose()


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


async def test_who_needs_little_passes_one_for_whom_there_is_no_room_yet(
    autojump_clock: trio.testing.MockClock,
) -> None:
    budget, log, release = PageBudget(100, 1), [], trio.Event()
    async with trio.open_nursery() as nursery:
        for pages, timeout, growing in [(80, 0, False), (40, 20, True), (10, 60, False), (30, 20, True)]:
            nursery.start_soon(partial(hold, growing=growing), budget, pages, timeout, log, release)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(5)
        async with reserve(budget, 20, 20, growing=True):
            assert trio.current_time() == 5
        assert log == [80]  # what begins waits for both
        budget.give_back(ONE, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert log == [80, 30]
        await trio.sleep(16)
        assert log == [80, 30, "no 40 within 20 s"]
        release.set()
    assert budget.take_now(ONE, 10)
    assert budget.left == 100
    assert log[-1] == 10


async def test_a_prompt_that_waits_for_room_keeps_no_session_from_its_next_token(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "CACHE_PROMISE_TOKENS", PAGE)
    monkeypatch.setattr(defaults, "CACHE_AHEAD_TOKENS", 0)
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=16 * PAGE))
    everything = range(BLOCKS)
    async with (
        aclosing(engine),
        engine.open_session(everything, 1, 16 * PAGE, peer="a") as large,
        engine.open_session(everything, 1, 8 * PAGE, peer="b") as session,
        trio.open_nursery() as nursery,
    ):
        await session.step(torch.randn(1, PAGE, HIDDEN))
        nursery.start_soon(large.step, torch.randn(1, 16 * PAGE, HIDDEN))
        await trio.testing.wait_all_tasks_blocked()
        assert engine._room.budget.growing
        with trio.fail_after(defaults.CACHE_GROWTH_SECONDS / 2):
            for _ in range(2 * PAGE):
                await session.step(torch.randn(1, 1, HIDDEN))
        assert engine._room.budget.growing
        nursery.cancel_scope.cancel()


async def test_memory_is_taken_once_however_often_pages_are_used(llama_folder: Path) -> None:
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=16 * PAGE, share_prefixes="off"))
    async with aclosing(engine):
        page = engine.cache_bytes_total // 16
        assert engine.cache_bytes_untaken == engine.cache_bytes_total
        for pages, taken in [(3, 3), (2, 3), (5, 5), (5, 5)]:
            async with engine.open_session(range(BLOCKS), 1, 8 * PAGE) as session:
                await session.step(torch.randn(1, pages * PAGE, HIDDEN))
            assert engine.cache_bytes_left == engine.cache_bytes_total
            assert engine.cache_bytes_untaken == (16 - taken) * page
