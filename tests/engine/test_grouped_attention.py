"""Attention of many sequences of one new token: in one call it is what it is in a call for each."""

from __future__ import annotations

import random

import pytest
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import ragged
from kwaainet_bridge.engine.attention import Rule
from kwaainet_bridge.engine.ragged import PagedStore, RaggedBatch
from kwaainet_bridge.engine.step import SequencePart
from kwaainet_bridge.engine.tree import Tree

KV_HEADS, HEADS, SIZE = 2, 6, 8
PAGE = defaults.PAGE_TOKENS
PLAIN = Rule()


def make(lengths: list[tuple[int, int]], *, scattered: bool) -> tuple[PagedStore, list[SequencePart]]:
    """(tokens before, new tokens) of each sequence; what no sequence has in the store is not a number."""
    chance = random.Random(1)
    needed = [-(-(start + count) // PAGE) for start, count in lengths]
    pages = list(range(sum(needed) + 3))
    if scattered:
        chance.shuffle(pages)
    store = PagedStore(range(1), len(pages), (KV_HEADS, SIZE), torch.float32, torch.device("cpu"))
    store._storage.fill_(float("nan"))
    parts = []
    for (start, count), used in zip(lengths, needed, strict=True):
        mine, pages = pages[:used], pages[used:]
        parts.append(SequencePart(mine, start, count))
        for token in range(start + count):
            where = mine[token // PAGE] * PAGE + token % PAGE
            store._storage[:, :, :, where] = torch.randn(1, 2, KV_HEADS, SIZE)
    return store, parts


def both(
    store: PagedStore, parts: list[SequencePart], rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """As it is computed, one by one, and how many sequences were together."""
    tokens = sum(part.count for part in parts)
    query = torch.randn(1, HEADS, tokens, SIZE)
    batch = RaggedBatch(store, parts)
    together = batch.attend(0, query, rule)
    group = batch._group(rule.window) if rule.plain else None
    with monkeypatch.context() as patch:
        patch.setattr(defaults, "GROUPED_SEQUENCES", 1 << 30)
        alone = RaggedBatch(store, parts).attend(0, query, rule)
    return together, alone, 0 if group is None else len(group.members)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([(7, 1)] * 5, 5),
        ([(0, 1), (1, 1), (15, 1), (16, 1), (100, 1)], 5),
        ([(9, 1), (4, 3), (30, 1), (0, 5), (31, 1), (2, 1)], 4),
        ([(9, 1), (30, 1), (31, 1)], 0),
        ([(2, 2)] * 5, 0),
    ],
)
def test_together_as_alone(
    lengths: list[tuple[int, int]],
    expected: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
    *,
    scattered: bool,
) -> None:
    rule = Rule(window=window)
    together, alone, grouped = both(*make(lengths, scattered=scattered), rule, monkeypatch)
    torch.testing.assert_close(together, alone)
    assert grouped == expected


def test_long_sequences_keep_a_call_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where the window makes what they see short."""
    lengths = [(defaults.GROUPED_TOKENS, 1), *[(defaults.GROUPED_TOKENS - 1, 1)] * 4]
    store, parts = make(lengths, scattered=False)
    together, alone, grouped = both(store, parts, PLAIN, monkeypatch)
    torch.testing.assert_close(together, alone)
    assert grouped == 4
    assert both(store, parts, Rule(window=5), monkeypatch)[2] == 5
    monkeypatch.setattr(defaults, "GROUPED_BYTES", 10 * store.token_bytes)
    assert both(store, parts, PLAIN, monkeypatch)[2] == 0


def test_nodes_of_a_tree_and_rules_that_torch_has_not_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    store, parts = make([(9, 1)] * 4 + [(9, 1)], scattered=False)
    parts[2] = SequencePart(parts[2].pages, 9, 1, tree=Tree(9, (-1,), (0,)))
    together, alone, grouped = both(store, parts, PLAIN, monkeypatch)
    torch.testing.assert_close(together, alone)
    assert grouped == 4
    capped = Rule(softcap=5.0)
    together, alone, grouped = both(store, parts, capped, monkeypatch)
    torch.testing.assert_close(together, alone)
    assert grouped == 0


def test_the_plan_is_made_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    store, parts = make([(9, 1)] * 4, scattered=False)
    made = []
    group = ragged._Group

    def note(**fields: object) -> object:
        made.append(fields)
        return group(**fields)

    monkeypatch.setattr(ragged, "_Group", note)
    batch = RaggedBatch(store, parts)
    for _ in range(3):
        batch.attend(0, torch.randn(1, HEADS, 4, SIZE), PLAIN)
    assert len(made) == 1
