"""Attention over a session's KV cache, through the contracts that transformers' decoder layers follow.

A layer hands new keys and values to ``past_key_values.update`` and what comes back, with its queries, to the
attention function named in its configuration. Here ``update`` writes in place and returns views, and the
function derives the causal mask from the two lengths alone: the queries are the last ones of the keys'
positions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kwaainet_bridge.errors import EngineError

NAME = "kwaainet"


class SpanCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one session for consecutive blocks, allocated whole.

    ``storage`` is [blocks, 2, batch, kv_heads, max_length, head_dim]. What lies from ``position`` on is not
    yet written or no longer valid, and never read.
    """

    def __init__(self, storage: torch.Tensor, first_block: int) -> None:
        super().__init__(layers=[])
        self._storage = storage
        self._blocks = [(pair[0], pair[1]) for pair in storage]
        self._first = first_block
        self.position = 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [batch, kv_heads, T, head_dim] at ``position``; return views of everything up to their
        end."""
        keys, values = self._blocks[layer_idx - self._first]
        start, end = self.position, self.position + key_states.shape[2]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # the same for all blocks
        return self.position

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Make row i what row ``rows[i]`` was, for the first ``length`` positions of every block."""
        for block in self._storage:
            written = block[:, :, :, :length]
            written.copy_(written.index_select(1, rows))


@functools.lru_cache(maxsize=4)
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
    module: torch.nn.Module,  # noqa: ARG001  # the interface's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  # blocks are served in evaluation mode
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the last queries [B, heads, T, D] over keys and values [B, kv_heads, L, D], T <= L.

    Returns [B, T, heads, D] and None for the weights. EngineError if the layer asks for what this cannot do.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if unsupported.get(name) is not None]
    if attention_mask is not None or asked:
        raise EngineError(f"attention with {', '.join(asked) or 'a mask of its own'} is not supported")
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if queries == 1:
        if sliding_window is not None and keys > sliding_window:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        # One position sees all keys, so the heads that share keys can stand as the queries of one head:
        # several times quicker than enable_gqa on the CPU, and nothing is copied.
        packed = query.reshape(batch, kv_heads, heads // kv_heads, query.shape[3])
        attended = scaled_dot_product_attention(packed, key, value, scale=scaling)
        return attended.reshape(batch, 1, heads, value.shape[3]), None
    windowed = sliding_window is not None and keys > sliding_window
    full = queries == keys and not windowed
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None
        if full
        else causal_mask(queries, keys, sliding_window if windowed else None, query.device),
        is_causal=full,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
