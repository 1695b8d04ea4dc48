"""A service of blocks that pauses and resumes, in simulated time, without a model and without networks."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from placement_fakes import MIB, A, B, FakeReachability, World, span
from trio.testing import MockClock, wait_all_tasks_blocked

from kwaainet_bridge import defaults
from kwaainet_bridge.node.node_models import NodeModels
from kwaainet_bridge.node.pausing import Pausing
from kwaainet_bridge.node.phase import Phase, of_all
from kwaainet_bridge.node.state import NodeState

_PEERS = (A, B)


class PausedWorld(World):
    """The world of placements, with a node that can be paused."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"blocks": "0:4"} | more)
        self.pausing = self.node.pausing
        self.service = type(self.service)(
            self.config,
            self.networks,
            self.state,
            reachability=self.reachability,
            drain_seconds=60.0,
            load=self._load,
            memory=lambda _device: 10_000 * MIB,
            pausing=self.pausing,
        )

    async def paused(self) -> None:
        with trio.fail_after(3600):
            await self.state.wait_for(Phase.PAUSED)

    async def announced(self, state: str) -> None:
        """Return once both networks have been told so."""
        with trio.fail_after(3600):
            while any(network.changes[-1:] != [(state, "0:4")] for network in self.networks):  # noqa: ASYNC110
                await trio.sleep(0.05)  # the clock is simulated


