"""Steps with a tree of candidates: each node against the path to it alone, and what stays when a path is accepted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import BLOCKS as LLAMA_BLOCKS
from engine_support import HIDDEN, Reference, at_once, close
from family_models import BLOCKS, random_hidden, save
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig, Session
from kwaainet_bridge.engine.span import Span
from kwaainet_bridge.engine.tree import plant
from kwaainet_bridge.errors import AllocationFailed, InvalidRequest

ALL = range(BLOCKS)
FAMILIES = (
    "llama3.1",
    "mistral-narrow",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "phi3-longrope",
    "bloom",
    "falcon-40b",
    "falcon-rw",
)


def random_tree(rng: random.Random, nodes: int) -> list[int]:
    return [rng.randrange(-1, node) for node in range(nodes)]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def expected(
    whole: Reference, past: torch.Tensor, nodes: torch.Tensor, parents: Sequence[int]
) -> torch.Tensor:
    """[1, nodes, H]: the last output of each path after ``past``, alone."""
    paths = [path_to(parents, node) for node in range(len(parents))]
    return torch.cat([whole(torch.cat([past, nodes[:, path]], 1))[:, -1:] for path in paths], 1)


@pytest.mark.parametrize("name", FAMILIES)
async def test_each_node_is_computed_as_the_path_to_it_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, two sessions with trees and one without in the same batches, paths accepted and moved.

    Attention also in several pieces. Longrope models change their frequencies with the length: there within the first.
    """
    save(name, tmp_path)
    whole = Reference(tmp_path)
    rng = random.Random(name)
    steps = 2 if "longrope" in name else 5
    engine = await Engine.load(EngineConfig(str(tmp_path), max_length=128))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.aclose)
        one, two, plain = [
            await stack.enter_async_context(engine.open_session(ALL, 1, 128)) for _ in range(3)
        ]
        pasts = {session: random_hidden(1, count, seed=count) for session, count in ((one, 13), (two, 3))}
        monkeypatch.setattr(defaults, "MERGED_STEP_TOKENS", 0)
        monkeypatch.setattr(defaults, "PIECE_TOKENS", 5)
        for session, past in pasts.items():
            close(await session.step(past), whole(past), 2e-5)
        monkeypatch.undo()
        beside = random_hidden(1, 40, seed=9)
        accepted: dict[Session, list[int]] = {one: [], two: []}
        for step in range(steps):
            if step == 3:  # scores of a few queries at a time
                monkeypatch.setattr(defaults, "ATTENTION_SCORE_BYTES", 4 * 8 * 60 * 3)
            trees = {session: random_tree(rng, rng.choice((1, 4, 9))) for session in pasts}
            nodes = {s: random_hidden(1, len(tree), seed=step + s.position) for s, tree in trees.items()}
            works = [partial(s.step, nodes[s], tree=tree, accept=accepted[s]) for s, tree in trees.items()]
            *outputs, last = await at_once(engine, *works, partial(plain.step, beside[:, step : step + 1]))
            close(last, whole(beside[:, : step + 1])[:, -1:], 2e-5)
            for (session, tree), output in zip(trees.items(), outputs, strict=True):
                close(output, expected(whole, pasts[session], nodes[session], tree), 2e-5)
                assert session.position == pasts[session].shape[1]
                accepted[session] = path_to(tree, rng.randrange(-1, len(tree)))
                pasts[session] = torch.cat([pasts[session], nodes[session][:, accepted[session]]], 1)
        for session, past in pasts.items():
            more = random_hidden(1, 2, seed=77)
            output = await session.step(more, accept=accepted[session])
            close(output, whole(torch.cat([past, more], 1))[:, -2:], 2e-5)


