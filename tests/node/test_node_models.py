"""The models of one node, without real ones: what one does, the others do not feel."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from placement_fakes import MIB, MODEL, FakeEngine, FakeNetwork, FakeReachability
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig
from kwaainet_bridge.engine import LoadProgress
from kwaainet_bridge.errors import CheckpointError, ConfigError, EngineError
from kwaainet_bridge.node.node_models import NodeModels
from kwaainet_bridge.node.state import NodeState, Phase


def config(name: str, **more: Any) -> ModelConfig:
    return ModelConfig(**{"name": name, "dht_prefix": name, "blocks": "0:4", "throughput": 1.0} | more)


class Network(FakeNetwork):
    """One in which any number of models is served."""

    def publisher(self, config: ModelConfig, model: Any) -> FakeNetwork:  # noqa: ARG002
        self.of[config.name] = one = FakeNetwork(self.name, self.told, prefix=f"{config.name.lower()}-hf")
        return one

    def serve(self, config: ModelConfig, engine: Any, publisher: Any) -> Any:
        return publisher.serve(config, engine, publisher)

    @property
    def of(self) -> dict[str, FakeNetwork]:
        """What it knows of each model."""
        return self.__dict__.setdefault("_of", {})


class World:
    """A node in one network; ``broken`` has an error for each model that does not load."""

    def __init__(self, *names: str, memory: int | None = None, **more: Any) -> None:
        self.events: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.load_seconds: dict[str, float] = {}
        self.join_seconds = 0.0
        self.memory = memory
        self.network = Network("petals", self.events.append)
        self.state, self.stop = NodeState(), trio.Event()
        self.models = NodeModels(
            [config(name, **more) for name in names],
            [self.network],
            self.state,
            reachability=FakeReachability(),  # type: ignore[arg-type]
            drain_seconds=60.0,
            load=self._load,  # type: ignore[arg-type]
            memory=lambda _device: self.memory,
            rng=random.Random(1),
        )

    async def _load(self, config, *, progress, on_described, admit, **_more) -> FakeEngine:
        name = config.model
        self.events.append(f"load {name}")
        admit(MODEL, config.blocks, 400 * MIB, 100 * MIB)
        on_described(MODEL, config.blocks)
        progress(LoadProgress(0, 4, 0, 400 * MIB))
        await trio.sleep(self.load_seconds.get(name, 5.0))
        if name in self.broken:
            raise self.broken[name]
        return FakeEngine(config.blocks, lambda told: self.events.append(f"{told} of {name}"))

    async def _join(self) -> None:
        await trio.sleep(self.join_seconds)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await self.models.run(self.stop, join=self._join)

            self.state.enter(Phase.BOOTSTRAPPING)
            nursery.start_soon(run)
            yield
            self.stop.set()

    async def serving(self, *names: str) -> None:
        for name in names:
            with trio.fail_after(3600):
                await self.state.models[name].wait_for(Phase.SERVING)

    def server(self, name: str) -> Any:
        return self.network.of[name].server

    def announced(self, name: str) -> list[str]:
        """States of one model's records, one after the other."""
        return [state for state, _ in self.network.of[name].changes]


