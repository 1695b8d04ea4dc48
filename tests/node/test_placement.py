"""A node that chose its blocks looks again, and moves or stays: with fakes for engine and networks, in simulated time."""

from __future__ import annotations

import pytest
import trio
from placement_fakes import MIB, A, B, C, World, span
from structlog.testing import capture_logs
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.config import ModelConfig, parse_config
from kwaainet_bridge.errors import ConfigError, EngineError, NetworkError
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.moving import PLACEMENT
from kwaainet_bridge.node.state import Phase

HOUR = 3600.0
FIRST, SECOND = range(4), range(4, 8)
MOVED = [("JOINING", "0:4"), ("ONLINE", "0:4"), ("OFFLINE", "0:4"), ("ONLINE", "4:8"), ("OFFLINE", "4:8")]
STAYED = [("JOINING", "0:4"), ("ONLINE", "0:4"), ("OFFLINE", "0:4")]


async def moves_away(world: World) -> None:
    """Others come to serve the node's blocks; return once it drains them."""
    world.petals.others = [span(0, 4, A)]
    with trio.fail_after(HOUR):
        await world.state.wait_for(Phase.DRAINING)


async def test_it_moves_to_the_gap_and_both_networks_see_it(autojump_clock: MockClock) -> None:
    world = World()
    with capture_logs() as logs:
        async with world.running():
            assert world.blocks == FIRST  # nobody is there: it begins at the first block
            world.kwaainet.others = [span(0, 4, A)]
            await world.served(SECOND)
            assert world.state.facts["blocks"] == "4:8"
            assert world.petals.server is not None
            assert world.kwaainet.server is not None
            await trio.sleep(HOUR)  # and stays there
            assert world.blocks == SECOND
    assert world.events == ["load 0:4", "loaded 0:4", "load 4:8", "loaded 4:8", "close 0:4", "close 4:8"]
    assert world.petals.changes == world.kwaainet.changes == MOVED
    assert not world.state.degraded
    told = {entry["event"]: entry for entry in logs}
    why = told["other blocks are needed more"]
    assert (why["blocks"], why["needed"]) == ("0:4", "4:8")
    assert why["reason"].startswith("the weakest block has 0 of")
    assert told["the next blocks are loaded first"]["needed_mib"] == 500
    assert told["blocks stay"]["reason"] == "nobody else serves 4:8"
    phases = [entry["event"] for entry in logs if entry.get("event_kind") == "phase"]
    assert phases == ["loading", "serving", "draining", "serving", "draining"]


async def test_what_one_network_has_is_no_gap(autojump_clock: MockClock) -> None:
    world = World()
    async with world.running():
        world.petals.others, world.kwaainet.others = [span(0, 4, A)], [span(4, 8, B)]
        await trio.sleep(HOUR)
        assert world.blocks == FIRST
    assert world.events == ["load 0:4", "loaded 0:4", "close 0:4"]


async def test_a_small_gain_moves_nobody_and_nothing_is_loaded_again(autojump_clock: MockClock) -> None:
    world = World(rebalance_seconds=10)
    async with world.running():
        world.petals.others = [span(0, 4, A, 10.0), span(4, 8, B, 9.0)]
        with capture_logs() as logs:
            await trio.sleep(HOUR)
        assert world.petals.readings > 100
    assert world.events == ["load 0:4", "loaded 0:4", "close 0:4"]
    assert world.petals.changes == STAYED
    assert [entry["reason"] for entry in logs if entry["event"] == "blocks stay"] == [
        "the weakest block has 9 of 10 requests a second that are possible: enough"
    ]


@pytest.mark.parametrize("config", [{"rebalance_seconds": 0}, {"balance_quality": 0}, {"num_blocks": 8}])
async def test_where_nothing_can_come_of_it_nobody_looks(config, autojump_clock: MockClock) -> None:
    world = World(**config)
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await trio.sleep(HOUR)
    assert world.petals.readings == 1  # the first choice
    assert len(world.events) == 3


async def test_blocks_that_the_configuration_names_are_kept(autojump_clock: MockClock) -> None:
    world = World(blocks="0:4")
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await trio.sleep(HOUR)
    assert world.petals.readings == 0
    assert world.petals.changes == STAYED


async def test_it_stays_while_a_network_cannot_be_read_or_nobody_can_dial_it(
    autojump_clock: MockClock,
) -> None:
    world = World()
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        world.kwaainet.error = NetworkError("nobody is there")
        await trio.sleep(HOUR)
        assert world.blocks == FIRST
        world.kwaainet.error = None
        world.state.served.announcer.dialable = False
        readings = world.kwaainet.readings
        await trio.sleep(HOUR)
        assert (world.blocks, world.kwaainet.readings) == (FIRST, readings)
        world.state.served.announcer.dialable = True
        await world.served(SECOND)


