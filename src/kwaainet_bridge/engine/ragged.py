"""A ragged batch: tokens of several sequences in one row, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import attention
from kwaainet_bridge.engine.attention import Rule
from kwaainet_bridge.engine.step import SequencePart


class PagedStore:
    """Keys and values of all sessions: for each block two tensors [kv_heads, pages * page_tokens, head_dim].

    The memory is taken from the system as pages are first written.
    """

    def __init__(
        self, blocks: range, pages: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """``heads`` is (kv_heads, head_dim)."""
        shape = (len(blocks), 2, heads[0], pages * defaults.PAGE_TOKENS, heads[1])
        self.blocks = blocks
        self.kv_heads = heads[0]
        self.device = device
        self.token_bytes = 2 * heads[0] * heads[1] * dtype.itemsize
        """Of the keys and values of one token in one block."""
        self._storage = torch.empty(shape, dtype=dtype, device=device)
        self._of_block = [(pair[0], pair[1]) for pair in self._storage]

    def of(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one block of the model."""
        return self._of_block[block - self.blocks.start]

    def copy(self, blocks: range, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to), of some blocks of the model."""
        first = blocks.start - self.blocks.start
        part = self._storage[first : first + len(blocks)].unflatten(3, (-1, defaults.PAGE_TOKENS))
        sources, targets = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        part.index_copy_(3, targets, part.index_select(3, sources))

    def read(self, block: int, pages: Sequence[int]) -> torch.Tensor:
        """Keys and values [2, kv_heads, pages, PAGE_TOKENS, head_dim] of a block of the model, on the host."""
        of_block = self._storage[block - self.blocks.start].unflatten(2, (-1, defaults.PAGE_TOKENS))
        return of_block.index_select(2, torch.tensor(pages, dtype=torch.int64, device=self.device)).to("cpu")

    def write(self, block: int, pages: Sequence[int], content: torch.Tensor) -> None:
        """Put back what :meth:`read` gave, into other pages."""
        of_block = self._storage[block - self.blocks.start].unflatten(2, (-1, defaults.PAGE_TOKENS))
        of_block.index_copy_(
            2, torch.tensor(pages, dtype=torch.int64, device=self.device), content.to(self.device)
        )

    def move(self, blocks: range, pages: Sequence[int], pairs: Sequence[tuple[int, int]]) -> None:
        """Copy single tokens, (from, to), of a sequence in ``pages``, in some blocks of the model."""
        first = blocks.start - self.blocks.start
        part = self._storage[first : first + len(blocks)]
        sources, targets = (
            torch.tensor([_slot(pages, token) for token in side], device=self.device)
            for side in zip(*pairs, strict=True)
        )
        part.index_copy_(3, targets, part.index_select(3, sources))


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one new token each that attend in one call: their keys and values are copied next to each other."""

    members: frozenset[int]
    """Which of the batch's sequences."""
    rows: torch.Tensor
    """int64 [members]: where their tokens are in the batch."""
    slots: torch.Tensor
    """int64 [members * longest]: where their keys and values lie; a short one's last slot stands for what it lacks."""
    mask: torch.Tensor | None
    """bool [members, 1, 1, longest]: what each has; None if all have as much."""

    def attend(
        self, single: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """[members, kv_heads, heads / kv_heads, head_dim] of queries [N, ...] over a block's keys and values."""
        count = len(self.rows)
        key, value = (
            tensor.index_select(1, self.slots).unflatten(1, (count, -1)).transpose(0, 1)
            for tensor in (keys, values)
        )
        query = single if len(single) == count else single.index_select(0, self.rows)
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=rule.scaling)


