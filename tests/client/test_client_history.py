from __future__ import annotations

import torch
from client_fakes import random_hidden

from kwaainet_bridge.hivemind.client.history import Chunk, History


def whole(chunks) -> torch.Tensor:
    return torch.cat([chunk.hidden for chunk in chunks], dim=1)


def test_pieces_join_small_steps_and_split_large_ones() -> None:
    hidden = random_hidden(1, 12, 2)
    history = History(Chunk(part) for part in hidden.split([7, 1, 1, 1, 2], dim=1))
    assert history.tokens == 12
    for size in (1, 2, 3, 5, 7, 12, 100):
        pieces = list(history.pieces(size))
        assert [p.tokens for p in pieces] == [len(s) for s in torch.arange(12).split(size)]
        torch.testing.assert_close(whole(pieces), hidden)


def test_a_piece_begins_where_prompts_do() -> None:
    hidden, prompts = random_hidden(1, 10, 2), random_hidden(3, 1, 4, 2)
    parts = hidden.split([2, 5, 3], dim=1)
    history = History([Chunk(parts[0]), Chunk(parts[1], prompts), Chunk(parts[2])])
    pieces = list(history.pieces(6))
    assert [(p.tokens, p.prompts is prompts) for p in pieces] == [(2, False), (6, True), (2, False)]
    torch.testing.assert_close(whole(pieces), hidden)
    # a prefix is never cut
    assert [p.tokens for p in history.pieces(3)] == [2, 4, 3, 1]


def test_truncation_cuts_prompts_too() -> None:
    hidden, prompts = random_hidden(1, 6, 2), random_hidden(3, 1, 4, 2)
    history = History([Chunk(hidden[:, :1]), Chunk(hidden[:, 1:], prompts)])
    history.truncate(3)
    assert history.tokens == 3
    (first, second) = history.pieces(10)
    assert first.tokens == 1
    torch.testing.assert_close(second.prompts, prompts[:, :, :2])
    history.truncate(1)
    assert [p.tokens for p in history.pieces(10)] == [1]
    history.truncate(0)
    assert list(history.pieces(10)) == []


def test_reordering_takes_rows_of_tokens_and_prompts() -> None:
    hidden, prompts = random_hidden(3, 4, 2), random_hidden(2, 3, 2, 2)
    shared = random_hidden(2, 1, 2, 2, seed=1)
    history = History([Chunk(hidden[:, :2], prompts), Chunk(hidden[:, 2:], shared)])
    order = torch.tensor([2, 0, 0])
    history.reorder(order)
    first, second = history.pieces(10)
    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], dim=1), hidden[order])
    torch.testing.assert_close(first.prompts, prompts[:, order])
    torch.testing.assert_close(second.prompts, shared)


def test_empty_steps_leave_no_trace() -> None:
    history = History([Chunk(random_hidden(1, 0, 2))])
    history.append(Chunk(random_hidden(1, 0, 2)))
    assert history.tokens == 0
    assert list(history.pieces(4)) == []