async def test_looks_are_as_often_as_the_configuration_says(autojump_clock: MockClock) -> None:
    world = World(rebalance_seconds=30)
    async with world.running():
        await trio.sleep(10 * HOUR)
    assert world.petals.readings == pytest.approx(1200, rel=0.1)


@pytest.mark.parametrize("memory", [None, 0, 500 * MIB + defaults.MOVE_SPARE_BYTES - 1])
async def test_without_memory_for_both_the_old_blocks_are_dropped_first(
    memory, autojump_clock: MockClock
) -> None:
    world = World(memory=memory)
    with capture_logs() as logs:
        async with world.running():
            world.petals.others = [span(0, 4, A)]
            await world.served(SECOND)
    assert world.events == ["load 0:4", "loaded 0:4", "close 0:4", "load 4:8", "loaded 4:8", "close 4:8"]
    joined = [*MOVED[:3], ("JOINING", "4:8"), *MOVED[3:]]
    assert world.petals.changes == world.kwaainet.changes == joined
    phases = [entry["event"] for entry in logs if entry.get("event_kind") == "phase"]
    assert phases == ["loading", "serving", "draining", "loading", "serving", "draining"]
    assert any(entry["event"] == "the present blocks are dropped first" for entry in logs)


async def test_just_enough_memory_for_both(autojump_clock: MockClock) -> None:
    world = World(memory=500 * MIB + defaults.MOVE_SPARE_BYTES)
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await world.served(SECOND)
    assert world.events.index("load 4:8") < world.events.index("close 0:4")


async def test_blocks_that_do_not_load_leave_the_old_ones_serving_and_are_tried_less_and_less_often(
    autojump_clock: MockClock,
) -> None:
    world = World()
    world.broken.add(SECOND)
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await trio.sleep(20 * HOUR)
        assert world.blocks == FIRST
        assert world.state.phase is Phase.SERVING
        assert world.petals.server.accepting
        reason = world.state.degraded[PLACEMENT]
        assert reason == "the blocks 4:8 are needed more, but cannot be served here: no block 4"
        assert 10 < world.events.count("load 4:8") < 60
        assert world.petals.changes == STAYED[:2]
        world.broken.clear()
        await world.served(SECOND, within=3 * HOUR)
        assert PLACEMENT not in world.state.degraded


async def test_blocks_that_a_network_cannot_have_served_are_not_loaded(autojump_clock: MockClock) -> None:
    world = World()
    world.kwaainet.refuses = [SECOND]
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await trio.sleep(HOUR)
        assert world.blocks == FIRST
        reason = world.state.degraded[PLACEMENT]
        assert reason.endswith("cannot be served here: kwaainet has no use for 4:8")
    assert "load 4:8" not in world.events


async def test_a_node_that_failed_to_move_is_well_again_when_it_is_in_its_place(
    autojump_clock: MockClock,
) -> None:
    world = World()
    world.broken.add(SECOND)
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        while PLACEMENT not in world.state.degraded:
            await world.state.wait_changed()
        world.petals.others = [span(4, 8, A)]
        with trio.fail_after(3 * HOUR):
            while world.state.degraded:
                await world.state.wait_changed()
        assert world.blocks == FIRST


async def test_if_the_old_ones_are_gone_already_they_are_loaded_again(autojump_clock: MockClock) -> None:
    world = World(memory=None)
    world.broken.add(SECOND)
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        while PLACEMENT not in world.state.degraded:
            await world.state.wait_changed()
        await world.served(FIRST)
    tried = ["load 0:4", "loaded 0:4", "close 0:4", "load 4:8", "load 0:4", "loaded 0:4", "close 0:4"]
    assert world.events == tried
    assert world.petals.changes == [
        *STAYED,
        ("JOINING", "4:8"),
        ("OFFLINE", "4:8"),
        *STAYED,
    ]


async def test_if_those_do_not_load_either_the_node_ends(autojump_clock: MockClock) -> None:
    world = World(memory=None)

    async def run() -> None:
        async with world.running():
            world.broken |= {FIRST, SECOND}
            world.petals.others = [span(0, 4, A)]
            await trio.sleep_forever()

    with pytest.RaisesGroup(
        pytest.RaisesExc(EngineError, match="neither the blocks 4:8 nor 0:4 load any more: no block 0"),
        flatten_subgroups=True,
    ):
        await run()
    assert world.petals.changes[-1] == ("OFFLINE", "0:4")


