"""Forward and backward against the whole model and its autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import BLOCKS, HIDDEN, Reference, close

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import InvalidRequest

ALL = range(BLOCKS)


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


async def test_forward_is_the_whole_models(engine: Engine, llama: Reference, hidden: torch.Tensor) -> None:
    close(await engine.forward(hidden, ALL), llama(hidden))


async def test_forward_of_two_spans_is_the_whole(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    half = await engine.forward(hidden, range(2))
    close(await engine.forward(half, range(2, BLOCKS)), llama(hidden))


@pytest.mark.parametrize("batch", [1, 3])
async def test_forward_adds_prompts(
    engine: Engine, llama: Reference, hidden: torch.Tensor, batch: int
) -> None:
    prompts = random(BLOCKS, batch, 4, HIDDEN)
    untouched = hidden.clone()
    close(await engine.forward(hidden, ALL, prompts), llama(hidden, prompts))
    assert torch.equal(hidden, untouched)


@pytest.mark.parametrize("graph_bytes", [defaults.BACKWARD_GRAPH_BYTES, 400_000, 0])
@pytest.mark.parametrize("piece_tokens", [defaults.PIECE_TOKENS, 24, 1])
@pytest.mark.parametrize("batch", [None, 1, 3])
async def test_backward_is_autograds(
    engine: Engine,
    llama: Reference,
    hidden: torch.Tensor,
    *,
    batch: int | None,
    piece_tokens: int,
    graph_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the graphs of all blocks are kept, of some or of none."""
    monkeypatch.setattr(defaults, "PIECE_TOKENS", piece_tokens)
    monkeypatch.setattr(defaults, "BACKWARD_GRAPH_BYTES", graph_bytes)
    grad_output = random(*hidden.shape, seed=3)
    prompts = None if batch is None else random(BLOCKS, batch, 4, HIDDEN)
    inputs = hidden.clone().requires_grad_()
    # a prompt of batch 1 gets one gradient for each sequence
    expanded = None if prompts is None else prompts.expand(-1, 3, -1, -1).clone().requires_grad_()
    llama(inputs, expanded).backward(grad_output)

    grad_input, grad_prompts = await engine.backward(hidden, grad_output, ALL, prompts)

    close(grad_input, inputs.grad, 1e-4)
    if prompts is None:
        assert grad_prompts is None
    else:
        close(grad_prompts, expanded.grad, 1e-4)
    assert not grad_input.requires_grad


async def test_prompts_that_hold_nothing_are_none(engine: Engine, hidden: torch.Tensor) -> None:
    empty = torch.empty(0)
    assert torch.equal(await engine.forward(hidden, ALL, empty), await engine.forward(hidden, ALL))
    assert (await engine.backward(hidden, hidden, ALL, empty))[1] is None


async def test_inputs_of_another_dtype_are_converted(
    engine: Engine, llama: Reference, hidden: torch.Tensor
) -> None:
    close(await engine.forward(hidden.double(), ALL), llama(hidden))


async def test_only_what_fits_is_computed(engine: Engine, hidden: torch.Tensor) -> None:
    with pytest.raises(
        InvalidRequest, match=r"must be floating-point \[batch, tokens, 64\], got int64 \[3, 12, 64\]"
    ):
        await engine.forward(hidden.long(), ALL)
    with pytest.raises(InvalidRequest, match=r"got float32 \[3, 12, 63\]"):
        await engine.forward(hidden[..., 1:], ALL)
    with pytest.raises(InvalidRequest, match=r"got float32 \[12, 64\]"):
        await engine.forward(hidden[0], ALL)
    with pytest.raises(InvalidRequest, match="at least one token"):
        await engine.forward(hidden[:0], ALL)
    with pytest.raises(InvalidRequest, match="blocks 4:7 are not all served here, only 0:6"):
        await engine.forward(hidden, range(4, 7))
    with pytest.raises(InvalidRequest, match="non-empty run"):
        await engine.forward(hidden, range(3, 3))
    with pytest.raises(InvalidRequest, match="non-empty run"):
        await engine.forward(hidden, range(0, 4, 2))
    with pytest.raises(InvalidRequest) as refused:
        await engine.forward(torch.zeros(9, 256, HIDDEN), ALL)
    assert str(refused.value) == "Task size greater than max_batch_size (2048), it can't be processed"
    with pytest.raises(
        InvalidRequest, match=r"gradients of the outputs must be \[3, 12, 64\], got \[3, 11, 64\]"
    ):
        await engine.backward(hidden, hidden[:, 1:], ALL)


@pytest.mark.parametrize("shape", [(5, 3, 4, 64), (6, 2, 4, 64), (6, 3, 13, 64), (6, 3, 4, 63), (3, 4, 64)])
async def test_prompts_must_fit(engine: Engine, hidden: torch.Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidRequest, match=r"prompts must be floating-point \[6, 3 or 1, at most 12, 64\], got"
    ):
        await engine.forward(hidden, ALL, random(*shape))


@pytest.mark.parametrize("products", [0, 1 << 40])
async def test_small_passes_keep_to_one_thread(
    llama_folder: Path, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch, products: int
) -> None:
    monkeypatch.setattr(defaults, "ONE_THREAD_PRODUCTS", products)
    threads: set[int] = set()
    engine = await Engine.load(EngineConfig(str(llama_folder), threads=2))
    try:
        run = engine._span.run

        def counting(*given: Any, **more: Any) -> torch.Tensor:
            threads.add(torch.get_num_threads())
            return run(*given, **more)

        monkeypatch.setattr(engine._span, "run", counting)
        output = await engine.forward(hidden, ALL)
        await engine.backward(hidden, torch.ones_like(output), ALL)
        async with engine.open_session(ALL, hidden.shape[0], 16) as session:
            await session.step(hidden[:, :1])
        assert threads == {1 if products else 2}
        assert await engine._compute.run(torch.get_num_threads) == 2
    finally:
        await engine.aclose()