async def test_all_are_served_and_drained_together(autojump_clock: MockClock) -> None:
    world = World("one", "two")
    world.load_seconds["two"] = 60.0
    assert set(world.state.models) == {"one", "two"}
    async with world.running():
        await world.serving("one")
        assert world.state.phase is Phase.SERVING
        assert world.state.models["two"].phase is Phase.LOADING
        await world.serving("two")
        assert world.server("one").accepting
        assert [m.prefixes["petals"] for m in world.state.models.values()] == ["one-hf", "two-hf"]
    assert world.state.phase is Phase.DRAINING
    assert sorted(e for e in world.events if "close" in e) == ["close 0:4 of one", "close 0:4 of two"]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("no block 3"),
        EngineError("CUDA out of memory"),
        MemoryError(),
        ZeroDivisionError("a defect"),
    ],
)
async def test_one_that_fails_is_tried_again_while_the_others_serve(
    error: Exception, autojump_clock: MockClock
) -> None:
    world = World("good", "bad")
    world.broken["bad"] = error
    async with world.running():
        await world.serving("good")
        bad = world.state.models["bad"]
        while not bad.degraded:
            await bad.wait_changed()
        assert (str(error) or repr(error)) in bad.degraded["blocks"]
        assert bad.degraded["blocks"].endswith("tried again every 30 s")
        assert (world.state.phase, bad.phase) == (Phase.SERVING, Phase.LOADING)
        assert not world.state.models["good"].degraded
        await trio.sleep(600)
        # 30, 60, 120, 240 s and so on between two attempts
        assert 4 <= world.events.count("load bad") <= 6
        assert world.events.count("load good") == 1
        assert world.server("good").accepting
        del world.broken["bad"]
        await world.serving("bad")
        assert not bad.degraded


async def test_pauses_grow_up_to_a_limit(autojump_clock: MockClock) -> None:
    world = World("good", "bad")
    world.broken["bad"] = CheckpointError("no")
    async with world.running():
        await trio.sleep(24 * 3600)
        before = world.events.count("load bad")
        await trio.sleep(10 * defaults.MODEL_RETRY_MAX_SECONDS)
        assert 8 <= world.events.count("load bad") - before <= 14
        assert world.state.models["bad"].degraded["blocks"].endswith("tried again every 30 min")


async def test_one_that_fails_before_the_networks_are_joined(autojump_clock: MockClock) -> None:
    world = World("good", "bad")
    world.join_seconds, world.load_seconds["bad"] = 15.0, 1.0
    world.broken["bad"] = CheckpointError("no block 3")
    async with world.running():
        await trio.sleep(10)
        assert world.state.phase is Phase.BOOTSTRAPPING
        assert "no block 3" in world.state.models["bad"].degraded["blocks"]
        assert not world.network.rounds
        await world.serving("good")
        assert world.state.now > 15


async def test_the_only_one_must_load(autojump_clock: MockClock) -> None:
    world = World("bad")
    world.broken["bad"] = CheckpointError("no block 3")
    with pytest.raises(ExceptionGroup) as caught:
        await world.models.run(world.stop)
    assert caught.group_contains(CheckpointError, match="no block 3")


async def test_the_only_one_need_not_once_another_is_there(autojump_clock: MockClock) -> None:
    world = World("bad")
    world.broken["bad"] = CheckpointError("no block 3")
    async with world.running():
        await world.state.models["bad"].wait_for(Phase.LOADING)
        world.models.add(config("good"))
        await world.serving("good")
        while not world.state.models["bad"].degraded:
            await world.state.wait_changed()
        assert "no block 3" in world.state.models["bad"].degraded["blocks"]


async def test_models_come_and_go(autojump_clock: MockClock) -> None:
    world = World("one")
    async with world.running():
        await world.serving("one")
        world.server("one").begin_sessions(1)
        state = world.models.add(config("two"))
        with pytest.raises(ConfigError, match="two is served here already"):
            world.models.add(config("two"))
        with pytest.raises(ConfigError, match="would have the same names, one"):
            world.models.add(ModelConfig(name="other/one"))
        assert state.phase is Phase.STARTING
        await world.serving("two")
        two = world.server("two")
        two.begin_sessions(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.models.remove, "two")
            await state.wait_for(Phase.DRAINING)
            assert world.state.phase is Phase.SERVING
            await trio.sleep(30)
            assert not two.accepting
            assert world.server("one").accepting
            assert "close 0:4 of two" not in world.events
            two.all_end()
        assert world.events[-1] == "close 0:4 of two"
        assert set(world.state.models) == {"one"}
        assert world.announced("two") == ["JOINING", "ONLINE", "OFFLINE"]
        assert world.announced("one") == ["JOINING", "ONLINE"]
        with pytest.raises(ConfigError, match="no model two is served here, but one"):
            await world.models.remove("two")
        world.models.add(config("two"))
        await world.serving("two")
        world.server("one").all_end()
        for name in ("one", "two"):
            await world.models.remove(name)
        assert world.state.phase is Phase.SERVING  # as one without blocks
        assert not world.state.models
        with pytest.raises(ConfigError, match="but none"):
            await world.models.remove("two")
    with pytest.raises(ValueError, match="while the node runs"):
        world.models.add(config("three"))


