"""Every family that is served, against the whole model in transformers: in passes, sessions and batches of sessions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_support import Reference, at_once, close
from family_models import BLOCKS, CONFIGS, EXACT_IN_HALF, LONGROPE_CHANGES_AT, random_hidden, save
from safetensors.torch import load_file, save_file

from kwaainet_bridge import defaults
from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.engine.checkpoint import INDEX

ALL = range(BLOCKS)
ROWS = 2
LONG = 40


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, saved when it is first asked for."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            save(name, folders[name])
        return folders[name]

    return folder


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whole(family: str, family_folder: Callable[[str], Path]) -> Reference:
    return Reference(family_folder(family))


@pytest.fixture
async def served(family: str, family_folder: Callable[[str], Path]) -> AsyncIterator[Engine]:
    engine = await Engine.load(EngineConfig(str(family_folder(family)), max_length=64))
    yield engine
    await engine.aclose()


@pytest.fixture
def length(family: str) -> int:
    """What is decoded step by step: with longrope the whole model changes its mind about all tokens after some."""
    return LONGROPE_CHANGES_AT if "longrope" in family else LONG


async def test_each_block_and_its_gradient(whole: Reference, served: Engine) -> None:
    hidden = random_hidden(ROWS, LONG)
    inputs, outputs = whole.by_block(hidden)
    for block in ALL:
        close(await served.forward(inputs[block], range(block, block + 1)), outputs[block], 2e-5)
    prompts = random_hidden(BLOCKS, 3, seed=6)[:, None]
    close(await served.forward(hidden, ALL, prompts), whole(hidden, prompts), 2e-5)
    grad = random_hidden(ROWS, LONG, seed=7)
    with torch.enable_grad():
        variables = hidden.clone().requires_grad_(), prompts.expand(-1, ROWS, -1, -1).clone().requires_grad_()
        expected = torch.autograd.grad(whole(*variables), variables, grad)
    for ours, theirs in zip(await served.backward(hidden, grad, ALL, prompts), expected, strict=True):
        assert ours is not None
        close(ours, theirs, 1e-4)


async def test_attention_in_several_pieces(
    whole: Reference, served: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that do not fit at once, in passes and in sessions; windows shorter than a piece and longer ones."""
    monkeypatch.setattr(defaults, "ATTENTION_SCORE_BYTES", 8 * ROWS * 4 * 4 * LONG)
    monkeypatch.setattr(defaults, "WINDOWED_QUERIES", 9)
    hidden = random_hidden(ROWS, LONG)
    close(await served.forward(hidden, ALL), whole(hidden), 2e-5)
    variable = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(whole(variable), variable, hidden)
    close((await served.backward(hidden, hidden, ALL))[0], expected, 1e-4)
    monkeypatch.setattr(defaults, "MERGED_STEP_TOKENS", 0)
    async with served.open_session(ALL, ROWS, LONG) as session:
        close(await session.step(hidden), whole(hidden), 2e-5)


async def test_prompts_in_chunks_and_steps(
    whole: Reference, served: Engine, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = random_hidden(ROWS, length)
    expected = whole(hidden)
    async with served.open_session(ALL, ROWS, length) as session:
        outputs = [await session.step(part) for part in hidden.split([11, 1, 1, 9, 1, length - 23], 1)]
    close(torch.cat(outputs, 1), expected, 2e-5)
    monkeypatch.setattr(defaults, "MERGED_STEP_TOKENS", 0)
    monkeypatch.setattr(defaults, "PIECE_TOKENS", 20)
    hidden = random_hidden(ROWS, LONG)
    async with served.open_session(ALL, ROWS, LONG) as session:
        close(await session.step(hidden), whole(hidden), 2e-5)


async def test_going_back_and_reordering(whole: Reference, served: Engine, length: int) -> None:
    first, second = random_hidden(3, 20), random_hidden(3, length - 9, seed=6)
    async with served.open_session(ALL, 3, length) as session:
        await session.step(first)
        output = await session.step(second, hypo_ids=torch.tensor([2, 0, 0]), start_from_position=9)
        close(output, whole(torch.cat([first[[2, 0, 0], :9], second], 1))[:, 9:], 2e-5)


async def test_sessions_in_one_batch(whole: Reference, served: Engine, length: int) -> None:
    """Before the window is full and after, one row and several, one token and several."""
    rows, before, counts = (1, 2, 1), (2, 25, 14), ((1, 1, 1), (1, 4, 1), (3, 1, 2))
    inputs = [random_hidden(each, length, seed=each) for each in rows]
    expected = [whole(each) for each in inputs]
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(served.open_session(ALL, each, length)) for each in rows]
        for session, each, count in zip(sessions, inputs, before, strict=True):
            await session.step(each[:, :count])
        for count in counts:
            starts = [session.position for session in sessions]
            slices = [slice(start, start + c) for start, c in zip(starts, count, strict=True)]
            outputs = await at_once(
                served,
                *(partial(s.step, each[:, p]) for s, each, p in zip(sessions, inputs, slices, strict=True)),
            )
            for output, theirs, part in zip(outputs, expected, slices, strict=True):
                close(output, theirs[:, part], 2e-5)


