"""Checks of what callers hand in: each raises InvalidRequest that says what was expected and what came."""

from __future__ import annotations

import torch

from kwaainet_bridge.errors import InvalidRequest


def check_blocks(blocks: range, served: range) -> None:
    """A non-empty run of consecutive blocks, all served."""
    if blocks.step != 1 or not blocks:
        raise InvalidRequest(f"blocks must be a non-empty run of consecutive numbers, got {blocks}")
    if blocks.start < served.start or blocks.stop > served.stop:
        raise InvalidRequest(
            f"blocks {blocks.start}:{blocks.stop} are not all served here, only {served.start}:{served.stop}"
        )


def check_hidden(
    tensor: torch.Tensor, hidden_size: int, *, what: str = "hidden states", batch: int | None = None
) -> None:
    """A floating-point [batch, tokens, hidden_size]."""
    expected = f"{what} must be floating-point [{'batch' if batch is None else batch}, tokens, {hidden_size}]"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{expected}, got {type(tensor).__name__}")
    fits = tensor.ndim == 3 and tensor.shape[2] == hidden_size and batch in (None, tensor.shape[0])
    if not fits or not tensor.is_floating_point():
        raise InvalidRequest(f"{expected}, got {_describe(tensor)}")


def check_prompts(prompts: torch.Tensor | None, blocks: range, hidden: torch.Tensor) -> torch.Tensor | None:
    """Deep prompts: None, or a floating-point [blocks, batch or 1, P, hidden_size] with P at most the tokens.

    Returns them, or None also if they hold nothing.
    """
    if prompts is None or prompts.numel() == 0:
        return None
    batch, tokens, size = hidden.shape
    fits = (
        prompts.ndim == 4
        and prompts.shape[0] == len(blocks)
        and prompts.shape[1] in (1, batch)
        and prompts.shape[2] <= tokens
        and prompts.shape[3] == size
    )
    if not fits or not prompts.is_floating_point():
        raise InvalidRequest(
            f"prompts must be floating-point [{len(blocks)}, {batch} or 1, at most {tokens}, {size}], "
            f"got {_describe(prompts)}"
        )
    return prompts


def check_hypo_ids(hypo_ids: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Where each row comes from: None, or int64 [batch] of row numbers. Returns None also if nothing
    moves."""
    if hypo_ids is None:
        return None
    if hypo_ids.dtype != torch.int64:
        raise InvalidRequest("hypo ids must be int64")
    if tuple(hypo_ids.shape) != (batch,):
        raise InvalidRequest(f"hypo ids must be int64 [{batch}], got {_describe(hypo_ids)}")
    rows = hypo_ids.tolist()
    if not all(0 <= row < batch for row in rows):
        raise InvalidRequest(f"hypo ids must lie in 0..{batch - 1}, got {min(rows)}..{max(rows)}")
    return None if rows == list(range(batch)) else hypo_ids


def check_batch_tokens(hidden: torch.Tensor, limit: int) -> None:
    """Of a forward or backward request: something to compute, and not more than ``limit`` batch times
    tokens."""
    tokens = hidden.shape[0] * hidden.shape[1]
    if tokens == 0:
        raise InvalidRequest(f"a batch must hold at least one token, got {_describe(hidden)}")
    if tokens > limit:
        raise InvalidRequest(f"Task size greater than max_batch_size ({limit}), it can't be processed")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