@given(st.data())
def test_trees_and_paths(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, defaults.MAX_TREE_TOKENS))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(nodes)]
    tree = plant(parents, base=10, tokens=nodes)
    seen = tree.visible()
    for node in range(nodes):
        path = path_to(parents, node)
        assert tree.depths[node] == len(path) - 1
        assert seen[node].nonzero().flatten().tolist() == path
        assert tree.path(path) == tuple(path)
        slots = list(range(10 + nodes))
        for source, target in tree.moves(path):
            assert target < source  # in this order no source is overwritten before it is read
            slots[target] = source
        assert slots[10 : 10 + len(path)] == [10 + step for step in path]


@pytest.mark.parametrize(
    ("parents", "text"),
    [
        ([-1, 0], "a parent for each of the 3 tokens, got 2"),
        ([-1, 0, 2], "the parent of token 2 must be -1 or an earlier token of the step, got 2"),
        ([-1, -2, 0], "token 1 .* got -2"),
        ([-1, True, 0], "token 1 .* got True"),
        ([-1, 0.0, 0], "token 1 .* got 0.0"),
        ([-1, "0", 0], "token 1 .* got '0'"),
    ],
)
async def test_what_is_no_tree_is_refused(engine: Engine, parents: list[Any], text: str) -> None:
    async with engine.open_session(range(2), 1, 64) as session:
        with pytest.raises(InvalidRequest, match=text):
            await session.step(torch.randn(1, 3, HIDDEN), tree=parents)
        assert session.position == 0
        await session.step(torch.randn(1, 3, HIDDEN), tree=[-1, 0, 0])


async def test_trees_have_limits(engine: Engine) -> None:
    most = defaults.MAX_TREE_TOKENS
    async with engine.open_session(range(2), 1, most) as session:
        with pytest.raises(InvalidRequest, match=f"a tree may have {most} tokens, 100000 are more"):
            plant(range(-1, 99_999), base=0, tokens=100_000)
        await session.step(torch.randn(1, most, HIDDEN), tree=range(-1, most - 1))
        await session.step(torch.randn(1, most - 2, HIDDEN), accept=[0, 1])
        with pytest.raises(InvalidRequest, match="Maximum length exceeded"):
            await session.step(torch.randn(1, 1, HIDDEN), tree=[-1])
    async with engine.open_session(range(2), 2, 64) as session:
        with pytest.raises(InvalidRequest, match="a session of one sequence"):
            await session.step(torch.randn(2, 1, HIDDEN), tree=[-1])
    async with engine.open_session(range(2), 1, 64) as session:
        with pytest.raises(InvalidRequest, match="without prompts"):
            await session.step(torch.randn(1, 1, HIDDEN), torch.randn(2, 1, 1, HIDDEN), tree=[-1])


async def test_what_cannot_be_accepted_is_refused_and_the_tree_stays(
    engine: Engine, llama: Reference
) -> None:
    hidden = torch.randn(1, 6, HIDDEN)
    async with engine.open_session(range(LLAMA_BLOCKS), 1, 64) as session:
        await session.step(hidden[:, :2])
        with pytest.raises(InvalidRequest, match="the last step of this session had no tree"):
            await session.step(hidden[:, 2:3], accept=[0])
        await session.step(hidden[:, 2:5], tree=[-1, -1, 1])
        for accept, text in (
            ([3], r"numbers in 0\.\.2, got 3"),
            ([True], "got True"),
            (["1"], "got '1'"),
            ([2], "node 2 follows 1, not -1"),
            ([0, 1], "node 1 follows -1, not 0"),
        ):
            with pytest.raises(InvalidRequest, match=text):
                await session.step(hidden[:, 5:], accept=accept)
        with pytest.raises(InvalidRequest, match="must come with the tokens that follow"):
            await session.step(hidden[:, :0], accept=[1])
        with pytest.raises(InvalidRequest, match=r"start_from_position must be an integer in 0\.\.4"):
            await session.step(hidden[:, 5:], accept=[1, 2], start_from_position=5)
        output = await session.step(hidden[:, 5:], accept=[1, 2])
        close(output, llama(hidden[:, [0, 1, 3, 4, 5]])[:, -1:])
        assert session.position == 5