async def test_records_go_and_come_back_and_the_engine_stays(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    async with world.running():
        await world.announced("ONLINE")
        world.pausing.ask("operator", "the operator has paused it")
        await world.paused()
        assert world.node.phase is Phase.PAUSED
        assert world.node.facts["reason"] == "the operator has paused it"
        await world.announced("OFFLINE")
        for network in world.networks:
            assert network.server is not None
            assert network.server.paused
        told = len(world.petals.rounds)
        await trio.sleep(10 * defaults.ANNOUNCE_PERIOD_SECONDS)
        assert len(world.petals.rounds) == told  # no record is renewed
        world.pausing.lift("operator")
        await world.announced("ONLINE")
        assert world.node.phase is Phase.SERVING
        assert world.petals.server is not None
        assert not world.petals.server.paused
        assert [e for e in world.events if "close" in e or "load" in e] == ["load 0:4", "loaded 0:4"]
    states = [state for state, _ in world.petals.changes]
    assert states == ["JOINING", "ONLINE", "OFFLINE", "ONLINE", "OFFLINE"]


async def test_sessions_go_on_unless_they_are_to_end(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    async with world.running():
        assert world.petals.server is not None
        world.petals.server.begin_sessions(3)
        world.pausing.ask("operator", "paused")
        await world.paused()
        assert world.node.facts["sessions"] == 3
        await trio.sleep(3600)
        assert world.petals.server.open_sessions == 3
        world.pausing.ask("operator", "paused", end_sessions=True)
        await wait_all_tasks_blocked()
        assert world.petals.server.open_sessions == 0
        world.pausing.lift()
        await world.state.wait_for(Phase.SERVING)
        world.petals.server.begin_sessions(1)  # the wish to end them has gone with the pause
        await trio.sleep(60)
        assert world.petals.server.open_sessions == 1
        world.petals.server.all_end()


async def test_a_paused_node_drains_what_it_still_has(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await world.state.wait_for(Phase.SERVING)
        assert world.petals.server is not None
        server = world.petals.server
        server.begin_sessions(1)
        world.pausing.ask("operator", "paused")
        await world.paused()
        world.stop.set()
        await world.state.wait_for(Phase.DRAINING)
        assert server.open_sessions == 1
        server.all_end()
    assert world.petals.changes[-1] == ("OFFLINE", "0:4")
    assert "close 0:4" in world.events


async def test_one_that_is_paused_while_it_loads_is_never_announced(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    world.pausing.ask("operator", "paused")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await world.paused()
        assert world.petals.rounds == []
        assert world.petals.server is not None
        assert world.petals.server.paused
        world.pausing.lift()
        await world.announced("ONLINE")
        world.stop.set()


async def test_a_pause_that_is_over_before_the_blocks_are_announced(autojump_clock: MockClock) -> None:
    world = PausedWorld()
    settling, settled = trio.Event(), trio.Event()

    async def settle() -> None:
        settling.set()
        await settled.wait()

    world.reachability.settle = settle  # type: ignore[method-assign]
    world.pausing.ask("operator", "paused")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await settling.wait()
        await trio.sleep(60)  # loaded
        assert world.petals.server is not None
        assert world.petals.server.paused
        world.pausing.lift()
        settled.set()
        await world.state.wait_for(Phase.SERVING)
        assert not world.petals.server.paused
        world.stop.set()


async def test_it_looks_for_no_better_blocks_and_gives_up_what_it_loads(autojump_clock: MockClock) -> None:
    world = PausedWorld(blocks="auto", num_blocks=4, rebalance_seconds=10.0)
    world.load_seconds = 600.0
    for network in world.networks:
        network.others = [span(0, 4, peer, 10.0) for peer in _PEERS]
    async with world.running():
        at_first = world.blocks
        assert at_first is not None
        other = range(4) if at_first.start else range(4, 8)
        for network in world.networks:
            network.others = [span(at_first.start, at_first.stop, peer, 10.0) for peer in _PEERS]
        await world.until(f"load {other.start}:{other.stop}")
        world.pausing.ask("operator", "paused")
        await world.paused()
        assert f"cancelled {other.start}:{other.stop}" in world.events
        readings = world.petals.readings
        await trio.sleep(3600)
        assert world.petals.readings == readings
        assert world.blocks == at_first
        world.pausing.lift()
        await world.served(other)


def test_several_may_ask_and_all_must_lift() -> None:
    pausing = Pausing()
    assert pausing.reason is None
    pausing.ask("operator", "by hand")
    pausing.ask("idle", "a game runs", end_sessions=True)
    assert pausing.reason == "by hand; a game runs"
    pausing.lift("idle")
    assert (pausing.reason, pausing.ends_sessions) == ("by hand", True)
    pausing.lift("nobody")
    assert pausing.asked
    pausing.lift("operator")
    assert (pausing.asked, pausing.ends_sessions) == (False, False)
    pausing.ask("operator", "by hand")
    pausing.ask("idle", "a game runs")
    pausing.lift()
    assert not pausing.asked


@pytest.mark.parametrize(
    ("phases", "paused", "phase"),
    [
        ([], False, Phase.SERVING),
        ([], True, Phase.PAUSED),
        ([Phase.SERVING, Phase.PAUSED], True, Phase.SERVING),
        ([Phase.PAUSED, Phase.DRAINING, Phase.LOADING], True, Phase.PAUSED),
        ([Phase.PAUSED, Phase.LOADING], True, Phase.PAUSED),
        ([Phase.LOADING], True, Phase.LOADING),
        ([Phase.DRAINING, Phase.LOADING], False, Phase.DRAINING),
    ],
)
def test_the_phase_of_a_node_follows_from_its_models(
    phases: list[Phase], *, paused: bool, phase: Phase
) -> None:
    assert of_all(phases, paused=paused) is phase


async def test_a_node_without_models_pauses_at_once(autojump_clock: MockClock) -> None:
    state, stop = NodeState(), trio.Event()
    models = NodeModels([], [], state, reachability=FakeReachability(), drain_seconds=60.0)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(models.run, stop)
        await state.wait_for(Phase.SERVING)
        state.pausing.ask("operator", "by hand")
        await state.wait_for(Phase.PAUSED)
        assert state.facts == {"reason": "by hand"}
        state.pausing.lift()
        await state.wait_for(Phase.SERVING)
        assert state.facts == {}
        state.pausing.ask("operator", "by hand")
        await state.wait_for(Phase.PAUSED)
        stop.set()
    assert state.phase is Phase.DRAINING
