"""Inference sessions against the whole model."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
import trio
import trio.testing
from engine_support import BLOCKS, HIDDEN, Reference, close

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, Session
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.errors import EngineError, InvalidRequest

ALL = range(BLOCKS)


async def feed(session: Session, hidden: torch.Tensor, *sizes: int) -> torch.Tensor:
    outputs, start = [], 0
    for size in sizes:
        outputs.append(await session.step(hidden[:, start : start + size]))
        start += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1,) * 12, (4, 0, 1, 1, 6)])
async def test_steps_are_the_whole_models(
    engine: Engine, llama: Reference, hidden: torch.Tensor, sizes: tuple[int, ...]
) -> None:
    async with engine.open_session(ALL, 3, 20) as session:
        close(await feed(session, hidden, *sizes), llama(hidden))
        assert session.position == 12


@pytest.mark.parametrize("piece_tokens", [1, 9, 30])
async def test_long_steps_go_in_chunks(
    engine: Engine, llama: Reference, hidden: torch.Tensor, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MERGED_STEP_TOKENS", 0)
    monkeypatch.setattr(defaults, "PIECE_TOKENS", piece_tokens)
    prompts = torch.randn(BLOCKS, 1, 5, HIDDEN, generator=torch.Generator().manual_seed(4))
    async with engine.open_session(ALL, 3, 12) as session:
        first = await session.step(hidden[:, :8], prompts)
        second = await session.step(hidden[:, 8:])
    close(torch.cat([first, second], 1), llama(hidden, prompts))


async def test_a_session_on_a_part_of_the_blocks(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    async with (
        engine.open_session(range(2), 3, 12) as front,
        engine.open_session(range(2, BLOCKS), 3, 12) as back,
    ):
        outputs = [await back.step(await front.step(part)) for part in hidden.split(5, 1)]
    close(torch.cat(outputs, 1), llama(hidden))


async def test_going_back_overwrites(engine: Engine, llama: Reference, hidden: torch.Tensor) -> None:
    other = hidden.flip(1)
    mixed = torch.cat([hidden[:, :4], other[:, :8]], 1)
    async with engine.open_session(ALL, 3, 12) as session:
        await feed(session, hidden, 6, 1, 1)
        output = await session.step(other[:, :3], start_from_position=4)
        assert session.position == 7
        output = torch.cat([output, await session.step(other[:, 3:8])], 1)
        close(output, llama(mixed)[:, 4:])
        await session.step(hidden[:, :0], start_from_position=2)
        assert session.position == 2


async def test_rows_are_reordered_before_the_step(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    rows = torch.tensor([2, 0, 0])
    history = hidden[:, :6][rows]
    async with engine.open_session(ALL, 3, 12) as session:
        await feed(session, hidden, 5, 1)
        output = await session.step(hidden[:, 6:7], hypo_ids=rows)
        again = await session.step(hidden[:, 7:9], hypo_ids=torch.arange(3))
    expected = llama(torch.cat([history, hidden[:, 6:9]], 1))
    close(torch.cat([output, again], 1), expected[:, 6:])


async def test_prompts_count_on_every_step_that_carries_them(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    """At any position: to the first tokens of the step, not of the sequence."""
    prompts = torch.randn(1, 3, 2, HIDDEN)
    async with engine.open_session(range(1), 3, 12) as session:
        first = await session.step(hidden[:, :4])
        second = await session.step(hidden[:, 4:], prompts)
    changed = hidden.clone()
    changed[:, 4:6] += prompts[0]
    close(torch.cat([first, second], 1), await engine.forward(changed, range(1)))


async def test_a_step_without_tokens_computes_nothing(engine: Engine) -> None:
    async with engine.open_session(ALL, 2, 8) as session:
        output = await session.step(torch.empty(2, 0, HIDDEN, dtype=torch.bfloat16))
        assert output.shape == (2, 0, HIDDEN)
        assert output.dtype == torch.float32
        assert session.position == 0


async def test_a_step_that_does_not_fit_changes_nothing(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    async with engine.open_session(ALL, 3, 12) as session:
        first = await session.step(hidden[:, :8])
        with pytest.raises(InvalidRequest) as refused:
            await session.step(hidden[:, :5])
        assert (
            str(refused.value)
            == "Maximum length exceeded: prefix 8 + current 5 exceeds pre-allocated maximum 12"
        )
        for start in (9, -1, True, 2.0):
            with pytest.raises(InvalidRequest, match=r"start_from_position must be an integer in 0\.\.8"):
                await session.step(hidden[:, :1], start_from_position=start)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"^hypo ids must be int64$"):
            await session.step(hidden[:, :1], hypo_ids=torch.tensor([0.0, 1.0, 2.0]))
        with pytest.raises(InvalidRequest, match=r"hypo ids must lie in 0\.\.2, got 0\.\.3"):
            await session.step(hidden[:, :1], hypo_ids=torch.tensor([0, 3, 1]))
        with pytest.raises(InvalidRequest, match=r"hypo ids must be int64 \[3\], got int64 \[2\]"):
            await session.step(hidden[:, :1], hypo_ids=torch.tensor([0, 1]))
        with pytest.raises(
            InvalidRequest, match=r"must be floating-point \[3, tokens, 64\], got float32 \[2, 1, 64\]"
        ):
            await session.step(hidden[:2, :1])
        with pytest.raises(InvalidRequest, match="at most 1, 64"):
            await session.step(hidden[:, :1], torch.zeros(BLOCKS, 1, 4, HIDDEN))
        second = await session.step(hidden[:, 8:])
    close(torch.cat([first, second], 1), llama(hidden))


async def test_sessions_that_cannot_be(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as refused:
        async with engine.open_session(ALL, 1, 257):
            raise AssertionError
    assert str(refused.value) == "Cannot allocate KV cache for 257 tokens, max = 256"
    for blocks, batch, length in [(range(5, 8), 1, 8), (ALL, 0, 8), (ALL, 1, -1)]:
        with pytest.raises(InvalidRequest):
            async with engine.open_session(blocks, batch, length):
                raise AssertionError
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_cancelled_step_leaves_a_session_that_refuses_and_frees(
    engine: Engine, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MERGED_STEP_TOKENS", 0)
    async with engine.open_session(ALL, 3, 12) as session:
        run, blocks_run = engine._span.run, []
        scope = trio.CancelScope()

        def run_and_cancel(block: int, *args: object, **kwargs: object) -> torch.Tensor:
            blocks_run.append(block)
            trio.from_thread.run_sync(scope.cancel, trio_token=token)
            return run(block, *args, **kwargs)

        token = trio.lowlevel.current_trio_token()
        monkeypatch.setattr(engine._span, "run", run_and_cancel)
        with scope:
            await session.step(hidden[:, :4])
        assert scope.cancelled_caught
        assert blocks_run == [0]
        assert session.position == 0
        with pytest.raises(InvalidRequest, match="cancelled or failed"):
            await session.step(hidden[:, :1])
        assert engine.cache_bytes_left < engine.cache_bytes_total
    assert engine.cache_bytes_left == engine.cache_bytes_total


async def test_a_failed_step_does_not_hurt_other_sessions(
    engine: Engine, llama: Reference, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine.open_session(ALL, 3, 12) as session, engine.open_session(ALL, 3, 12) as other:
        with monkeypatch.context() as broken:

            def fail(*_args: object, **_kwargs: object) -> None:
                raise RuntimeError("no such kernel")

            broken.setattr(engine._span, "run", fail)
            with pytest.raises(EngineError, match="RuntimeError: no such kernel"):
                await session.step(hidden)
        with pytest.raises(InvalidRequest, match="cancelled or failed"):
            await session.step(hidden)
        close(await other.step(hidden), llama(hidden))


async def test_two_steps_at_once_are_refused(engine: Engine, hidden: torch.Tensor) -> None:
    release = threading.Event()
    async with engine.open_session(ALL, 3, 24) as session, trio.open_nursery() as nursery:
        nursery.start_soon(engine._compute.run, partial(release.wait, 10))  # keeps the first step waiting
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(session.step, hidden)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(InvalidRequest, match="is running"):
            await session.step(hidden)
        release.set()
    assert session.position == 12


async def test_a_left_session_is_closed(engine: Engine, hidden: torch.Tensor) -> None:
    async with engine.open_session(ALL, 3, 12) as session:
        pass
    with pytest.raises(InvalidRequest, match="closed"):
        await session.step(hidden)


async def test_many_sessions_do_not_mix(engine: Engine, llama: Reference) -> None:
    inputs = torch.randn(5, 1, 9, HIDDEN)

    async def converse(index: int) -> None:
        async with engine.open_session(ALL, 1, 9) as session:
            close(await feed(session, inputs[index], 4, 1, 1, 1, 2), llama(inputs[index]))

    async with trio.open_nursery() as nursery:
        for index in range(5):
            nursery.start_soon(converse, index)
    assert engine.cache_bytes_left == engine.cache_bytes_total


@pytest.mark.parametrize("backward", [False, True])
async def test_a_step_waits_for_one_block_of_a_batch_at_most(
    engine: Engine, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *, backward: bool
) -> None:
    run, order = engine._span.run, []
    entered, release = threading.Event(), threading.Event()

    def run_and_note(block: int, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        order.append((block, "cache" in kwargs))
        if len(order) == 2:
            entered.set()
            release.wait(10)
        return run(block, hidden, **kwargs)

    monkeypatch.setattr(engine._span, "run", run_and_note)
    monkeypatch.setattr(defaults, "BACKWARD_GRAPH_BYTES", 0)
    async with engine.open_session(ALL, 3, 12) as session, trio.open_nursery() as nursery:
        if backward:
            nursery.start_soon(engine.backward, hidden, hidden, ALL)
        else:
            nursery.start_soon(engine.forward, hidden, ALL)
        await trio.to_thread.run_sync(entered.wait)
        nursery.start_soon(session.step, hidden)
        await trio.testing.wait_all_tasks_blocked()
        release.set()
    assert order[:2] == [(0, False), (1, False)]
    assert order[2 : 2 + BLOCKS] == [(block, True) for block in ALL]
    assert len(order) == (3 if backward else 2) * BLOCKS


@pytest.mark.parametrize("piece_tokens", [8, 5])
async def test_a_step_of_many_sequences_goes_in_pieces(
    engine: Engine, llama: Reference, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it keeps others waiting no longer than a long prompt, and takes no more memory."""
    rows, pieces, run = 37, [], Span.run
    hidden, prompts = torch.randn(rows, 4, HIDDEN), torch.randn(BLOCKS, rows, 2, HIDDEN)

    def note(span: Span, block: int, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        pieces.append(hidden.shape[1])
        return run(span, block, hidden, **kwargs)

    monkeypatch.setattr(Span, "run", note)
    for name in ("MERGED_STEP_TOKENS", "PIECE_TOKENS"):
        monkeypatch.setattr(defaults, name, piece_tokens)
    async with engine.open_session(ALL, rows, 16) as session:
        outputs = [await session.step(hidden[:, :3], prompts), await session.step(hidden[:, 3:])]
    assert max(pieces) == piece_tokens
    for row, output in enumerate(torch.cat(outputs, 1)):
        close(output[None], llama(hidden[row : row + 1], prompts[:, row : row + 1]))
