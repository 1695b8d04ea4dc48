"""What the engine counts of common beginnings and of sessions that make room, against what was done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, OffloadUse, PrefixUse
from kwaainet_bridge.engine.offload import Moved
from kwaainet_bridge.errors import AllocationFailed

PAGE = defaults.PAGE_TOKENS
ALL = range(BLOCKS)
IDLE = 30.0


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(folder), **{"max_length": 256, **settings}))
    try:
        yield engine
    finally:
        await engine.aclose()


async def prefill(engine: Engine, hidden: torch.Tensor, peer: str = "a") -> None:
    async with engine.open_session(ALL, hidden.shape[0], 128, peer=peer) as session:
        await session.step(hidden)


async def test_beginnings_are_found_or_computed(llama_folder: Path) -> None:
    hidden = torch.randn(1, 3 * PAGE + 5, HIDDEN)
    async with loaded(llama_folder) as engine:
        assert engine.prefix_use == PrefixUse(0, 0, 0)
        await prefill(engine, hidden)
        page = BLOCKS * engine._room.page_bytes + PAGE * HIDDEN * 4
        assert engine.prefix_use == PrefixUse(0, 3 * PAGE, 3 * page)
        await prefill(engine, hidden)
        assert engine.prefix_use == PrefixUse(3 * PAGE, 3 * PAGE, 3 * page)
        await prefill(engine, hidden, peer="b")  # who shares with nobody
        assert engine.prefix_use == PrefixUse(3 * PAGE, 6 * PAGE, 6 * page)
        parted = torch.cat([hidden[:, : 2 * PAGE], torch.randn(1, PAGE + 1, HIDDEN)], 1)
        await prefill(engine, parted)
        assert engine.prefix_use == PrefixUse(5 * PAGE, 7 * PAGE, 7 * page)
        await prefill(engine, torch.randn(1, PAGE - 1, HIDDEN))  # no whole page
        await prefill(engine, torch.randn(2, 3 * PAGE, HIDDEN))  # of two sequences, which share nothing
        assert engine.prefix_use == PrefixUse(5 * PAGE, 7 * PAGE, 7 * page)


async def test_a_step_without_room_has_found_nothing(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hidden = torch.randn(1, 12 * PAGE, HIDDEN)
    async with loaded(llama_folder, cache_tokens=32 * PAGE) as engine:
        await prefill(engine, hidden[:, : 2 * PAGE])
        before = engine.prefix_use
        assert before is not None
        async with (
            engine.open_session(ALL, 2, 11 * PAGE, peer="b") as other,  # of two sequences: it keeps nothing
            engine.open_session(ALL, 1, 12 * PAGE, peer="a") as session,
        ):
            await other.step(torch.randn(2, 11 * PAGE, HIDDEN))
            # two pages are found, which leaves none, and ten are needed where eight are promised
            with pytest.raises(AllocationFailed, match="within"):
                await session.step(hidden)
            assert engine.prefix_use == before
            await session.step(hidden[:, : 3 * PAGE])
            after = engine.prefix_use
            assert after is not None
            assert after.found - before.found == 2 * PAGE
            assert after.computed - before.computed == PAGE


async def test_off_there_is_nothing_to_count(llama_folder: Path) -> None:
    async with loaded(llama_folder, share_prefixes="off") as engine:
        await prefill(engine, torch.randn(1, 40, HIDDEN))
        assert engine.prefix_use is None
        assert engine.offload_use is None


async def test_sessions_that_leave_come_back_or_close(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with loaded(llama_folder, cache_tokens=16 * PAGE, offload_idle_seconds=IDLE) as engine:
        nothing = OffloadUse(0, 0, 0, Moved(), Moved())
        assert engine.offload_use == nothing
        page = BLOCKS * engine._room.page_bytes
        async with engine.open_session(ALL, 2, 64, peer="a") as one:
            await one.step(torch.randn(2, 30, HIDDEN))
            async with engine.open_session(ALL, 1, 128, peer="b") as two:
                await two.step(torch.randn(1, 20, HIDDEN))
                assert engine.offload_use == nothing
                await trio.sleep(IDLE)
                async with engine.open_session(ALL, 1, 256, peer="c") as three:
                    await three.step(torch.randn(1, 250, HIDDEN))
                    # both left: two sequences of two pages, and one of two
                    out = Moved(2, 6 * page)
                    assert engine.offload_use == OffloadUse(2, 60 + 20, 6 * page, out, Moved())
                await one.step(torch.randn(2, 1, HIDDEN))
                assert engine.offload_use == OffloadUse(1, 20, 2 * page, out, Moved(1, 4 * page))
            # two was closed where it was
            assert engine.offload_use == OffloadUse(0, 0, 0, out, Moved(1, 4 * page))
        assert engine._room.offload is not None
        assert engine._room.offload.left == defaults.OFFLOAD_MIB * defaults.MIB
