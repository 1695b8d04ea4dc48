"""Attention over the paged KV cache, through the contracts that transformers' decoder layers follow.

A layer hands new keys and values to ``past_key_values.update``, and its queries with what comes back to the attention
function named in its configuration. Here ``update`` writes into the pages, and the function reads them: the plan of
the batch, which says whose tokens are where, reaches it as the keyword ``ragged``. Without one it is plain causal
attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import EngineError

if TYPE_CHECKING:
    from kwaainet_bridge.engine.ragged import RaggedBatch

NAME = "kwaainet"

IGNORED = frozenset({"position_ids"})
"""Tensors that layers pass on to attention and that do not change it."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What one layer wants of its attention, beside causality.

    Scores are multiplied by ``scaling`` (None: by head_dim ** -0.5), then bent by ``softcap * tanh(score / softcap)``.
    A query sees ``window`` positions, itself included; None is all. ``sinks`` [heads] are scores of a key without a
    value, which every query sees.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention does it."""
        return self.softcap is None and self.sinks is None


class RaggedCache(Cache):  # type: ignore[misc]  # transformers has no types
    """What layers take for their cache while they run a ragged batch."""

    def __init__(self, batch: RaggedBatch) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.pieces: list[Any] = []
        """How layers that attend by themselves cut the batch, see own_attention."""

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
    back. The last query is at the last key."""
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    ragged: RaggedBatch | None = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of queries [B, heads, T, D]: over keys and values [B, kv_heads, T, D], or over the pages.

    Returns [B, T, heads, D] and None for the weights. EngineError if the layer asks for what this cannot do.
    """
    asked = [
        name for name, given in further.items() if isinstance(given, torch.Tensor) and name not in IGNORED
    ]
    if attention_mask is not None or asked:
        raise EngineError(f"attention with {', '.join(asked) or 'a mask of its own'} is not supported")
    if further.get("is_causal") is False:
        raise EngineError("attention that looks ahead is not supported")
    rule = Rule(scaling, sliding_window, softcap, s_aux)
    if ragged is not None:
        return ragged.attend(module.layer_idx, query, rule), None
    return causal(query, key, value, rule).transpose(1, 2), None


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[B, heads, T, D] of the last T queries over keys and values [B, kv_heads, L, D], T <= L."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    windowed = rule.window is not None and keys > rule.window
    if not rule.plain:
        size = max(1, defaults.ATTENTION_SCORE_BYTES // (4 * batch * heads * keys))
    elif queries == 1:
        if windowed:
            assert rule.window is not None
            key, value = key[:, :, -rule.window :], value[:, :, -rule.window :]
        # One position sees all keys, so the heads that share keys can stand as the queries of one head:
        # several times quicker than enable_gqa on the CPU, and nothing is copied.
        packed = query.reshape(batch, kv_heads, heads // kv_heads, query.shape[3])
        attended = scaled_dot_product_attention(packed, key, value, scale=rule.scaling)
        return attended.reshape(batch, heads, 1, value.shape[3])
    elif windowed:
        size = defaults.WINDOWED_QUERIES
    else:
        size = queries
    outputs = []
    for start in range(0, queries, size):
        stop = min(queries, start + size)
        end = keys - queries + stop
        first = max(0, end - (stop - start) - rule.window + 1) if rule.window is not None else 0
        part = query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], rule
        if rule.plain:
            outputs.append(_by_torch(*part))
        elif torch.is_grad_enabled() and size < queries:  # scores of all queries would not fit at once
            outputs.append(checkpoint(_by_scores, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_by_scores(*part))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, allowed: torch.Tensor
) -> torch.Tensor:
    """[B, heads, T, D] of queries that see what ``allowed`` [T, L] says; the rule's window is in it already."""
    if rule.plain:
        return _by_torch(query, key, value, rule, allowed)
    size = max(1, defaults.ATTENTION_SCORE_BYTES // (4 * query.shape[0] * query.shape[1] * key.shape[2]))
    pairs = zip(query.split(size, 2), allowed.split(size), strict=True)
    return torch.cat([_by_scores(part, key, value, rule, mask) for part, mask in pairs], 2)


def _by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, heads, T, D] as :func:`causal`, or :func:`masked`, without softcap and sinks."""
    queries, keys = query.shape[2], key.shape[2]
    window = rule.window if rule.window is not None and keys > rule.window else None
    full = allowed is None and queries == keys and window is None
    if allowed is None and not full:
        allowed = causal_mask(queries, keys, window, query.device)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        is_causal=full,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, heads, T, D] as :func:`causal`, or :func:`masked`, step by step."""
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    scaling = size**-0.5 if rule.scaling is None else rule.scaling
    packed = (query * scaling).reshape(batch, kv_heads, -1, size)
    scores = (packed @ key.transpose(2, 3)).float()
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.reshape(batch, heads, queries, keys)
    if allowed is None and (queries > 1 or (rule.window is not None and keys > rule.window)):
        allowed = causal_mask(queries, keys, rule.window, query.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if rule.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = rule.sinks.float().reshape(1, heads, 1, 1)
        weights = (scores - torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks)).exp()
    weights = weights.to(value.dtype).reshape(batch, kv_heads, -1, keys)
    return (weights @ value).reshape(batch, heads, queries, -1)


AttentionInterface.register(NAME, attend)
