from __future__ import annotations

import threading

import pytest
import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import InvalidRequest
from kwaainet_bridge.hivemind.client import GREEDY, Sampling, generate

VOCABULARY = 11


class ToyWeights:
    """A random table of scores by token: what comes next depends on the last token only."""

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
        self.threads: set[str] = set()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        return torch.nn.functional.one_hot(ids, VOCABULARY).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        return hidden @ self.table


class EchoSession:
    gives_scores = False

    def __init__(self) -> None:
        self.position = 0
        self.sizes: list[int] = []

    async def step(self, hidden: torch.Tensor, *, ids: torch.Tensor) -> torch.Tensor:
        assert ids.shape == hidden.shape[:2]
        await trio.lowlevel.checkpoint()
        self.position += hidden.shape[1]
        self.sizes.append(hidden.shape[1])
        return hidden


async def collect(ids, n: int, session=None, weights=None, **options) -> list[list[int]]:
    session, weights = session or EchoSession(), weights or ToyWeights()
    return [t async for t in generate(weights, session, torch.tensor(ids), max_new_tokens=n, **options)]


def follow(token: int, n: int) -> list[int]:
    table, tokens = ToyWeights().table, []
    for _ in range(n):
        token = int(table[token].argmax())
        tokens.append(token)
    return tokens


async def test_greedy_takes_the_likeliest_token_each_time() -> None:
    session, weights = EchoSession(), ToyWeights()
    assert await collect([[4, 2]], 6, session, weights) == [[t] for t in follow(2, 6)]
    assert session.sizes == [2, 1, 1, 1, 1, 1]
    assert threading.current_thread().name not in weights.threads


async def test_a_batch_goes_on_until_all_have_ended() -> None:
    first, second = follow(0, 8), follow(5, 8)
    out = await collect([[0], [5]], 8)
    assert out == [[a, b] for a, b in zip(first, second, strict=True)]
    end = first[0]
    out = await collect([[0], [5]], 8, eos_token_ids=[end])
    assert [row[0] for row in out] == [end] * len(out)
    column = [row[1] for row in out]
    assert column == second[: len(column)]
    assert end not in column[:-1]


async def test_ends_with_any_of_the_end_tokens() -> None:
    path = follow(2, 8)
    out = await collect([[2]], 8, eos_token_ids={path[2], 99})
    assert [t for (t,) in out] == path[: path.index(path[2]) + 1]


async def test_no_tokens_wanted_is_no_work() -> None:
    session = EchoSession()
    assert await collect([[1]], 0, session) == []
    assert session.sizes == []


async def test_long_prompts_are_read_in_several_steps(monkeypatch) -> None:
    monkeypatch.setattr(defaults, "PREFILL_TOKENS", 8)
    session = EchoSession()
    await collect([[1] * 11, [2] * 11], 2, session)
    assert session.sizes == [4, 4, 3, 1]


async def test_a_conversation_goes_on_in_the_same_session() -> None:
    session = EchoSession()
    first = [t for (t,) in await collect([[4, 2]], 3, session)]
    longer = [4, 2, *first, 7]
    assert [t for (t,) in await collect([longer], 2, session)] == follow(7, 2)
    # the last token of the first answer had not been run yet
    assert session.sizes == [2, 1, 1, 2, 1]


async def test_a_seed_makes_sampling_repeatable() -> None:
    warm = Sampling(do_sample=True, temperature=1.5)
    runs = [await collect([[4]], 20, sampling=warm, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert await collect([[4]], 20, sampling=warm) != await collect([[4]], 20, sampling=warm)


async def test_top_k_1_and_a_tiny_top_p_are_greedy() -> None:
    for sampling in (Sampling(do_sample=True, top_k=1), Sampling(do_sample=True, top_p=1e-6)):
        assert [t for (t,) in await collect([[4]], 6, sampling=sampling)] == follow(4, 6)


async def test_repetition_penalty_counts_the_prompt() -> None:
    out = [t for (t,) in await collect([[4]], 5, sampling=Sampling(repetition_penalty=1e6))]
    assert len({4, *out}) == 6


async def test_samples_follow_the_temperature() -> None:
    scores = ToyWeights().table[4] / 0.5
    wanted = torch.softmax(scores, dim=-1)
    sampling = Sampling(do_sample=True, temperature=0.5)
    out = await collect([[4]] * 4000, 1, sampling=sampling, seed=0)
    counts = torch.bincount(torch.tensor(out[0]), minlength=VOCABULARY) / 4000
    torch.testing.assert_close(counts, wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_settings_without_meaning_are_refused(options, text) -> None:
    with pytest.raises(InvalidRequest, match=text):
        Sampling(**options)


def test_greedy_ignores_what_only_sampling_uses() -> None:
    assert len(Sampling(temperature=0.5, top_k=5, top_p=0.5).processors()) == 0
    assert len(GREEDY.processors()) == 0


@pytest.mark.parametrize("ids", [[1, 2], [[1.0]], [[]], [[1, 2]]])
async def test_ids_without_a_new_token_are_refused(ids) -> None:
    session = EchoSession()
    session.position = 2
    with pytest.raises(InvalidRequest, match="more than the 2 tokens"):
        await collect(ids, 1, session)


async def test_a_cancelled_token_is_given_by_the_next_call(autojump_clock) -> None:
    class SlowSession(EchoSession):
        async def step(self, hidden: torch.Tensor, *, ids: torch.Tensor) -> torch.Tensor:
            await trio.sleep(1)
            return await super().step(hidden, ids=ids)

    run = generate(ToyWeights(), SlowSession(), torch.tensor([[4, 2]]), max_new_tokens=3)
    tokens = [await anext(run)]
    with trio.move_on_after(0.5) as scope:
        await anext(run)
    assert scope.cancelled_caught
    tokens += [step async for step in run]
    assert tokens == [[t] for t in follow(2, 3)]


async def test_a_run_may_be_left_and_a_token_lost_between_step_and_choice_comes_back() -> None:
    weights, session = ToyWeights(), EchoSession()
    choose = weights.logits
    run = generate(weights, session, torch.tensor([[4, 2]]), max_new_tokens=3)

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    weights.logits = fail
    with pytest.raises(MemoryError):
        await anext(run)
    weights.logits = choose
    assert [await anext(run)] == [[t] for t in follow(2, 1)]
    assert session.sizes == [2]
