"""Loading begins before the networks are joined, and is told of: in the log, in the status, and on a terminal."""

from __future__ import annotations

import io

import pytest
import trio
from placement_fakes import MIB, World
from rich.console import Console
from structlog.testing import capture_logs
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.run import _show_loading
from kwaainet_bridge.engine import LoadProgress
from kwaainet_bridge.errors import CheckpointError
from kwaainet_bridge.node.state import NodeState, Phase


class Joining:
    """The networks, which take their time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.cancelled = False

    async def __call__(self) -> None:
        try:
            await trio.sleep(self.seconds)
        except trio.Cancelled:
            self.cancelled = True
            raise


async def test_blocks_that_are_given_are_loaded_while_the_networks_are_joined(
    autojump_clock: MockClock,
) -> None:
    world = World(blocks="0:4", num_blocks=None)
    world.state.enter(Phase.BOOTSTRAPPING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.service.run(world.stop, join=Joining(12.0)))
        await world.until("loaded 0:4")
        assert trio.current_time() == 5.0
        assert world.state.phase is Phase.BOOTSTRAPPING
        assert world.state.loading is not None
        assert not world.petals.rounds  # nobody could have been told
        with trio.fail_after(60):
            await world.state.wait_for(Phase.SERVING)
        assert trio.current_time() < 13.0
        world.stop.set()
    # JOINING may begin in the same moment as ONLINE, whose records expire later and so count
    assert [change for change in world.petals.rounds if change[0] != "JOINING"] == [
        ("ONLINE", "0:4"),
        ("OFFLINE", "0:4"),
    ]


async def test_joining_is_announced_while_blocks_are_loaded(autojump_clock: MockClock) -> None:
    world = World(blocks="0:4", num_blocks=None)
    world.load_seconds = 1000.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.service.run(world.stop, join=Joining(12.0)))
        await trio.sleep(20)
        assert world.state.phase is Phase.LOADING
        assert world.petals.changes == world.kwaainet.changes == [("JOINING", "0:4")]
        assert world.events == ["load 0:4"]
        await trio.sleep(1000)
        world.stop.set()
    assert world.petals.changes == [("JOINING", "0:4"), ("ONLINE", "0:4"), ("OFFLINE", "0:4")]


async def test_blocks_that_are_chosen_wait_for_the_networks(autojump_clock: MockClock) -> None:
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.service.run(world.stop, join=Joining(12.0)))
        await trio.sleep(11)
        assert not world.events
        assert not world.petals.readings
        await world.until("loaded 0:4")
        assert 17.0 < trio.current_time() < 20.0
        world.stop.set()


async def test_a_model_that_cannot_be_loaded_ends_the_joining(autojump_clock: MockClock) -> None:
    world = World(blocks="0:4", num_blocks=None)
    world.broken = {range(4)}
    joining = Joining(1000.0)
    with pytest.RaisesGroup(CheckpointError, flatten_subgroups=True):
        await world.service.run(world.stop, join=joining)
    assert joining.cancelled
    assert trio.current_time() == 5.0


def progress(fetched: int, missing: int = 800 * MIB, *, blocks: int = 0) -> LoadProgress:
    return LoadProgress(blocks, 4, blocks * 100 * MIB, 400 * MIB, fetched, missing)


def test_the_log_tells_of_a_download_now_and_then() -> None:
    now = 0.0
    state = NodeState(clock=lambda: now).add_model("toy", [])
    with capture_logs() as logs:
        state.note_loading(progress(0, 0))  # nothing to fetch
        assert not logs
        for step in range(100):
            now = step / 10
            state.note_loading(progress(step * MIB))
    told = [entry for entry in logs if entry["event"] == "fetching weights"]
    assert {entry["model"] for entry in told} == {"toy"}
    assert [(entry["mib"], entry["of_mib"]) for entry in told] == [(0, 800), (50, 800)]
    assert state.loading == progress(99 * MIB)


async def shown(state: NodeState, steps: list[LoadProgress], *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show_loading, state, console)
        model = state.add_model("toy", [])
        for step in steps:
            model.note_loading(step)
            await trio.sleep(2 * defaults.DOWNLOAD_TELL_SECONDS)
        state.enter(Phase.SERVING)
    return out.getvalue()


async def test_a_terminal_shows_a_bar() -> None:
    state = NodeState()
    text = await shown(state, [progress(200 * MIB), progress(0, 0, blocks=2)], terminal=True)
    assert "fetching" in text
    assert "209.7/838.9 MB" in text
    assert "reading" in text
    assert "209.7/419.4 MB" in text


async def test_what_is_no_terminal_shows_none(autojump_clock: MockClock) -> None:
    assert not await shown(NodeState(), [progress(200 * MIB)], terminal=False)
