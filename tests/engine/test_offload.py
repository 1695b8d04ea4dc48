"""Idle sessions make room: they leave for the host's memory when others need it, and come back as they were."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN, Reference, close
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, Session
from kwaainet_bridge.engine.pages import OutOfPages, PageAllocator, PageTable
from kwaainet_bridge.errors import AllocationFailed, ConfigError, InvalidRequest

PAGE = defaults.PAGE_TOKENS
ALL = range(BLOCKS)
IDLE = 30.0
PAGES = 16


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    given = {"max_length": 256, "cache_tokens": PAGES * PAGE, "offload_idle_seconds": IDLE, **settings}
    engine = await Engine.load(EngineConfig(str(folder), **given))
    try:
        yield engine
    finally:
        await engine.aclose()


def out(*sessions: Session) -> list[bool]:
    return [session._holding._moved is not None for session in sessions]


def host_bytes(engine: Engine) -> int:
    """What is in the host's part."""
    offload = engine._room.offload
    assert offload is not None
    return defaults.OFFLOAD_MIB * defaults.MIB - offload.left


async def test_the_longest_idle_leaves_and_comes_back_as_it_was(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(3, 60, HIDDEN)
    expected = llama(hidden)
    async with loaded(llama_folder) as engine, AsyncExitStack() as stack:
        one = await stack.enter_async_context(engine.open_session(ALL, 2, 64, peer="a"))
        two = await stack.enter_async_context(engine.open_session(ALL, 1, 128, peer="b"))
        await one.step(hidden[:2, :30])
        await trio.sleep(1)
        await two.step(hidden[2:, :30])
        await trio.sleep(IDLE)
        async with engine.open_session(ALL, 1, 128, peer="c") as three:
            assert out(one, two) == [True, False]
            assert host_bytes(engine) == 2 * 2 * BLOCKS * engine._room.page_bytes
            assert one.position == 30
            await three.step(torch.randn(1, 100, HIDDEN))
            # there is no room for both, and two was idle for long enough by now
            close(await one.step(hidden[:2, 30:31]), expected[:2, 30:31])
            assert out(one, two) == [False, True]
            close(await two.step(hidden[2:, 30:31]), expected[2:, 30:31])
        close(await one.step(hidden[:2, 31:]), expected[:2, 31:])
        close(await two.step(hidden[2:, 31:]), expected[2:, 31:])
        assert host_bytes(engine) == 0
        offload = engine._room.offload
    assert engine.cache_bytes_left == engine.cache_bytes_total
    assert offload is not None
    assert not offload.holdings


async def test_nobody_leaves_while_there_is_room_or_before_its_time(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with loaded(llama_folder) as engine, engine.open_session(ALL, 1, 128) as one:
        await one.step(torch.randn(1, 20, HIDDEN))
        await trio.sleep(2 * IDLE)
        async with engine.open_session(ALL, 1, 128) as two:
            assert out(one) == [False]
            await two.step(torch.randn(1, 20, HIDDEN))
            await trio.sleep(0.5)
            await one.step(torch.randn(1, 1, HIDDEN))
            await trio.sleep(IDLE - 1)
            with pytest.raises(AllocationFailed, match="immediately"):
                async with engine.open_session(ALL, 1, 16):
                    pass
            await trio.sleep(1)
            async with engine.open_session(ALL, 1, 16):
                assert out(one, two) == [False, True]


async def test_the_host_s_part_has_an_end(llama_folder: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with loaded(llama_folder, offload_bytes=0) as engine, engine.open_session(ALL, 1, 256) as one:
        await one.step(torch.randn(1, 256, HIDDEN))
        await trio.sleep(IDLE)
        with pytest.raises(AllocationFailed):
            async with engine.open_session(ALL, 1, 16):
                pass
        assert out(one) == [False]
    each = 8 * BLOCKS * engine._room.page_bytes
    async with loaded(llama_folder, offload_bytes=each) as engine, AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(engine.open_session(ALL, 1, 128)) for _ in range(2)]
        for session in sessions:
            await session.step(torch.randn(1, 128, HIDDEN))
        await trio.sleep(IDLE)
        async with engine.open_session(ALL, 1, 128):
            assert sum(out(*sessions)) == 1
            with pytest.raises(AllocationFailed):
                async with engine.open_session(ALL, 1, 16):
                    pass


async def test_a_session_that_cannot_come_back_is_as_it_was(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(1, 100, HIDDEN)
    async with loaded(llama_folder) as engine, engine.open_session(ALL, 1, 256) as one:
        await one.step(hidden[:, :99])
        await trio.sleep(IDLE)
        async with engine.open_session(ALL, 1, 256) as two:
            await two.step(torch.randn(1, 250, HIDDEN))
            assert out(one) == [True]
            with pytest.raises(
                AllocationFailed, match=r"within 20 s: out of memory. The session is at token 99"
            ):
                await one.step(hidden[:, 99:])
            assert (out(one), one.position) == ([True], 99)
            with trio.move_on_after(1) as scope:
                await one.step(hidden[:, 99:])
            assert scope.cancelled_caught
            with pytest.raises(InvalidRequest):
                await one.step(hidden[:, 99:], start_from_position=100)
        close(await one.step(hidden[:, 99:]), llama(hidden)[:, 99:])
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_growing_sessions_make_idle_ones_leave(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(1, 250, HIDDEN)
    async with (
        loaded(llama_folder) as engine,
        engine.open_session(ALL, 1, 256) as one,
        engine.open_session(range(2, 4), 1, 256) as two,
        engine.open_session(range(1), 1, 16) as apart,
    ):
        for session in (two, apart):
            await session.step(torch.randn(1, 16, HIDDEN))
        await trio.sleep(IDLE)
        close(await one.step(hidden), llama(hidden))
        assert out(two, apart) == [True, True]


async def test_a_session_closes_while_it_is_away_or_on_its_way(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with loaded(llama_folder) as engine:
        async with engine.open_session(ALL, 1, 256) as one:
            await one.step(torch.randn(1, 256, HIDDEN))
            await trio.sleep(IDLE)
            async with engine.open_session(ALL, 1, 16):
                assert out(one) == [True]
        assert host_bytes(engine) == 0

        async def begin() -> None:
            async with engine.open_session(ALL, 1, 16):
                pass

        async with trio.open_nursery() as nursery, engine.open_session(ALL, 1, 256) as one:
            await one.step(torch.randn(1, 256, HIDDEN))
            await trio.sleep(IDLE)
            nursery.start_soon(begin)
            while one._holding._moving is None:
                await trio.lowlevel.checkpoint()
        assert host_bytes(engine) == 0
    assert engine.cache_bytes_left == engine.cache_bytes_total
    assert engine._room.allocator.free(0) == PAGES


async def test_a_step_that_comes_on_the_way_out_waits(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(1, 121, HIDDEN)

    async def begin() -> None:
        async with engine.open_session(ALL, 1, 16):
            pass

    async with (
        loaded(llama_folder) as engine,
        engine.open_session(ALL, 1, 128) as one,
        engine.open_session(ALL, 1, 128) as two,
    ):
        await one.step(hidden[:, :120])
        await trio.sleep(IDLE)
        await two.step(hidden[:, :1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            while one._holding._moving is None:
                await trio.lowlevel.checkpoint()
            close(await one.step(hidden[:, 120:]), llama(hidden)[:, 120:])
        assert out(one, two) == [False, False]


async def test_one_that_has_not_stepped_yet_gives_its_promise(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(1, 20, HIDDEN)
    async with loaded(llama_folder) as engine, engine.open_session(ALL, 1, 128) as one:
        await trio.sleep(IDLE)
        async with engine.open_session(ALL, 1, 256) as two:
            await two.step(torch.randn(1, 240, HIDDEN))
            assert (out(one), host_bytes(engine)) == ([True], 0)
        close(await one.step(hidden), llama(hidden))


async def test_common_beginnings_trees_and_adapters_go_and_come(
    llama_folder: Path, llama: Reference, autojump_clock: trio.testing.MockClock
) -> None:
    """Pages that others have stay with them; candidates wait for what is accepted of them."""
    hidden = torch.randn(1, 60, HIDDEN)
    async with (
        loaded(llama_folder) as engine,
        engine.open_session(ALL, 1, 64, peer="a") as one,
        engine.open_session(ALL, 1, 64, peer="a") as two,
    ):
        await one.step(hidden[:, :40])
        await two.step(hidden[:, :40])
        await one.step(hidden[:, 40:43], tree=[-1, -1, 1])
        await trio.sleep(IDLE)
        async with engine.open_session(ALL, 1, 256, peer="b") as three:
            await three.step(torch.randn(1, 256, HIDDEN))
            assert out(one, two) == [True, True]
        output = await one.step(hidden[:, 43:45], accept=[1, 2])
        close(output, llama(hidden[:, [*range(40), 41, 42, 43, 44]])[:, -2:])
        close(await two.step(hidden[:, 40:]), llama(hidden)[:, 40:])
    assert engine.cache_bytes_left == engine.cache_bytes_total


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="offload_idle_seconds does not go with tensor_parallel"):
        EngineConfig("model", tensor_parallel=2, offload_idle_seconds=5.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_take_the_same_form_on_other_pages(data: st.DataObject) -> None:
    allocator = PageAllocator(30, 2)
    table = PageTable(allocator, range(2), 3, 40, page_tokens=4)
    for _ in range(data.draw(st.integers(0, 4))):
        order = [data.draw(st.integers(0, 2)) for _ in range(3)]
        start = data.draw(st.integers(0, table.length))
        table.prepare(data.draw(st.integers(start, min(40, start + 9))), start=start, order=order)
    before, owners = [list(row) for row in table.rows], sorted(allocator._owners.values())
    pages, rows = table.vacate()
    assert allocator.free(0) == 30
    assert (table.held, not allocator._owners) == (0, True)
    assert [[pages[number] for number in row] for row in rows] == before
    beside = PageTable(allocator, range(2), 1, 40, page_tokens=4)
    beside.prepare(data.draw(st.integers(0, 40)), start=0)
    if len(pages) > allocator.common(range(2)):
        with pytest.raises(OutOfPages):
            table.occupy(len(pages), rows)
    else:
        new = table.occupy(len(pages), rows)
        assert [[new.index(page) for page in row] for row in table.rows] == rows
        assert not set(new) & set(beside.rows[0])
    beside.close()
    if table.held:
        assert sorted(allocator._owners.values()) == owners
    table.close()
    assert allocator.free(0) == 30
    assert not allocator._owners
