"""One model shared by two processes, beside the same model in one."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import trio
from engine_support import at_once, close
from family_models import BLOCKS, WINDOW, random_hidden, save

from kwaainet_bridge.engine import Engine, EngineConfig
from kwaainet_bridge.errors import CheckpointError, ConfigError, EngineError

ALL = range(BLOCKS)


@asynccontextmanager
async def both(folder: Path, size: int = 2) -> AsyncIterator[tuple[Engine, Engine]]:
    """The model in one process, and in ``size``."""
    alone = await Engine.load(EngineConfig(str(folder), threads=1))
    async with aclosing(alone):
        shared = await Engine.load(EngineConfig(str(folder), threads=1, tensor_parallel=size))
        async with aclosing(shared):
            yield alone, shared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.1", "gpt-oss", "gemma3"])
async def test_two_processes_compute_what_one_does(name: str, tmp_path: Path) -> None:
    """Windows, sinks and experts among them: forward, backward, sessions in one batch, a prompt in pieces beside them."""
    save(name, tmp_path)
    async with both(tmp_path) as (alone, shared):
        hidden, gradient = random_hidden(2, WINDOW + 20), random_hidden(2, WINDOW + 20, 6)
        prompts = random_hidden(BLOCKS, 3, 7)[:, None]
        close(await shared.forward(hidden, ALL, prompts), await alone.forward(hidden, ALL, prompts))
        ours = await shared.backward(hidden, gradient, ALL, prompts)
        theirs = await alone.backward(hidden, gradient, ALL, prompts)
        for grad, expected in zip(ours, theirs, strict=True):
            assert grad is not None
            assert expected is not None
            close(grad, expected, 1e-4)
        outputs = []
        for engine in (alone, shared):
            async with (
                engine.open_session(ALL, 2, 200) as one,
                engine.open_session(ALL[1:], 1, 200) as two,
                engine.open_session(ALL, 1, 200) as three,
            ):
                found = [await one.step(hidden[:, :9]), await two.step(hidden[:1, :9])]
                found += await at_once(
                    engine,
                    lambda: one.step(hidden[:, 9:10], hypo_ids=torch.tensor([1, 0])),
                    lambda: two.step(hidden[:1, 9:12]),
                    lambda: three.step(random_hidden(1, 150)),
                )
                found.append(await one.step(hidden[:, 10:12], start_from_position=5))
                outputs.append(found)
        for expected, actual in zip(*outputs, strict=True):
            close(actual, expected)
        assert shared.cache_bytes_total == alone.cache_bytes_total == shared.cache_bytes_left
        await shared.check()


@pytest.mark.slow
async def test_work_that_is_given_up_between_pieces(tmp_path: Path) -> None:
    """The other process forgets it too, and what comes next is right."""
    save("llama3.1", tmp_path)
    async with both(tmp_path) as (alone, shared):
        hidden = random_hidden(1, 400)
        async with shared.open_session(ALL, 1, 800) as session, trio.open_nursery() as nursery:
            nursery.start_soon(session.step, hidden)
            while not shared._runner._serial:  # it has not begun
                await shared.check()  # a turn of the thread between two pieces
            nursery.cancel_scope.cancel()
        close(await shared.forward(hidden, ALL), await alone.forward(hidden, ALL))
        assert shared.cache_bytes_left == shared.cache_bytes_total


@pytest.mark.slow
async def test_a_process_that_dies_ends_the_work_and_is_told_of(tmp_path: Path) -> None:
    save("llama3.1", tmp_path)
    engine = await Engine.load(EngineConfig(str(tmp_path), threads=1, tensor_parallel=2))
    async with aclosing(engine):
        assert engine._loaded.followers is not None
        (process,) = engine._loaded.followers._processes
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(EngineError, match="2 processes that share the model no longer work together"):
            await engine.forward(random_hidden(1, 4), ALL)
        with pytest.raises(EngineError, match="loaded anew"):
            await engine.check()
        async with engine.open_session(ALL, 1, 8) as session:
            with pytest.raises(EngineError, match="one has ended"):
                await session.step(random_hidden(1, 1))


@pytest.mark.slow
async def test_a_process_that_cannot_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama3.1", tmp_path)
    monkeypatch.setattr("kwaainet_bridge.engine.parallel.follow", no_follower)
    with pytest.raises(
        CheckpointError, match="process with share 1 of the model cannot go on: no such weights"
    ):
        await Engine.load(EngineConfig(str(tmp_path), threads=1, tensor_parallel=2))


def no_follower(pipe: Connection, *_: object) -> None:
    pipe.send_bytes(pickle.dumps("no such weights"))


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        (
            "llama3.1",
            3,
            "8 heads and 2 of keys cannot be split over 3 processes: tensor_parallel must divide both",
        ),
        ("bloom", 2, "has no tensor-parallel plan in transformers: leave out tensor_parallel"),
    ],
)
async def test_what_cannot_be_split_is_refused(name: str, size: int, reason: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        await Engine.load(EngineConfig(str(tmp_path), tensor_parallel=size))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        EngineConfig("model", tensor_parallel=0)
    with pytest.raises(ConfigError, match="give cuda for a device, not cuda:1"):
        EngineConfig("model", tensor_parallel=2, device="cuda:1")
    config = EngineConfig("model", tensor_parallel=2, device="cuda")
    assert [config.device_of(rank) for rank in range(2)] == ["cuda:0", "cuda:1"]