@pytest.mark.parametrize("does", ["loads", "waits"])
async def test_one_that_does_not_serve_yet_is_removed_at_once(does: str, autojump_clock: MockClock) -> None:
    world = World("one", "two")
    world.load_seconds["two"] = 1000.0 if does == "loads" else 1.0
    world.broken["two"] = CheckpointError("no")
    async with world.running():
        await world.serving("one")
        began = trio.current_time()
        await world.models.remove("two")
        assert trio.current_time() - began < 1  # for the records
        assert set(world.state.models) == {"one"}
        assert world.announced("two")[-1] == "OFFLINE"


async def test_a_node_that_stops_waits_for_none_that_does_not_serve(autojump_clock: MockClock) -> None:
    world = World("one", "two", "three")
    world.load_seconds["two"] = 1000.0
    world.broken["three"] = CheckpointError("no")
    async with world.running():
        await world.serving("one")
        await trio.sleep(10)
        began = trio.current_time()
    assert trio.current_time() - began < 1


async def test_two_that_would_have_one_name(autojump_clock: MockClock) -> None:
    """Known only when both are described: prefixes derive from the family."""
    world = World("one")
    async with world.running():
        await world.serving("one")
        state = world.models.add(config("ONE"))
        while not state.degraded:
            await state.wait_changed()
        reason = world.state.models["ONE"].degraded["blocks"]
        assert reason.startswith("the blocks of ONE and of one would both be called one-hf in petals")
        assert "another dht_prefix" in reason
        await world.models.remove("one")
        await world.serving("ONE")


async def test_what_does_not_fit_into_memory_is_refused_with_numbers(autojump_clock: MockClock) -> None:
    # the first takes 400 MiB at once, and its KV cache page by page
    world = World("one", memory=1000 * MIB)
    async with world.running():
        await world.serving("one")
        world.memory = 600 * MIB - 1
        state = world.models.add(config("two", cache_tokens=256))
        while not state.degraded:
            await state.wait_changed()
        assert state.degraded["blocks"].startswith(
            "two: the blocks 0:4 need 500 MiB, 400 for weights as float32 and 100 for a KV cache of 256 tokens, and "
            "499 MiB are left on cpu: serve fewer blocks (blocks), lower cache_tokens, or make room; tried again"
        )
        assert "two" not in world.network.of
        world.memory = 600 * MIB
        await world.serving("two")


async def test_what_a_cache_has_taken_before_is_not_subtracted_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sessions have ended, and the memory stays with it."""
    world = World("one", memory=1000 * MIB)
    async with world.running():
        await world.serving("one")
        monkeypatch.setattr(FakeEngine, "cache_bytes_untaken", 30 * MIB)
        world.memory = 530 * MIB
        world.models.add(config("two"))
        await world.serving("two")


async def test_two_that_load_at_once_do_not_count_the_same_memory(autojump_clock: MockClock) -> None:
    world = World("one", "two", memory=999 * MIB)
    async with world.running():
        await trio.sleep(4)
        (refused,) = (model.degraded for model in world.state.models.values() if model.degraded)
        assert "499 MiB are left" in refused["blocks"]


async def test_where_nobody_tells_of_memory_all_are_loaded(autojump_clock: MockClock) -> None:
    world = World("one", "two", memory=None)
    async with world.running():
        await world.serving("one", "two")


async def test_networks_of_a_model() -> None:
    with pytest.raises(
        ConfigError, match="those in which this node has served blocks since its start are petals"
    ):
        World("one", networks=("kwaainet",))
