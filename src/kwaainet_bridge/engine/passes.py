"""Forward and backward over a run of blocks without a cache, in pieces that leave room for inference steps.

The semantics are those of Petals' servers (Petals 22afba6, server/block_functions.py and backend.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.compute import ComputeThread, Priority

if TYPE_CHECKING:
    from kwaainet_bridge.engine.span import Span


def add_prompt(hidden: torch.Tensor, prompt: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
    """``hidden`` with ``prompt`` [B or 1, P, H] added to sequence positions 0..P-1, as a new tensor.

    ``offset`` is where in that sequence ``hidden`` begins.
    """
    if prompt is None or offset >= prompt.shape[1]:
        return hidden
    here = prompt[:, offset : offset + hidden.shape[1]]
    result = hidden.clone()
    result[:, : here.shape[1]] += here.to(hidden.device, hidden.dtype)
    return result


async def forward(
    span: Span, compute: ComputeThread, hidden: torch.Tensor, *, blocks: range, prompts: torch.Tensor | None
) -> torch.Tensor:
    """[B, T, H] through ``blocks``; prompts [n, B or 1, P, H] are added before their block."""
    outputs = []
    for rows in _row_groups(hidden):
        state = hidden[rows]
        for index, block in enumerate(blocks):
            prompt = _of_rows(prompts, index, rows)
            state = await compute.run(partial(_forward_block, span, block, state, prompt), Priority.BATCH)
        outputs.append(state)
    return await compute.run(partial(_collect, outputs), Priority.BATCH)


async def backward(
    span: Span,
    compute: ComputeThread,
    hidden: torch.Tensor,
    grad_output: torch.Tensor,
    *,
    blocks: range,
    prompts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients with regard to [B, T, H] inputs and, if there are prompts, to them, as [n, B, P, H].

    Only each block's input is kept of the forward pass; a block runs again when its gradient is due.
    """
    grad_inputs, grad_prompts = [], []
    for rows in _row_groups(hidden):
        inputs = []
        state = hidden[rows]
        for index, block in enumerate(blocks):
            prompt = _of_rows(prompts, index, rows)
            state, kept = await compute.run(
                partial(_forward_keeping, span, block, state, prompt), Priority.BATCH
            )
            inputs.append(kept)
        grad = grad_output[rows]
        of_blocks: list[torch.Tensor] = []
        for block in reversed(blocks):
            grad = await compute.run(
                partial(_backward_block, span, block, inputs.pop(), grad), Priority.BATCH
            )
            if prompts is not None:
                of_blocks.append(grad[:, : prompts.shape[2]])
        grad_inputs.append(grad)
        if prompts is not None:
            grad_prompts.append(torch.stack(of_blocks[::-1]))
    grad_input = await compute.run(partial(_collect, grad_inputs), Priority.BATCH)
    if prompts is None:
        return grad_input, None
    return grad_input, await compute.run(partial(_collect, grad_prompts, dim=1), Priority.BATCH)


def _row_groups(hidden: torch.Tensor) -> Iterator[slice]:
    """Sequences do not see each other, so a batch can go through the blocks a few of them at a time."""
    batch, tokens, _ = hidden.shape
    rows = max(1, defaults.PIECE_TOKENS // tokens)
    return (slice(start, start + rows) for start in range(0, batch, rows))


def _of_rows(prompts: torch.Tensor | None, index: int, rows: slice) -> torch.Tensor | None:
    if prompts is None:
        return None
    prompt: torch.Tensor = prompts[index]
    return prompt if prompt.shape[0] == 1 else prompt[rows]


def _forward_block(span: Span, block: int, hidden: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    return _forward_keeping(span, block, hidden, prompt)[0]


def _forward_keeping(
    span: Span, block: int, hidden: torch.Tensor, prompt: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    state = add_prompt(hidden.to(span.device, span.dtype), prompt)
    return span.run(block, state), state


def _backward_block(span: Span, block: int, state: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        output = span.run(block, state)
        (grad,) = torch.autograd.grad(output, state, grad_output.to(span.device, span.dtype))
    result: torch.Tensor = grad
    return result


def _collect(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole.to("cpu")
