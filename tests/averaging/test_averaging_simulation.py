"""Many averagers meet in simulated time, again and again: who averages, what it costs, and how soon all agree."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.averaging_network import Delays
from bench.averaging_simulation import (
    DELAYS,
    Round,
    Setup,
    Simulation,
    contraction,
    grid_rounds,
    picture,
    rounds_needed,
    rounds_to_consensus,
    simulate,
)

ROOT = Path(__file__).resolve().parents[2]
FAR = Delays(0.02, 0.2)


def check_groups(simulation: Simulation) -> None:
    """Members agree on their group, are in one at a time, and whoever is listed and lives takes part."""
    busy: dict[object, list[tuple[float, float]]] = {}
    assert simulation.groups
    for group_id, begun in simulation.groups.items():
        (group,) = {group for group, _, _ in begun.values()}
        assert group.group_id == group_id
        assert 2 <= len(group.members) <= simulation.setup.group
        living = {member for member in group.members if simulation.peers[member].alive}
        assert living <= set(begun) <= set(group.members)
        for member, (_, began, ended) in begun.items():
            assert began < ended
            busy.setdefault(member, []).append((began, ended))
    for spans in busy.values():
        spans.sort()
        assert all(former[1] < latter[0] for former, latter in itertools.pairwise(spans))


def check_rounds(simulation: Simulation, rounds: list[Round]) -> None:
    """Nobody is stuck, and nobody is alone who could have met somebody; nobody is asked without end."""
    setup = simulation.setup
    for peer in simulation.alive:
        assert not peer.is_busy
        assert peer.look is not None
        assert peer.look.ended is not None
        assert peer.look.ended <= peer.look.deadline + 0.01
        assert peer.look.asks < 2 * setup.group  # each that declared at its key, once
    for row in rounds:
        assert row.stranded == 0
        assert row.messages < 8
        assert row.most_messages < 4 * setup.group
        assert row.reads < 10
        assert row.writes < 4


@pytest.mark.parametrize("delays", [DELAYS, FAR])
def test_a_grid_agrees_in_as_many_rounds_as_it_has_dimensions(delays: Delays) -> None:
    simulation, rounds = simulate(Setup(peers=64, group=8, rounds=3, delays=delays))
    check_groups(simulation)
    check_rounds(simulation, rounds)
    for row in rounds:
        assert row.averaged == 1.0
        assert row.sizes == (8,) * 8
        assert row.after_declared < 0  # full groups do not wait
    assert rounds_to_consensus(rounds) == grid_rounds(simulation.setup) == 2
    assert rounds[0].variance == pytest.approx(contraction(64, 8), rel=0.5)


def test_clocks_that_differ_by_a_second_each_way_cost_nothing() -> None:
    simulation, rounds = simulate(Setup(peers=64, group=8, rounds=2, delays=FAR, skew=1.0))
    check_groups(simulation)
    check_rounds(simulation, rounds)
    assert [row.averaged for row in rounds] == [1.0, 1.0]


def test_at_random_keys_only_who_is_one_too_many_averages_with_nobody() -> None:
    setup = Setup(peers=64, group=8, random_bits=True)
    simulation, rounds = Simulation(setup), []
    for _ in range(8):
        keys = [peer.machine.key for peer in simulation.alive]
        one_too_many = sum(keys.count(key) % setup.group == 1 for key in set(keys))
        row = simulation.round()
        assert row.without <= one_too_many
        rounds.append(row)
    check_groups(simulation)
    check_rounds(simulation, rounds)
    assert sum(row.averaged for row in rounds) / len(rounds) >= 0.95
    needed = rounds_to_consensus(rounds)
    assert needed is not None
    assert needed <= rounds_needed(contraction(64, 8)) + 1


@pytest.mark.parametrize(("delays", "seed"), [(DELAYS, 1), (FAR, 2)])
def test_a_tenth_of_the_peers_may_die_in_every_round(delays: Delays, seed: int) -> None:
    simulation, rounds = simulate(Setup(peers=64, group=8, churn=0.1, rounds=10, delays=delays, seed=seed))
    check_groups(simulation)
    check_rounds(simulation, rounds)
    for row in rounds:
        assert row.alive == 64
        assert row.survivors == 58
        assert row.averaged >= 0.9
        assert row.unaveraged <= 0.2
    assert sum(row.averaged for row in rounds) / len(rounds) >= 0.95
    needed = rounds_to_consensus(rounds)
    assert needed is not None
    assert needed <= rounds_needed(max(row.expected for row in rounds))
    assert picture(rounds).count("\n") == 9


def test_a_seed_gives_the_same_rounds_again_and_another_one_others() -> None:
    setup = Setup(peers=32, group=4, churn=0.2, rounds=3, seed=5)
    rounds = simulate(setup)[1]
    assert simulate(setup)[1] == rounds
    assert simulate(Setup(peers=32, group=4, churn=0.2, rounds=3, seed=6))[1] != rounds


def test_what_theory_expects() -> None:
    assert contraction(256, 16) == pytest.approx(15 / 256 + 16 / 65536)
    assert contraction(256, 16) == pytest.approx(15 / 255, rel=1e-3)  # exact for random groups of equal size
    assert rounds_needed(contraction(256, 16)) == 5
    assert contraction(256, 1) == pytest.approx(0, abs=1e-4)
    assert grid_rounds(Setup(peers=1024, group=16)) == 3
    with pytest.raises(ValueError, match="power of two"):
        Setup(peers=64, group=6)
    with pytest.raises(ValueError, match="in order"):
        Delays(0.2, 0.1)


# --- 256 peers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("delays", [DELAYS, FAR])
def test_256_peers_agree_in_two_rounds(delays: Delays) -> None:
    simulation, rounds = simulate(Setup(rounds=3, delays=delays))
    check_groups(simulation)
    check_rounds(simulation, rounds)
    assert all(row.averaged == 1.0 and row.sizes == (16,) * 16 for row in rounds)
    assert rounds_to_consensus(rounds) == 2


@pytest.mark.slow
@pytest.mark.parametrize("delays", [DELAYS, FAR])
@pytest.mark.parametrize("seed", [1, 2])
def test_256_peers_of_which_a_tenth_dies_in_every_round(delays: Delays, seed: int) -> None:
    simulation, rounds = simulate(Setup(churn=0.1, rounds=8, delays=delays, seed=seed))
    check_groups(simulation)
    check_rounds(simulation, rounds)
    assert all(row.averaged >= 0.96 for row in rounds)
    assert sum(row.averaged for row in rounds) / len(rounds) >= 0.98
    assert max(row.unaveraged for row in rounds) <= 0.12
    needed = rounds_to_consensus(rounds)
    assert needed is not None
    assert needed <= rounds_needed(contraction(256, 16)) + 2


@pytest.mark.slow
def test_the_command_prints_the_same_whatever_the_order_of_sets(tmp_path: Path) -> None:
    options = ["--peers", "32", "--group", "4", "--rounds", "3", "--seed", "1", "2", "--output"]
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "bench.averaging_simulation", *options, tmp_path / "figures.json"],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=200,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert "of them not the only one at their key 0" in outputs[0]
    assert math.isfinite(float(outputs[0].split("averaged ")[-1].split("%")[0]))
    assert (tmp_path / "figures.json").stat().st_size > 1000