async def test_silence_accepts_nothing_and_going_back_comes_after(engine: Engine, llama: Reference) -> None:
    hidden = torch.randn(1, 9, HIDDEN)
    async with engine.open_session(range(LLAMA_BLOCKS), 1, 64) as session:
        await session.step(hidden[:, :2], tree=[-1, 0])
        close(await session.step(hidden[:, 2:5]), llama(hidden[:, 2:5]))
        assert session.position == 3
        await session.step(hidden[:, 5:8], tree=[-1, 0, 0])
        output = await session.step(hidden[:, 8:], accept=[0, 2], start_from_position=4)
        close(output, llama(hidden[:, [2, 3, 4, 5, 8]])[:, -1:])
        assert session.position == 5


async def test_a_path_is_moved_out_of_pages_that_the_step_no_longer_needs(
    llama_folder: Path, llama: Reference
) -> None:
    """Another session would take such a page at once, were it free before its tokens have been moved."""
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=128, max_length=128))
    try:
        hidden = torch.randn(1, 60, HIDDEN)
        other = torch.randn(1, 16, HIDDEN)
        async with engine.open_session(range(LLAMA_BLOCKS), 1, 80) as session:
            await session.step(hidden[:, :10])
            await session.step(hidden[:, 10:59], tree=[-1] * 49)
            async with engine.open_session(range(LLAMA_BLOCKS), 1, 16) as beside:
                ours, theirs = await at_once(
                    engine,
                    partial(beside.step, other),
                    partial(session.step, hidden[:, 59:], accept=[48]),
                )
            close(ours, llama(other))
            close(theirs, llama(hidden[:, [*range(10), 58, 59]])[:, -1:])
    finally:
        await engine.aclose()


async def test_a_tree_without_room_leaves_the_session_as_it_was(
    llama_folder: Path, llama: Reference, autojump_clock: object
) -> None:
    engine = await Engine.load(EngineConfig(str(llama_folder), cache_tokens=272, max_length=256))
    try:
        hidden = torch.randn(1, 200, HIDDEN)
        async with (
            engine.open_session(range(LLAMA_BLOCKS), 1, 256) as session,
            engine.open_session(range(LLAMA_BLOCKS), 1, 128),
        ):
            await session.step(hidden[:, :126])
            await session.step(hidden[:, 126:136], tree=range(-1, 9))
            with pytest.raises(AllocationFailed, match="out of memory"):
                await session.step(hidden[:, 136:], accept=range(10))
            output = await session.step(hidden[:, 136:138], accept=range(10))
            close(output, llama(hidden[:, :138])[:, -2:])
    finally:
        await engine.aclose()


@pytest.mark.parametrize("at", [0, BLOCKS - 1])
async def test_a_path_that_is_accepted_in_a_batch_that_fails_is_moved_once(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama3.1", tmp_path)
    whole = Reference(tmp_path)
    past, nodes, more, beside = (random_hidden(1, count, seed=count) for count in (7, 5, 2, 1))
    run = Span.run

    def fail(span: Span, block: int, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if block == at and hidden.shape[1] == 3:
            raise RuntimeError("together they do not run")
        return run(span, block, hidden, **kwargs)

    engine = await Engine.load(EngineConfig(str(tmp_path), max_length=64))
    async with (
        aclosing(engine),
        engine.open_session(range(BLOCKS), 1, 64) as one,
        engine.open_session(range(BLOCKS), 1, 64) as two,
    ):
        await one.step(past)
        await one.step(nodes, tree=[-1, -1, 1, 1, 3])
        monkeypatch.setattr(Span, "run", fail)
        path = [1, 3, 4]
        output, other = await at_once(engine, partial(one.step, more, accept=path), partial(two.step, beside))
        close(other, whole(beside))
        close(output, whole(torch.cat([past, nodes[:, path], more], 1))[:, -2:], 2e-5)
