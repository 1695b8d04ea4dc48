"""Each condition of readiness, judged from a state that somebody else filled."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import trio

from kwaainet_bridge.counting import Histogram
from kwaainet_bridge.errors import EngineError
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.net.reachability import Verdict
from kwaainet_bridge.node.announcing import AnnounceReport
from kwaainet_bridge.node.model_state import ModelState
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.watching import measure_lag, watch_engine
from kwaainet_bridge.wire.peer_id import PeerId

PEERS = [PeerId(b"\x12\x20" + bytes([n]) * 32) for n in range(5)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def report(state=ServerState.ONLINE, *, by_others=3, peers=1):
    told = {PEERS[n]: by_others for n in range(peers)}
    return AnnounceReport("petals", state, 3, 3, by_others, told, lifetime=360.0)


def serving(clock: Clock, *, bootstrap=1) -> NodeState:
    """A node that serves blocks, and is well."""
    state = NodeState(clock=clock)
    state.bootstrap = {"petals": SimpleNamespace(total=bootstrap, reached=set())}
    serve(state, "model")
    return state


def serve(state: NodeState, key: str) -> ModelState:
    model = state.add_model(key, ["petals"])
    model.served = SimpleNamespace(engine=SimpleNamespace(blocks=range(2, 5)))
    model.note_announced(report())
    model.enter(Phase.SERVING)
    return model


def only(state: NodeState) -> ModelState:
    (model,) = state.models.values()
    return model


def unmet(state: NodeState) -> dict[str, str]:
    return {c.name: c.reason for c in conditions(state) if not c.met}


def test_a_node_that_is_well():
    state = serving(Clock())
    assert is_ready(conditions(state))
    names = [c.name for c in conditions(state)]
    assert names == ["serving", "blocks", "engine", "reachable", "clock", "announced petals"]


def test_a_node_without_blocks_has_fewer():
    state = NodeState(clock=Clock())
    state.enter(Phase.SERVING)
    assert [c.name for c in conditions(state)] == ["serving", "reachable", "clock"]
    assert is_ready(conditions(state))


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.SERVING])
def test_other_phases_are_not_ready(phase):
    state = serving(Clock())
    state.enter(phase)
    assert unmet(state) == {"serving": f"{phase.value} for 0 s"}


def test_blocks_that_are_not_loaded():
    state = serving(Clock())
    only(state).served = None
    assert unmet(state)["blocks"] == "not loaded: serving"
    only(state).degrade("blocks", "no such file; tried again every 30 s")
    assert unmet(state)["blocks"] == "not loaded: no such file; tried again every 30 s"


@pytest.mark.parametrize("condition", ["engine", "reachable", "clock", "announced petals"])
def test_what_degrades_a_node_makes_it_unready_with_the_same_reason(condition):
    state = serving(Clock())
    of = state if condition in {"reachable", "clock"} else only(state)
    of.degrade(condition, "because")
    assert unmet(state) == {condition: "because"}
    of.recover(condition)
    assert is_ready(conditions(state))


def test_each_model_has_its_own_conditions():
    state = serving(Clock())
    other = serve(state, "other")
    assert is_ready(conditions(state))
    other.degrade("engine", "because")
    assert [(c.name, c.model, c.reason) for c in conditions(state) if not c.met] == [
        ("engine", "other", "because")
    ]
    assert [(model and model.key, name) for model, name, _ in state.degradations()] == [("other", "engine")]
    state.remove_model(other)
    assert is_ready(conditions(state))
    assert {c.model for c in conditions(state)} == {None, "model"}


def test_the_phase_of_a_node_follows_from_those_of_its_models():
    state = serving(Clock())
    first, other = only(state), serve(state, "other")
    for mine, others, expected in [
        (Phase.LOADING, Phase.SERVING, Phase.SERVING),
        (Phase.LOADING, Phase.DRAINING, Phase.DRAINING),
        (Phase.LOADING, Phase.LOADING, Phase.LOADING),
        (Phase.SERVING, Phase.LOADING, Phase.SERVING),
        (Phase.DRAINING, Phase.DRAINING, Phase.DRAINING),
    ]:
        first.enter(mine)
        other.enter(others)
        assert state.phase is expected
    with pytest.raises(ValueError, match="other is there already"):
        state.add_model("other", [])
    state.remove_model(other)
    assert state.phase is Phase.DRAINING
    state.remove_model(first)
    assert state.phase is Phase.SERVING


def test_other_degradations_do_not():
    state = serving(Clock())
    state.degrade("bootstrap petals", "none of 1 bootstrap peers is reached")
    state.degrade("averaging run", "nobody shares it")
    assert is_ready(conditions(state))


def test_announcements():
    clock = Clock()
    state = serving(clock)
    model = only(state)
    model.announced.clear()
    assert unmet(state) == {"announced petals": "nothing was announced yet"}
    for told, why in [
        (report(ServerState.JOINING), "JOINING"),
        (report(ServerState.OFFLINE), "OFFLINE"),
        (report(by_others=0, peers=0), "no other node was asked"),
        (report(by_others=0), "keeps 0"),
    ]:
        model.note_announced(told)
        assert why in unmet(state)["announced petals"]
    model.note_announced(report())
    clock.now += 360
    assert is_ready(conditions(state))
    clock.now += 1
    assert "expired" in unmet(state)["announced petals"]
    assert model.announced["petals"].rounds == 5
    assert model.announced["petals"].records == 15
    assert model.announced["petals"].by_others == 9


def test_the_first_node_of_a_swarm_keeps_its_records_itself():
    state = serving(Clock(), bootstrap=0)
    only(state).note_announced(report(by_others=0, peers=0))
    assert is_ready(conditions(state))


def test_the_reason_for_being_reachable_is_the_evidence():
    state = serving(Clock())
    state.judge(Verdict.PUBLIC, "2 of 3 got through")
    assert next(c.reason for c in conditions(state) if c.name == "reachable") == "public: 2 of 3 got through"


def test_the_clock_is_judged_by_most_bootstrap_peers():
    state = serving(Clock())
    first, second, third = PEERS[:3]
    state.hear_clock(first, -12.0)
    assert "1 of 1 bootstrap peers have another time, one is -12.0 s ahead" in unmet(state)["clock"]
    state.hear_clock(second, 0.0)  # one of both is wrong
    assert is_ready(conditions(state))
    state.hear_clock(third, -11.0)
    assert "2 of 3" in unmet(state)["clock"]
    state.hear_clock(first, 0.0)
    assert is_ready(conditions(state))


async def test_an_engine_is_checked_and_may_come_back(autojump_clock, nursery):
    state, hangs, failing = serving(trio.current_time), trio.Event(), [EngineError("the engine is closed")]
    stuck = [hangs]

    async def check() -> None:
        if stuck:
            await stuck[0].wait()
        if failing:
            raise failing[0]

    nursery.start_soon(watch_engine, check, only(state))
    await trio.sleep(29)
    assert is_ready(conditions(state))
    await trio.sleep(2)
    assert "no turn within 30 s" in unmet(state)["engine"]
    stuck.clear()
    await trio.sleep(10)
    assert "the engine is closed" in unmet(state)["engine"]
    failing.clear()
    only(state).note_announced(report())
    await trio.sleep(11)
    assert is_ready(conditions(state))


async def test_lag_is_what_passes_beyond_the_sleep(autojump_clock, nursery):
    lag = Histogram((0.1, 1.0))
    told = itertools.chain([0.0, 0.53, 1.0, 3.5], itertools.repeat(9.0))  # before and after each sleep
    nursery.start_soon(lambda: measure_lag(lag, period=0.5, clock=lambda: next(told)))
    await trio.sleep(1.1)
    assert lag.cumulative() == [(0.1, 1), (1.0, 1), (float("inf"), 2)]
    assert (round(lag.sum, 6), lag.largest) == (2.03, 2.0)


def test_histograms():
    histogram = Histogram((1.0, 2.0))
    assert histogram.quantile(0.5) == 0
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.observe(value)
    assert histogram.cumulative() == [(1.0, 2), (2.0, 3), (float("inf"), 4)]
    assert (histogram.count, histogram.sum, histogram.largest) == (4, 10.0, 7.0)
    assert histogram.quantile(0.5) == 1.0
    assert histogram.quantile(1.0) == 7.0
