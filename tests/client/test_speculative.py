# ruff: noqa: F811
"""Generation with a draft: the same tokens in fewer steps, or in as many where servers take no trees."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from client_fakes import ToyServer, peer, random_hidden, toy_swarm
from test_client_end_to_end import (  # noqa: F401  # fixtures
    PROMPT,
    _one_thread,
    local_tokens,
    real_swarm,
    weights,
    whole,
)

from kwaainet_bridge.errors import InvalidRequest, TreesNotTaken
from kwaainet_bridge.hivemind.client import (
    Candidates,
    InferenceSession,
    LookupDraft,
    Sampling,
    generate,
    open_session,
)

NEW = 24


class SometimesRight:
    """Knows the text, and says the next few tokens of it, some of them wrong, with other guesses beside them."""

    def __init__(self, text: Sequence[int], *, seed: int = 3, right: float = 0.7) -> None:
        self._text = list(text)
        self._rng = random.Random(seed)
        self._right = right
        self.asked = 0

    def __call__(self, ids: torch.Tensor) -> Candidates:
        self.asked += 1
        tokens, parents, last = [], [], -1
        for token in self._text[ids.shape[1] : ids.shape[1] + 5]:
            tokens += [7, token if self._rng.random() < self._right else 9]
            parents += [last, last]
            last = len(tokens) - 1
        return Candidates(tuple(tokens), tuple(parents))


def counted(session: InferenceSession) -> list[int]:
    """How many tokens each step had."""
    sizes: list[int] = []
    run: Callable = session._run

    async def note(chunk, *args):
        sizes.append(chunk.tokens)
        return await run(chunk, *args)

    session._run = note
    return sizes


@pytest.mark.parametrize("push", [False, True])
async def test_two_servers_check_a_draft_that_is_right_sometimes(whole, weights, push: bool) -> None:
    (text,) = local_tokens(whole, PROMPT, NEW)
    draft = SometimesRight([*PROMPT[0].tolist(), *text])
    async with (
        real_swarm(range(4), range(4, 8)) as real,
        real.session(max_length=PROMPT.shape[1] + NEW, push=push) as session,
    ):
        sizes = counted(session)
        run = generate(weights, session, PROMPT, max_new_tokens=NEW, draft=draft)
        assert [token async for (token,) in run] == text
        assert len(sizes) < NEW * 2 / 3
        assert max(sizes[1:]) == 11
        assert session.position == PROMPT.shape[1] + NEW - 1


async def test_no_guess_and_wrong_guesses_change_nothing(whole, weights) -> None:
    (text,) = local_tokens(whole, PROMPT, 8)
    async with real_swarm(range(8)) as real:
        for draft in (lambda _ids: Candidates(), lambda _ids: Candidates.line([3, 3, 3])):
            async with real.session(max_length=64) as session:
                sizes = counted(session)
                run = generate(weights, session, PROMPT, max_new_tokens=8, draft=draft)
                assert [token async for (token,) in run] == text
                assert len(sizes) == 8


async def test_sampling_gives_what_it_gives_without_a_draft(whole, weights) -> None:
    sampling = Sampling(do_sample=True, temperature=0.8, top_k=20, repetition_penalty=1.2)
    async with real_swarm(range(8)) as real:
        runs: list[list[int]] = []
        for draft in (None, "text"):
            async with real.session(max_length=64) as session:
                known = SometimesRight([*PROMPT[0].tolist(), *runs[0]]) if draft else None
                run = generate(
                    weights, session, PROMPT, max_new_tokens=16, sampling=sampling, seed=4, draft=known
                )
                runs.append([token async for (token,) in run])
    assert runs[0] == runs[1]


async def test_an_end_within_the_guess_ends(whole, weights) -> None:
    (text,) = local_tokens(whole, PROMPT, 12)
    end = text[5]
    draft = SometimesRight([*PROMPT[0].tolist(), *text], right=1.0)
    async with real_swarm(range(8)) as real, real.session(max_length=64) as session:
        run = generate(weights, session, PROMPT, max_new_tokens=12, eos_token_ids=[end], draft=draft)
        assert [token async for (token,) in run] == text[: text.index(end) + 1]
        # and the conversation goes on in the same session
        ids = torch.cat([PROMPT, torch.tensor([[*text[: text.index(end) + 1], 8, 9]])], 1)
        more = [t async for (t,) in generate(weights, session, ids, max_new_tokens=6, draft=draft)]
        assert [more] == local_tokens(whole, ids, 6)


async def test_a_server_that_dies_amid_trees_changes_nothing(whole, weights) -> None:
    (text,) = local_tokens(whole, PROMPT, NEW)
    draft = SometimesRight([*PROMPT[0].tolist(), *text])
    async with real_swarm(range(4), range(4, 8), range(4, 8), rps=[100.0, 1000.0, 10.0]) as real:
        async with real.session(max_length=PROMPT.shape[1] + NEW) as session:
            tokens: list[int] = []
            async for (token,) in generate(weights, session, PROMPT, max_new_tokens=NEW, draft=draft):
                tokens.append(token)
                if len(tokens) == 8:
                    await session._parts[1]._stream._stream.reset()
                    real.network.down.add(peer(2))
            assert peer(3).short in session.chain[1]
        assert tokens == text


async def test_where_a_server_takes_no_trees_none_is_sent(
    whole,
    weights,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (text,) = local_tokens(whole, PROMPT, 8)
    draft = SometimesRight([*PROMPT[0].tolist(), *text], right=1.0)
    async with real_swarm(range(4), range(4, 8)) as real:
        real.swarm._traits.clear()
        async with real.session(max_length=64) as session:
            ask = real.swarm.traits

            async def stock(hop):
                traits = await ask(hop)
                if hop.blocks.start == 0:
                    return traits
                return type(traits)(traits.version, traits.inference, traits.training)

            real.swarm.traits = stock
            sizes = counted(session)
            with caplog.at_level(logging.INFO, "kwaainet_bridge"):
                run = generate(weights, session, PROMPT, max_new_tokens=8, draft=draft)
                assert [token async for (token,) in run] == text
            assert sizes == [PROMPT.shape[1], *[1] * 7]
    assert "the draft is not used: a server of the chain takes no tree steps" in caplog.text
    assert draft.asked == 0


async def test_a_session_refuses_trees_where_they_do_not_fit() -> None:
    async with toy_swarm() as toys:
        stock: ToyServer = toys.add(0, 4)
        async with open_session(toys.swarm, max_length=16) as session:
            assert await session.tree_tokens() == 0
            with pytest.raises(InvalidRequest, match="begins with a step without candidates"):
                await session.step_tree(random_hidden(1, 2, 4), [-1, 0])
            first = random_hidden(1, 3, 4)
            await session.step(first)
            assert await session.tree_tokens() == 0
            with pytest.raises(TreesNotTaken, match="takes trees of 0 tokens, not of 2"):
                await session.step_tree(random_hidden(1, 2, 4), [-1, 0])
            with pytest.raises(InvalidRequest, match="the parent of token 1"):
                await session.step_tree(random_hidden(1, 2, 4), [-1, 1])
            with pytest.raises(InvalidRequest, match="nothing can be accepted"):
                session.accept([0])
            more = random_hidden(1, 2, 4, seed=2)
            output = await session.step(more)
            torch.testing.assert_close(output, toys.reference(torch.cat([first, more], 1))[:, 3:])
        assert all(b"kwaainet_bridge_tree" not in request.metadata for request in stock.requests)
        async with open_session(toys.swarm, max_length=16, batch_size=2) as session:
            await session.step(random_hidden(2, 3, 4))
            with pytest.raises(InvalidRequest, match="one sequence"):
                await session.step_tree(random_hidden(2, 2, 4), [-1, 0])


async def test_a_draft_goes_with_one_sequence(weights) -> None:
    async with toy_swarm() as toys, open_session(toys.swarm, max_length=16, batch_size=2) as session:
        with pytest.raises(InvalidRequest, match="one sequence, not for 2"):
            generate(weights, session, PROMPT.repeat(2, 1), max_new_tokens=1, draft=LookupDraft())


def test_candidates_and_a_draft_from_the_text_itself() -> None:
    assert Candidates.line([4, 5, 6]).parents == (-1, 0, 1)
    assert Candidates((1, 2, 3), (-1, -1, 0)).first(2) == Candidates((1, 2), (-1, -1))
    for tokens, parents in (((1,), ()), ((1, 2), (-1, 1)), ((1,), (-2,))):
        with pytest.raises(InvalidRequest, match="needs a parent"):
            Candidates(tokens, parents)
    draft = LookupDraft(words=2, length=3)
    assert draft(torch.tensor([[1, 2, 3, 4, 9, 1, 2, 5, 6, 1, 2]])) == Candidates.line([5, 6, 1])
    assert draft(torch.tensor([[1, 2, 1, 2]])) == Candidates.line([1, 2])
    assert draft(torch.tensor([[1, 2, 3]])) == draft(torch.tensor([[1]])) == Candidates()