async def test_numbers_that_are_none_stay_with_whoever_sends_them(whole: Reference, served: Engine) -> None:
    """In one batch with another session, and with another sequence of the same one; later ones see them, too."""
    hidden, other = random_hidden(1, 4, seed=1), random_hidden(4, 4, seed=2)
    other[:3, 1] = torch.tensor([math.nan, math.inf, 1e38])[:, None]
    async with (
        served.open_session(ALL, 1, 16, peer="a") as one,
        served.open_session(ALL, 4, 16, peer="b") as two,
    ):
        for at in range(4):
            here = slice(at, at + 1)
            output, beside = await at_once(
                served, partial(one.step, hidden[:, here]), partial(two.step, other[:, here])
            )
            close(output, whole(hidden)[:, here], 2e-5)
            close(beside[3:], whole(other[3:])[:, here], 2e-5)


@pytest.mark.parametrize("name", ["llama3.1", "mixtral", "qwen3-moe", "gpt-oss", "bloom", "falcon-7b"])
@pytest.mark.parametrize("bare", [False, True])
async def test_layouts_of_checkpoints(
    name: str, tmp_path: Path, family_folder: Callable[[str], Path], *, bare: bool
) -> None:
    """In many files, of which the last blocks need some; with and without the name of the model before all names."""
    save(name, tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    if bare:
        prefix = "transformer." if name in ("bloom", "falcon-7b") else "model."
        for file in set(index["weight_map"].values()):
            tensors = load_file(tmp_path / file)
            save_file({key.removeprefix(prefix): t for key, t in tensors.items()}, tmp_path / file)
        index["weight_map"] = {key.removeprefix(prefix): file for key, file in index["weight_map"].items()}
        (tmp_path / INDEX).write_text(json.dumps(index))
    needed = {file for key, file in index["weight_map"].items() if re.search(r"\b(layers|h)\.[12]\.", key)}
    unneeded = set(index["weight_map"].values()) - needed
    assert unneeded
    for file in unneeded:
        (tmp_path / file).unlink()
    engine = await Engine.load(EngineConfig(str(tmp_path), blocks=range(1, BLOCKS)))
    inputs, outputs = Reference(family_folder(name)).by_block(random_hidden(ROWS, 9))
    close(await engine.forward(inputs[1], range(1, BLOCKS)), outputs[-1], 2e-5)
    await engine.aclose()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_half_precision_of_each_family(
    family: str, whole: Reference, family_folder: Callable[[str], Path], dtype: torch.dtype
) -> None:
    engine = await Engine.load(EngineConfig(str(family_folder(family)), dtype=dtype))
    hidden = random_hidden(ROWS, 12)
    async with engine.open_session(ALL, ROWS, 12) as session:
        outputs = [await session.step(part) for part in hidden.split([10, 1, 1], 1)]
    output = torch.cat(outputs, 1)
    assert output.dtype == dtype
    assert output.isfinite().all()
    if family in EXACT_IN_HALF:
        close(output.float(), whole(hidden), 0.1)
    await engine.aclose()