async def test_blocks_that_others_took_meanwhile_are_left_to_them(autojump_clock: MockClock) -> None:
    world = World(rebalance_seconds=10)
    world.load_seconds = 100.0
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await world.until("load 4:8")
        world.petals.others = [span(0, 4, A), span(4, 8, B), span(4, 8, C)]
        await trio.sleep(HOUR)
        assert world.blocks == FIRST
    assert world.events == ["load 0:4", "loaded 0:4", "load 4:8", "loaded 4:8", "close 4:8", "close 0:4"]
    assert world.petals.changes == STAYED


async def test_sessions_have_their_time_before_their_blocks_go(autojump_clock: MockClock) -> None:
    world = World(drain_seconds=60)
    async with world.running():
        server = world.petals.server
        server.begin_sessions(2)
        await moves_away(world)
        began = trio.current_time()
        assert world.state.facts == {"sessions": 2, "moves_to": "4:8"}
        await trio.sleep(30)
        assert not server.accepting
        assert world.petals.changes[-1] == ("OFFLINE", "0:4")
        assert "close 0:4" not in world.events  # the sessions are served
        server.all_end()
        await world.served(SECOND)
        assert trio.current_time() - began < 32


async def test_sessions_that_do_not_end_are_cut_off(autojump_clock: MockClock) -> None:
    world = World(drain_seconds=60)
    async with world.running():
        world.kwaainet.server.begin_sessions(1)
        await moves_away(world)
        began = trio.current_time()
        with capture_logs() as logs:
            await world.served(SECOND)
        assert trio.current_time() - began == pytest.approx(60, abs=2)
    assert any(entry["event"] == "sessions are cut off" for entry in logs)


async def test_a_stop_while_the_next_blocks_are_loaded(autojump_clock: MockClock) -> None:
    world = World()
    world.load_seconds = 100.0
    async with world.running():
        world.petals.others = [span(0, 4, A)]
        await world.until("load 4:8")
        world.petals.server.begin_sessions(1)
        world.stop.set()
        with trio.fail_after(10):
            await world.state.wait_for(Phase.DRAINING)
        assert world.petals.server is not None  # the session goes on
    assert world.events == ["load 0:4", "loaded 0:4", "load 4:8", "cancelled 4:8", "close 0:4"]
    assert world.petals.changes == world.kwaainet.changes == STAYED


async def test_a_stop_while_the_old_blocks_are_drained(autojump_clock: MockClock) -> None:
    world = World(drain_seconds=60)
    async with world.running():
        world.petals.server.begin_sessions(1)
        await moves_away(world)
        began = trio.current_time()
        await trio.sleep(20)
        world.stop.set()
    assert trio.current_time() - began == pytest.approx(60, abs=1)
    # what was loaded for the move is closed, too
    assert world.events == ["load 0:4", "loaded 0:4", "load 4:8", "loaded 4:8", "close 0:4", "close 4:8"]
    assert world.petals.changes == STAYED


async def test_cancelled_while_nothing_is_loaded(autojump_clock: MockClock) -> None:
    world = World(memory=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.run, world.stop)
        await world.state.wait_for(Phase.SERVING)
        world.petals.others = [span(0, 4, A)]
        with trio.fail_after(HOUR):
            await world.state.wait_for(Phase.LOADING)
        await trio.sleep(1)
        assert world.petals.changes[-1] == ("JOINING", "4:8")
        nursery.cancel_scope.cancel()
    assert world.events[-2:] == ["load 4:8", "cancelled 4:8"]
    assert world.petals.changes[-1] == world.kwaainet.changes[-1] == ("OFFLINE", "4:8")


async def test_relayed_nodes_say_so_of_their_new_blocks(autojump_clock: MockClock) -> None:
    world = World()
    world.reachability.verdict = Verdict.RELAYED
    async with world.running():
        assert world.state.served.announcer.offer.using_relay
        world.petals.others = [span(0, 4, A)]
        await world.served(SECOND)
        offer = world.state.served.announcer.offer
        assert offer.using_relay
        assert offer.throughput.overall == 1.0
        assert offer.cache_tokens() == 100 * 1024


def test_the_configuration_of_it() -> None:
    def model(text: str) -> ModelConfig:
        config = parse_config(f"model: {{blocks: auto, num_blocks: 4{text}}}", "x").model
        assert config is not None
        return config

    assert (model("").rebalance_seconds, model("").balance_quality) == (60.0, 0.75)
    for off in ("off", '"off"', "0", "false"):
        assert model(f", rebalance_seconds: {off}").rebalance_seconds == 0
    assert model(", rebalance_seconds: 0.5, balance_quality: 1").balance_quality == 1
    for wrong in (
        "rebalance_seconds: -1",
        "rebalance_seconds: .inf",
        "balance_quality: 1.5",
        "rebalance_seconds: on",
    ):
        with pytest.raises(ConfigError, match=wrong.partition(":")[0]):
            model(f", {wrong}")