class RaggedBatch:
    """The plan of one batch, the same for all blocks: made once, used by every layer."""

    def __init__(self, store: PagedStore, sequences: Sequence[SequencePart]) -> None:
        self.store = store
        self.sequences = sequences
        page = defaults.PAGE_TOKENS
        slots: list[int] = []
        self._parts: list[tuple[int, int, int, int | None]] = []
        """Of each sequence: where its tokens are in the batch, how many, up to where it has keys, and from which slot
        on, if they lie in one run."""
        offset = 0
        for sequence in sequences:
            pages, start, count = sequence.pages, sequence.start, sequence.count
            end = start + count
            used = -(-end // page)
            in_one_run = pages[used - 1] - pages[0] == used - 1 and all(
                pages[i + 1] - pages[i] == 1 for i in range(used - 1)
            )
            base = pages[0] * page if in_one_run else None
            slots += _slots(pages, base, start, end)
            self._parts.append((offset, count, end, base))
            offset += count
        self.tokens = offset
        self.places = [place for part in sequences for place in _places(part)]
        """Where the tokens are in their sequences: see rotary.Places."""
        self.adapted: list[tuple[str, int, int]] = []
        """Adapters, and to which of the batch's tokens each applies."""
        for sequence, (first, count, _, _) in zip(sequences, self._parts, strict=True):
            if sequence.adapter is not None:
                self.adapted.append((sequence.adapter, first, first + count))
        self._slots = torch.tensor(slots, device=store.device)
        self._indices: dict[tuple[int, int], torch.Tensor] = {}
        self._all_slots: torch.Tensor | None = None
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._groups: dict[int | None, _Group | None] = {}

    def write(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the batch's keys and values [1, kv_heads, N, head_dim] into their pages."""
        for store, new in zip(self.store.of(block), (keys, values), strict=True):
            store.index_copy_(1, self._slots, new[0])

    def attend(self, block: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
        """[1, N, heads, head_dim]: every query [1, heads, N, head_dim] over what its sequence has up to there."""
        keys, values = self.store.of(block)
        _, heads, tokens, size = query.shape
        # the heads that share keys stand as the queries of one head, see attention.causal
        single = query.view(keys.shape[0], -1, tokens, size).permute(2, 0, 1, 3)
        group = self._group(rule.window) if rule.plain else None
        if group is not None and len(group.members) == tokens:
            return group.attend(single, keys, values, rule).reshape(1, tokens, heads, size)
        whole = query.new_empty(tokens, *single.shape[1:])
        if group is not None:
            whole.index_copy_(0, group.rows, group.attend(single, keys, values, rule))
        for index, (offset, count, end, base) in enumerate(self._parts):
            if group is not None and index in group.members:
                continue
            tree = self.sequences[index].tree
            first = self._first(index, rule.window)
            if base is not None:
                key, value = (
                    keys[None, :, base + first : base + end],
                    values[None, :, base + first : base + end],
                )
            else:
                slots = self._gathered(index, end)[first:]
                key, value = keys.index_select(1, slots)[None], values.index_select(1, slots)[None]
            if count == 1 and tree is None and rule.plain:
                part = single[offset : offset + 1]
                attended = scaled_dot_product_attention(part, key, value, scale=rule.scaling)
                whole[offset : offset + 1] = attended
                continue
            part = query[:, :, offset : offset + count]
            if tree is None:
                attended = attention.causal(part, key, value, rule)
            else:
                attended = attention.masked(part, key, value, rule, self._mask(index, rule.window)[:, first:])
            whole[offset : offset + count] = attended.transpose(1, 2).reshape(count, keys.shape[0], -1, size)
        return whole.reshape(1, tokens, heads, size)

    def gather(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, kv_heads, K, head_dim] of all that the sequences have, one sequence after the other."""
        pair = self.store.of(block)
        if len(self._parts) == 1 and self._parts[0][3] is not None:
            _, _, end, base = self._parts[0]
            assert base is not None
            keys, values = (tensor[None, :, base : base + end] for tensor in pair)
            return keys, values
        if self._all_slots is None:
            self._all_slots = torch.cat(
                [self._gathered(index, end) for index, (_, _, end, _) in enumerate(self._parts)]
            )
        keys, values = (tensor.index_select(1, self._all_slots)[None] for tensor in pair)
        return keys, values

    def _first(self, index: int, window: int | None) -> int:
        """The first position that any of a sequence's queries sees."""
        if window is None:
            return 0
        _, count, end, _ = self._parts[index]
        tree = self.sequences[index].tree
        return max(0, (end - count if tree is None else tree.base) - window + 1)

    def _group(self, window: int | None) -> _Group | None:
        """The sequences for which copies of what they see cost less than calls of their own, if they are enough.

        The plan is made once for all blocks of the batch, and pays from about three on.
        """
        if window not in self._groups:
            self._groups[window] = self._find_group(window)
        return self._groups[window]

    def _find_group(self, window: int | None) -> _Group | None:
        most = min(defaults.GROUPED_TOKENS, defaults.GROUPED_BYTES // self.store.token_bytes)
        seen = [
            (index, end - self._first(index, window))
            for index, (_, count, end, _) in enumerate(self._parts)
            if count == 1 and self.sequences[index].tree is None
        ]
        seen = [(index, length) for index, length in seen if length <= most]
        if len(seen) < defaults.GROUPED_SEQUENCES:
            return None
        lengths = [length for _, length in seen]
        longest = max(lengths)
        slots: list[int] = []
        for index, length in seen:
            _, _, end, base = self._parts[index]
            slots += _slots(self.sequences[index].pages, base, end - length, end)
            slots += slots[-1:] * (longest - length)
        mask = None
        if min(lengths) < longest:
            mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
            mask = mask.to(self.store.device)
        return _Group(
            members=frozenset(index for index, _ in seen),
            rows=torch.tensor([self._parts[index][0] for index, _ in seen], device=self.store.device),
            slots=torch.tensor(slots, device=self.store.device),
            mask=mask,
        )

    def _mask(self, index: int, window: int | None) -> torch.Tensor:
        """bool [count, end]: what the nodes of a tree see of their sequence."""
        key = index, window
        if key not in self._masks:
            self._masks[key] = visible(self.sequences[index], window).to(self.store.device)
        return self._masks[key]

    def _gathered(self, index: int, end: int) -> torch.Tensor:
        """Slots of the first ``end`` tokens of a sequence."""
        key = index, end
        if key not in self._indices:
            pages = torch.tensor(self.sequences[index].pages, device=self.store.device)
            within = torch.arange(defaults.PAGE_TOKENS, device=self.store.device)
            self._indices[key] = (pages[:, None] * defaults.PAGE_TOKENS + within).flatten()[:end]
        return self._indices[key]


def visible(part: SequencePart, window: int | None = None) -> torch.Tensor:
    """bool [count, start + count]: True where a token of a part of a tree sees one of its sequence."""
    tree = part.tree
    assert tree is not None
    first, end = part.start - tree.base, part.start + part.count
    among = tree.visible()[first : first + part.count, : end - tree.base]
    allowed = torch.cat([torch.ones(part.count, tree.base, dtype=torch.bool), among], 1)
    if window is not None:
        key_at = torch.tensor([*range(tree.base), *tree.positions()])[:end]
        query_at = torch.tensor(part.positions())
        allowed &= key_at[None] > query_at[:, None] - window
    return allowed


def _slots(pages: Sequence[int], base: int | None, start: int, end: int) -> Sequence[int]:
    """Where the tokens ``start`` to ``end`` of a sequence lie, which is from ``base`` on if that is one run."""
    if base is not None:
        return range(base + start, base + end)
    return [_slot(pages, token) for token in range(start, end)]


def _slot(pages: Sequence[int], token: int) -> int:
    return pages[token // defaults.PAGE_TOKENS] * defaults.PAGE_TOKENS + token % defaults.PAGE_TOKENS


def _places(part: SequencePart) -> list[tuple[int, int, int]]:
    if part.tree is not None:  # each node as the step that it would be without the others
        return [(position, 1, position + 1) for position in part.positions()]
    return [(part.start, part.count, max(part.until, part.start + part.count))]
