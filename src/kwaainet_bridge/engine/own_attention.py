"""Layers that attend by themselves: those of BLOOM and Falcon, whose code is older than AttentionInterface.

They ask their cache for all keys and values, and take a mask and perhaps ALiBi, biases that grow with a key's position.
So a ragged batch goes through them at once as well: the cache hands out what all sequences of the batch have, one after
the other, and the mask keeps each query to its own. Scores are made of all pairs though, so a batch whose scores would
be too large goes in several pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.attention import RaggedCache, causal_mask
from kwaainet_bridge.engine.family import Family, alibi_builder
from kwaainet_bridge.engine.lora import Active
from kwaainet_bridge.engine.ragged import RaggedBatch, visible
from kwaainet_bridge.engine.rotary import FIRST_TABLE, Places, RotaryTable
from kwaainet_bridge.engine.step import SequencePart

Bias = tuple[torch.Tensor, torch.Tensor | None]
"""What a layer takes as attention_mask and alibi."""


class GatheringCache(Cache):  # type: ignore[misc]  # transformers has no types
    """What such a layer takes for its cache while it runs a ragged batch."""

    def __init__(self, batch: RaggedBatch) -> None:
        super().__init__(layers=[])
        self._batch = batch

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, N, head_dim] into the pages; all keys and values [1, heads, K, head_dim] of the batch.

        A layer may hand in copies of its key heads, one for each query head: they are stored once.
        """
        copies = key_states.shape[1] // self._batch.store.kv_heads
        self._batch.write(layer_idx, key_states[:, ::copies], value_states[:, ::copies])
        keys, values = self._batch.gather(layer_idx)
        if copies > 1:
            keys, values = keys.repeat_interleave(copies, 1), values.repeat_interleave(copies, 1)
        return keys, values


class GivenCache(Cache):  # type: ignore[misc]  # as above
    """Earlier keys and values, [B, heads, T, head_dim] each, without pages; ``new`` is what the layer adds."""

    def __init__(self, earlier: list[torch.Tensor]) -> None:
        super().__init__(layers=[])
        self._earlier = earlier
        self.new: tuple[torch.Tensor, torch.Tensor]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002  # of one layer only
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = key_states, value_states
        return torch.cat([*self._earlier[::2], key_states], 2), torch.cat(
            [*self._earlier[1::2], value_states], 2
        )


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """A ragged batch whose scores fit, and its mask, if that is kept."""

    batch: RaggedBatch
    bias: Bias | None = None


