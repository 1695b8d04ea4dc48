"""Attention over the paged KV cache, through the contracts that transformers' decoder layers follow.

A layer hands new keys and values to ``past_key_values.update``, and its queries with what comes back to the attention
function named in its configuration. Here ``update`` writes into the pages, and the function reads them: the plan of
the batch, which says whose tokens are where, reaches it as the keyword ``ragged``. Without one it is plain causal
attention.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kwaainet_bridge.errors import EngineError

if TYPE_CHECKING:
    from kwaainet_bridge.engine.ragged import RaggedBatch

NAME = "kwaainet"


class RaggedCache(Cache):  # type: ignore[misc]  # transformers has no types
    """What layers take for their cache while they run a ragged batch."""

    def __init__(self, batch: RaggedBatch) -> None:
        super().__init__(layers=[])
        self.batch = batch

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, kv_heads, N, head_dim] into the pages of the batch's tokens; :func:`attend` reads them."""
        self.batch.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # of no one sequence
        return 0


@functools.lru_cache(maxsize=8)
def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], True where a query may look: not ahead of itself, and at most ``window`` positions
    back."""
    query_at = torch.arange(keys - queries, keys, device=device)[:, None]
    key_at = torch.arange(keys, device=device)[None, :]
    mask = key_at <= query_at
    if window is not None:
        mask &= key_at > query_at - window
    return mask


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  # blocks are served in evaluation mode
    sliding_window: int | None = None,
    ragged: RaggedBatch | None = None,
    **unsupported: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of queries [B, heads, T, D]: over keys and values [B, kv_heads, T, D], or over the pages.

    Returns [B, T, heads, D] and None for the weights. EngineError if the layer asks for what this cannot do.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if unsupported.get(name) is not None]
    if attention_mask is not None or asked:
        raise EngineError(f"attention with {', '.join(asked) or 'a mask of its own'} is not supported")
    if ragged is not None:
        return ragged.attend(module.layer_idx, query, scaling, sliding_window), None
    return causal(query, key, value, scaling, sliding_window).transpose(1, 2), None


def causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[B, heads, T, D] of the last T queries over keys and values [B, kv_heads, L, D], T <= L."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    windowed = window is not None and keys > window
    if queries == 1:
        if windowed:
            assert window is not None
            key, value = key[:, :, -window:], value[:, :, -window:]
        # One position sees all keys, so the heads that share keys can stand as the queries of one head:
        # several times quicker than enable_gqa on the CPU, and nothing is copied.
        packed = query.reshape(batch, kv_heads, heads // kv_heads, query.shape[3])
        attended = scaled_dot_product_attention(packed, key, value, scale=scaling)
        return attended.reshape(batch, heads, 1, value.shape[3])
    full = queries == keys and not windowed
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if full else causal_mask(queries, keys, window if windowed else None, query.device),
        is_causal=full,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )


AttentionInterface.register(NAME, attend)
