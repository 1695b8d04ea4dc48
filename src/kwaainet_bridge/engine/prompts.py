"""Deep prompts: what clients train, added to the input of each block."""

from __future__ import annotations

import torch


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
