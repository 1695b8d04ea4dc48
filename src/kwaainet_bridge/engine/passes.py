"""Forward and backward over a run of blocks without a cache, in pieces that leave room for inference steps.

The semantics are those of Petals' servers (Petals 22afba6, server/block_functions.py and backend.py). What runs here
runs in the compute thread: a piece, between two yields, is one block's work on some of the sequences.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.prompts import add_prompt

if TYPE_CHECKING:
    from kwaainet_bridge.engine.span import Span


def forward(
    span: Span,
    hidden: torch.Tensor,
    *,
    blocks: range,
    prompts: torch.Tensor | None,
    adapter: str | None = None,
) -> Generator[None, None, torch.Tensor]:
    """[B, T, H] through ``blocks``; prompts [n, B or 1, P, H] are added before their block."""
    outputs: list[torch.Tensor] = []
    for rows in _row_groups(hidden):
        if outputs:
            yield
        state = hidden[rows].to(span.device, span.dtype)
        for index, block in enumerate(blocks):
            if index:
                yield
            with span.adapters.to_all(adapter):
                state = span.run(block, add_prompt(state, _of_rows(prompts, index, rows)))
        outputs.append(state)
    return _collect(outputs)


def backward(
    span: Span,
    hidden: torch.Tensor,
    grad_output: torch.Tensor,
    *,
    blocks: range,
    prompts: torch.Tensor | None,
    adapter: str | None = None,
) -> Generator[None, None, tuple[torch.Tensor, torch.Tensor | None]]:
    """Gradients with regard to [B, T, H] inputs and, if there are prompts, to them, as [n, B, P, H].

    Of the forward pass only each block's input is kept, and as long as defaults.BACKWARD_GRAPH_BYTES allow what its
    gradient needs; a block without that runs again when its gradient is due.
    """
    grad_inputs: list[torch.Tensor] = []
    grad_prompts: list[torch.Tensor] = []
    for rows in _row_groups(hidden):
        if grad_inputs:
            yield
        kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        room = _Room(defaults.BACKWARD_GRAPH_BYTES)
        state = hidden[rows].to(span.device, span.dtype)
        for index, block in enumerate(blocks):
            state = add_prompt(state.detach(), _of_rows(prompts, index, rows))
            with span.adapters.to_all(adapter):
                output = room.run(span, block, state)
            kept.append((state, output if output.requires_grad else None))
            state = output
            yield
        grad = grad_output[rows].to(span.device, span.dtype)
        of_blocks: list[torch.Tensor] = []
        for index, block in reversed(list(enumerate(blocks))):
            with span.adapters.to_all(adapter):  # parts of a block may run a second time
                grad = _gradient(span, block, *kept.pop(), grad)
            if prompts is not None:
                of_blocks.append(grad[:, : prompts.shape[2]])
            if index:
                yield
        grad_inputs.append(grad)
        if prompts is not None:
            grad_prompts.append(torch.stack(of_blocks[::-1]))
    return _collect(grad_inputs), None if prompts is None else _collect(grad_prompts, dim=1)


class _Room:
    """Runs blocks and keeps what their gradients need, while there is room for as much as the first one took."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._each = 0

    def run(self, span: Span, block: int, state: torch.Tensor) -> torch.Tensor:
        if self._left < self._each or self._left <= 0:
            return span.run(block, state)
        taken: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                storage = here.untyped_storage()
                taken[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = span.run(block, state.requires_grad_())
        self._each = max(self._each, sum(taken.values()))
        self._left -= self._each
        return output


def _gradient(
    span: Span, block: int, state: torch.Tensor, output: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    if output is None:
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            output = span.run(block, state)
    (result,) = torch.autograd.grad(output, state, grad)
    return result


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


def _collect(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole.detach().to("cpu").contiguous()