class OwnAttention:
    """Runs such layers of one model."""

    def __init__(self, model: Family, rotary: RotaryTable, adapters: Active, like: torch.Tensor) -> None:
        """``like`` has the dtype and the device of hidden states."""
        dtype, device = like.dtype, like.device
        self.adapters = adapters
        self._rotary = rotary
        self._heads = int(model.config.num_attention_heads)
        self._alibi = Alibi(model, dtype, device) if model.uses_alibi else None
        # their code for torch's own attention takes ALiBi within the mask, scaled as scores are
        self._scale = model.head_dim**-0.5 if model.config._attn_implementation == "sdpa" else None  # noqa: SLF001  # a public key of every configuration, by this name
        self._least = torch.finfo(dtype).min
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, H] at the positions 0 … T-1."""
        batch, tokens, _ = hidden.shape
        size = min(tokens, max(1, defaults.ATTENTION_SCORE_BYTES // (4 * batch * self._heads * tokens)))
        outputs: list[torch.Tensor] = []
        earlier: list[torch.Tensor] = []
        for start in range(0, tokens, size):
            stop = min(tokens, start + size)
            run = self._piece(layer, start, stop)
            part = hidden[:, start:stop]
            if torch.is_grad_enabled() and size < tokens:  # scores of all pieces would not fit at once
                output, *new = checkpoint(run, part, *earlier, use_reentrant=False, preserve_rng_state=False)
            else:
                output, *new = run(part, *earlier)
            outputs.append(output)
            earlier += new
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _piece(self, layer: Any, start: int, stop: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def run(hidden: torch.Tensor, *earlier: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cache = GivenCache(list(earlier))
            keys = torch.arange(stop, device=hidden.device)
            allowed = causal_mask(stop - start, stop, None, hidden.device)
            bias = self._bias(allowed, keys, stop, hidden.shape[0])
            output = self._call(layer, hidden, [(start, stop - start, stop)], bias, cache)
            return output, *cache.new

        return run

    def run_ragged(self, layer: Any, hidden: torch.Tensor, cache: RaggedCache) -> torch.Tensor:
        """[1, N, H] of the cache's batch."""
        if not cache.pieces:
            cells = max(1, defaults.ATTENTION_SCORE_BYTES // (4 * self._heads))
            cache.pieces = [Piece(batch) for batch in _split(cache.batch, cells)]
        outputs = []
        offset = 0
        for piece in cache.pieces:
            bias = piece.bias
            if bias is None:
                bias = self._bias(*_pairs(piece.batch, hidden.device), rows=1)
                # masks of many pieces are too large to be kept for the other blocks
                if len(cache.pieces) == 1:
                    piece.bias = bias
            part = hidden[:, offset : offset + piece.batch.tokens]
            output = self._call_batch(layer, part, piece.batch, bias)
            if len(piece.batch.sequences) > 1 and not output.isfinite().all():
                output = self._call_each(layer, part, piece.batch)
            outputs.append(output)
            offset += piece.batch.tokens
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _call_each(self, layer: Any, hidden: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        """Each sequence by itself: masks are added to scores, which does not keep out keys that are no numbers."""
        parts = hidden.split([sequence.count for sequence in batch.sequences], 1)
        outputs = []
        for part, sequence in zip(parts, batch.sequences, strict=True):
            alone = RaggedBatch(batch.store, [sequence])
            bias = self._bias(*_pairs(alone, hidden.device), rows=1)
            outputs.append(self._call_batch(layer, part, alone, bias))
        return torch.cat(outputs, 1)

    def _call_batch(self, layer: Any, hidden: torch.Tensor, batch: RaggedBatch, bias: Bias) -> torch.Tensor:
        with self.adapters.to_rows(batch.adapted):
            return self._call(layer, hidden, batch.places, bias, GatheringCache(batch))

    def _call(
        self, layer: Any, hidden: torch.Tensor, places: Places, bias: Bias, cache: Cache
    ) -> torch.Tensor:
        mask, alibi = bias
        output = layer(
            hidden,
            attention_mask=mask,
            alibi=alibi,
            position_ids=self._rotary.positions(places),
            position_embeddings=self._rotary.embeddings(places, "full_attention"),
            layer_past=cache,
            use_cache=True,
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _bias(self, allowed: torch.Tensor, key_at: torch.Tensor, end: int, rows: int) -> Bias:
        """For the queries and keys of ``allowed`` [N, K], with the keys at positions ``key_at`` [K] below ``end``."""
        if self._alibi is None:
            return torch.where(allowed, self._zero, self._least)[None, None], None
        alibi = self._alibi.at(key_at, end)
        if self._scale is None:
            return torch.where(allowed, self._zero, self._least)[None, None], alibi.repeat(rows, 1, 1)
        return (alibi * self._scale).masked_fill(~allowed, self._least)[None], alibi


class Alibi:
    """The family's own biases, for any positions."""

    def __init__(self, model: Family, dtype: torch.dtype, device: torch.device) -> None:
        build = alibi_builder(model.base)
        assert build is not None  # else the family would have been refused
        self._build = build
        self._heads = int(model.config.num_attention_heads)
        self._dtype = dtype
        self._device = device
        self._table = self._compute(FIRST_TABLE)

    def at(self, positions: torch.Tensor, end: int) -> torch.Tensor:
        """[heads, 1, K] for positions [K] below ``end``."""
        if end > self._table.shape[2]:
            self._table = self._compute(1 << (end - 1).bit_length())
        return self._table.index_select(2, positions)

    def _compute(self, size: int) -> torch.Tensor:
        mask = torch.ones(1, size, dtype=torch.int64, device=self._device)
        return self._build(mask, self._heads, self._dtype).reshape(self._heads, 1, size)


def _split(batch: RaggedBatch, cells: int) -> Iterator[RaggedBatch]:
    """The same tokens in batches of at most ``cells`` pairs of a query and a key, or of one query."""
    parts: list[SequencePart] = []
    tokens = keys = 0
    for part in batch.sequences:
        done = 0
        while done < part.count:
            count = min(part.count - done, max(1, cells // (part.start + part.count)))
            end = part.start + done + count
            if parts and (tokens + count) * (keys + end) > cells:
                yield RaggedBatch(batch.store, parts)
                parts, tokens, keys = [], 0, 0
            parts.append(dataclasses.replace(part, start=end - count, count=count))
            tokens, keys, done = tokens + count, keys + end, done + count
    if len(parts) == len(batch.sequences) and tokens == batch.tokens:
        yield batch
    else:
        yield RaggedBatch(batch.store, parts)


def _pairs(batch: RaggedBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Which query [N] may see which key [K]; the positions of the keys, and where they end."""
    ends = torch.tensor([part.start + part.count for part in batch.sequences])
    counts = torch.tensor([part.count for part in batch.sequences])
    number = torch.arange(len(ends))
    query_of, key_of = number.repeat_interleave(counts), number.repeat_interleave(ends)
    query_at = torch.cat([torch.arange(part.start, part.start + part.count) for part in batch.sequences])
    slots = [torch.arange(int(end)) for end in ends]
    allowed = (key_of[None] == query_of[:, None]) & (torch.cat(slots)[None] <= query_at[:, None])
    for index, part in enumerate(batch.sequences):
        if part.tree is not None:
            nodes = torch.tensor(part.tree.positions())
            slots[index][part.tree.base :] = nodes[: int(ends[index]) - part.tree.base]
            allowed[(query_of == index).nonzero(), (key_of == index).nonzero().T] = visible(part)
    return allowed.to(device), torch.cat(slots).to(device), int(ends.max())
