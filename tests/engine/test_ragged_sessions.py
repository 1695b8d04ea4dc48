"""Sessions that step together: lengths, spans, prompts and histories of all kinds in one ragged batch."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
import torch
import trio
from engine_support import BLOCKS, HIDDEN, Reference, at_once, close
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, Session
from kwaainet_bridge.engine.step import Step
from kwaainet_bridge.errors import EngineError

ALL = range(BLOCKS)


def noted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[Step]]:
    """Which steps run together from now on."""
    batches: list[list[Step]] = []
    run = engine._compute.merged
    assert run is not None

    def note(steps: list[Step]) -> Any:
        batches.append(list(steps))
        return run(steps)

    monkeypatch.setattr(engine._compute, "merged", note)
    return batches


async def test_sessions_of_all_lengths_run_as_one_batch(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [torch.randn(rows, 60, HIDDEN) for rows in (1, 1, 3, 2)]
    expected = [llama(each) for each in inputs]
    before = (1, 17, 40, 5)
    batches = noted(engine, monkeypatch)
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(engine.open_session(ALL, each.shape[0], 60)) for each in inputs
        ]
        for session, each, count in zip(sessions, inputs, before, strict=True):
            await session.step(each[:, :count])
        batches.clear()
        for step, count in enumerate((1, 1, 4, 1)):
            start = [b + (0, 1, 2, 6)[step] for b in before]
            outputs = await at_once(
                engine,
                *(
                    partial(session.step, each[:, s : s + count])
                    for session, each, s in zip(sessions, inputs, start, strict=True)
                ),
            )
            for output, whole, s in zip(outputs, expected, start, strict=True):
                close(output, whole[:, s : s + count])
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]


async def test_spans_that_overlap_run_together_where_they_do(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = noted(engine, monkeypatch)
    hidden = torch.randn(2, 9, HIDDEN)
    prompts = torch.randn(BLOCKS - 2, 1, 3, HIDDEN)
    async with (
        engine.open_session(range(2), 2, 9) as front,
        engine.open_session(range(2, BLOCKS), 2, 9) as back,
        engine.open_session(range(1, 4), 1, 9) as middle,
        engine.open_session(ALL, 2, 9) as whole,
    ):
        of_front, of_middle, of_whole, of_back = await at_once(
            engine,
            partial(front.step, hidden),
            partial(middle.step, hidden[:1]),
            partial(whole.step, hidden),
            partial(back.step, hidden, prompts),
        )
    assert [len(batch) for batch in batches] == [4]
    close(of_front, await engine.forward(hidden, range(2)))
    close(of_middle, await engine.forward(hidden[:1], range(1, 4)))
    close(of_whole, llama(hidden))
    close(of_back, await engine.forward(hidden, range(2, BLOCKS), prompts))


async def test_one_that_cannot_be_computed_does_not_hurt_the_others(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(2, 5, HIDDEN)
    run = engine._span.run

    def fail_for_large(block: int, state: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if state.abs().max() > 1e6:
            raise RuntimeError("too large")
        return run(block, state, **kwargs)

    monkeypatch.setattr(engine._span, "run", fail_for_large)
    async with engine.open_session(ALL, 2, 9) as good, engine.open_session(ALL, 2, 9) as bad:

        async def refused() -> str:
            with pytest.raises(EngineError) as caught:
                await bad.step(hidden * 1e9)
            return str(caught.value)

        output, text = await at_once(engine, partial(good.step, hidden), refused)
    close(output, llama(hidden))
    assert text == "RuntimeError: too large"


async def test_a_long_prompt_lets_steps_through(
    engine: Engine, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece at most between two steps of a session that decodes."""
    run, order = engine._span.run, []

    def note(block: int, state: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        order.append("prompt" if state.shape[1] > 1 else "step")
        return run(block, state, **kwargs)

    monkeypatch.setattr(engine._span, "run", note)
    long, short = torch.randn(1, 250, HIDDEN), torch.randn(1, 12, HIDDEN)
    async with engine.open_session(ALL, 1, 250) as prompt, engine.open_session(ALL, 1, 12) as decoding:
        await decoding.step(short[:, :1])
        outputs = []

        async def decode() -> None:
            for index in range(1, 12):
                outputs.append(await decoding.step(short[:, index : index + 1]))  # noqa: PERF401

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decode)
            result = await prompt.step(long)
    close(torch.cat(outputs, 1), llama(short)[:, 1:])
    close(result, llama(long))
    steps = "".join("s" if what == "step" else "P" for what in order).strip("P").replace("s" * BLOCKS, "s")
    assert "sPPPPPPPPPPPP" not in steps  # two pieces of six blocks each


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_history_is_the_whole_models(
    data: st.DataObject, llama: Reference, one_engine_folder: str
) -> None:
    """Rows that are shuffled, copied and cut back, in sessions that take turns, and a cache that is nearly full."""

    async def main() -> None:
        engine = await Engine.load(EngineConfig(one_engine_folder, cache_tokens=30 * defaults.PAGE_TOKENS))
        async with AsyncExitStack() as stack:
            sessions: list[tuple[Session, torch.Tensor]] = []
            for _ in range(data.draw(st.integers(1, 3))):
                rows = data.draw(st.integers(1, 3))
                session = await stack.enter_async_context(engine.open_session(ALL, rows, 48))
                sessions.append((session, torch.empty(rows, 0, HIDDEN)))
            for number in range(data.draw(st.integers(1, 8))):
                index = data.draw(st.integers(0, len(sessions) - 1))
                session, history = sessions[index]
                start = max(0, session.position - data.draw(st.sampled_from([0, 0, 1, 5, 40])))
                count = data.draw(st.integers(1, max(1, min(20, 48 - start)))) if start < 48 else 0
                order = [data.draw(st.integers(0, len(history) - 1)) for _ in history]
                if not count:
                    continue
                new = torch.randn(
                    len(history), count, HIDDEN, generator=torch.Generator().manual_seed(number)
                )
                output = await session.step(new, None, torch.tensor(order), start)
                history = torch.cat([history[order][:, :start], new], 1)
                sessions[index] = session, history
                close(output, llama(history)[:, start:])
        assert engine.cache_bytes_left == engine.cache_bytes_total
        assert engine._room.allocator.common(ALL) == engine._room.budget.pages
        await engine.aclose()

    trio.run(main)


@pytest.fixture(scope="session")
def one_engine_folder(llama_folder: Any) -> str:
    return str(llama_folder)
