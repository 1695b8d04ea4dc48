"""What sessions and blocks look like from outside: counts of what they hold, at any moment of their lives."""

from __future__ import annotations

from pathlib import Path

import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, SessionSnapshot

PAGE = defaults.PAGE_TOKENS
ALL = range(BLOCKS)


def hidden(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN)


async def load(folder: Path, **settings) -> Engine:
    given = {"max_length": 256, "cache_tokens": 16 * PAGE, **settings}
    return await Engine.load(EngineConfig(str(folder), **given))


async def test_a_session_tells_what_it_holds(llama_folder: Path) -> None:
    engine = await load(llama_folder, share_prefixes="off")
    async with engine.open_session(range(1, 3), 2, 100) as session:
        assert session.snapshot() == SessionSnapshot(
            blocks=range(1, 3),
            batch_size=2,
            max_length=100,
            position=0,
            cache_tokens=0,
            promised_tokens=2 * 112,
            moved_out=False,
            adapter=None,
        )
        await session.step(hidden(2, PAGE + 1))
        seen = session.snapshot()
        assert (seen.position, seen.cache_tokens) == (PAGE + 1, 4 * PAGE)
        await session.step(hidden(2, 1), hypo_ids=torch.tensor([0, 0]))  # rows share what is before
        seen = session.snapshot()
        assert (seen.position, seen.cache_tokens) == (PAGE + 2, 3 * PAGE)
        await session.step(hidden(2, 1), start_from_position=3)
        seen = session.snapshot()
        assert (seen.position, seen.cache_tokens) == (4, 2 * PAGE)
        assert seen.promised_tokens == 2 * 112
    closed = session.snapshot()
    assert (closed.cache_tokens, closed.moved_out) == (0, False)
    await engine.aclose()


async def test_pages_that_sessions_share_count_for_each(llama_folder: Path) -> None:
    engine = await load(llama_folder)
    prompt = hidden(1, 3 * PAGE)
    async with (
        engine.open_session(ALL, 1, 64, peer="a") as one,
        engine.open_session(ALL, 1, 64, peer="a") as two,
    ):
        await one.step(prompt)
        await two.step(prompt)
        for session in (one, two):
            assert session.snapshot().cache_tokens == 3 * PAGE
    await engine.aclose()


async def test_one_that_was_moved_out_holds_its_tokens_on_the_host(
    llama_folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    engine = await load(llama_folder, offload_idle_seconds=30.0)
    async with engine.open_session(ALL, 1, 256, peer="a") as one:
        await one.step(hidden(1, 200))
        await trio.sleep(31)
        async with engine.open_session(ALL, 1, 64, peer="b"):
            seen = one.snapshot()
            assert (seen.moved_out, seen.position) == (True, 200)
            assert (seen.cache_tokens, seen.promised_tokens) == (13 * PAGE, 0)
        await one.step(hidden(1, 1))
        seen = one.snapshot()
        assert (seen.moved_out, seen.cache_tokens) == (False, 13 * PAGE)
    await engine.aclose()


async def test_each_block_tells_its_bytes(llama_folder: Path) -> None:
    engine = await load(llama_folder, blocks=range(2, 5))
    assert list(engine.block_bytes) == [2, 3, 4]
    assert len(set(engine.block_bytes.values())) == 1
    assert sum(engine.block_bytes.values()) == engine.weights_bytes > 0
    assert engine.tensor_parallel == 1
    await engine.aclose()
