"""Rounds of averaging with hundreds of peers in one process, in simulated time, under churn.

``python -m bench.averaging_simulation --peers 256 --group 16 --churn 0.1`` has as many peers meet as often as
``--rounds`` says. Every peer runs the ``Matchmaking`` of the node itself; the DHT, streams and time are simulated
(averaging_network.py, averaging_peers.py, averaging_reduction.py). All peers start to look for a group within
``--spread`` seconds; a round ends when nobody looks or averages any more. ``--churn`` of the peers die in each round,
at random moments of the ``--spread`` and the matchmaking time after it, every other one silently; as many new ones
come before the next round, with the values of some live peer and random group bits.

Group bits start as a full grid, or at random with ``--random-bits``. In a full grid of M^d peers the values are equal
after d rounds. With random groups, r of them among N peers, the variance of the values is multiplied by
c = (r - 1)/N + r/N^2 in a round, on average (Ryabinin et al., Moshpit SGD, NeurIPS 2021). Where a share u of the
values of live peers is not averaged, u + (1 - u) c is expected here, with r as many groups as there were.

Printed are for each round: the live peers at its start; of those that live at its end, how many averaged; groups and
their members, as listed by leaders; elements that kept local values; seconds from the start of a look to the group, and
from the time that a peer first declared to the group (below zero: the group was full before); seconds of the
all-reduce; for each peer messages to find a group, reads and writes of the DHT; and the variance of the values of live
peers, relative to that at the beginning. At the end come means over the rounds of all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.averaging_network import Delays, Dht, Network
from bench.averaging_peers import Look, Peer
from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.averaging.group import Group
from kwaainet_bridge.hivemind.averaging.matchmaking import Rules
from kwaainet_bridge.wire.peer_id import PeerId

CONSENSUS = 1e-6
ELEMENTS = 16
DELAYS = Delays(0.005, 0.05)
PAUSE_SECONDS = 1.0
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench" / "averaging_simulation.json"


@dataclass(frozen=True)
class Setup:
    """What is simulated. Times in seconds; ``skew`` is the greatest difference of a peer's clock from the true one."""

    peers: int = 256
    group: int = 16
    churn: float = 0.0
    rounds: int = 6
    seed: int = 1
    delays: Delays = DELAYS
    spread: float = 1.0
    timeout: float = 20.0
    matchmaking: float = defaults.AVERAGING_MATCHMAKING_SECONDS
    request: float = defaults.AVERAGING_REQUEST_SECONDS
    skew: float = 0.0
    random_bits: bool = False

    def __post_init__(self) -> None:
        for name, value in (("group", self.group), ("peers / group", self.peers // self.group)):
            if value < 2 or value & (value - 1):
                raise ValueError(f"{name} is {value}: must be a power of two")

    @property
    def width(self) -> int:
        """Group bits: as many keys as there are full groups."""
        return (self.peers // self.group).bit_length() - 1


@dataclass(frozen=True)
class Round:
    """The figures of one round. Means and maxima are over the peers that lived to its end, if nothing else is said."""

    alive: int
    survivors: int
    averaged: float
    without: int
    """Survivors that found no group."""
    stranded: int
    """Those of them that were not the only one at their key: they could have met."""
    sizes: tuple[int, ...]
    unaveraged: float
    """Share of the survivors' elements that kept their local values, those of peers without a group included."""
    look: float
    slowest_look: float
    after_declared: float
    latest_after_declared: float
    reduce: float
    slowest_reduce: float
    messages: float
    most_messages: int
    reads: float
    writes: float
    asks: float
    refusals: dict[str, int]
    variance: float
    expected: float
    """What the variance is multiplied with on average, by as many random groups and with as much not averaged."""


class Simulation:
    """The peers of one run. ``groups`` are all that were ever assembled: who began them, and from when to when."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rng = random.Random(setup.seed)
        self.network = Network(setup.delays, random.Random(self.rng.random()))
        self.dht = Dht(self.network)
        self.peers: dict[PeerId, Peer] = {}
        self.groups: dict[bytes, dict[PeerId, tuple[Group, float, float]]] = {}
        self._rules = Rules(
            target_size=setup.group,
            matchmaking_seconds=setup.matchmaking,
            request_seconds=setup.request,
        )
        values = torch.randn(setup.peers, ELEMENTS, generator=torch.Generator().manual_seed(setup.seed))
        for number in range(setup.peers):
            keys = 1 << setup.width
            key = self.rng.randrange(keys) if setup.random_bits else number % keys
            self._add(values[number].clone(), key)
        self._initial = self.variance()

    @property
    def alive(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.alive]

    def variance(self) -> float:
        """Of the live peers' values, each element apart, and the mean of that."""
        values = torch.stack([peer.values for peer in self.alive]).to(torch.float64)
        return float(values.var(0, correction=0).mean())

    def _add(self, values: torch.Tensor, key: int) -> None:
        setup = self.setup
        peer = Peer(
            len(self.peers),
            self.network,
            self.dht,
            self.peers,
            values,
            rules=self._rules,
            bits=format(key, f"0{setup.width}b") if setup.width else "",
            skew=self.rng.uniform(-setup.skew, setup.skew),
            seed=setup.seed,
        )
        self.peers[peer.peer_id] = peer

    def _replace_the_dead(self) -> None:
        givers = self.alive
        for _ in range(self.setup.peers - len(givers)):
            self._add(self.rng.choice(givers).values.clone(), self.rng.randrange(1 << self.setup.width))

    def round(self) -> Round:
        """One round, from the first look to the end of the last all-reduce."""
        setup, network = self.setup, self.network
        self._replace_the_dead()
        alive, began = self.alive, network.now
        for peer in alive:
            network.at(began + self.rng.uniform(0, setup.spread), peer.start, setup.timeout)
        dying = self.rng.sample(alive, round(setup.churn * len(alive)))
        window = setup.spread + self._rules.matchmaking_seconds
        for number, peer in enumerate(dying):
            moment = began + self.rng.uniform(0, window)
            network.at(moment, lambda peer=peer, silent=number % 2 == 0: peer.die(silent=silent))
        network.run(began + window)
        while any(peer.is_busy for peer in alive):
            network.run(network.now + PAUSE_SECONDS)
        network.run(network.now + self._rules.matchmaking_seconds)  # what was declared has expired
        return self._figures([(peer, peer.look) for peer in alive if peer.look], len(alive))

    def _figures(self, looks: list[tuple[Peer, Look]], alive: int) -> Round:
        for peer, look in looks:
            if look.group is not None:
                assert look.ended is not None
                end = math.inf if look.averaged is None else look.averaged
                members = self.groups.setdefault(look.group.group_id, {})
                members[peer.peer_id] = (look.group, look.ended, end)
        survived = [look for peer, look in looks if peer.alive]
        done = [look for look in survived if look.averaged is not None]
        kept = sum(ELEMENTS if look.averaged is None else look.missing for look in survived)
        unaveraged = kept / (ELEMENTS * len(survived))
        looked = [look.ended - look.began for look in done if look.ended is not None]
        after = [look.ended - (look.declared or look.ended) for look in done if look.ended is not None]
        reduced = [
            look.averaged - look.ended
            for look in done
            if look.averaged is not None and look.ended is not None
        ]
        without = Counter(look.key for look in survived if look.group is None)
        groups = {look.group.group_id: len(look.group.members) for _, look in looks if look.group}
        return Round(
            alive=alive,
            survivors=len(survived),
            averaged=len(done) / len(survived),
            without=without.total(),
            stranded=sum(count for count in without.values() if count > 1),
            sizes=tuple(sorted(groups.values())),
            unaveraged=unaveraged,
            look=_mean(looked),
            slowest_look=max(looked, default=0.0),
            after_declared=_mean(after),
            latest_after_declared=max(after, default=0.0),
            reduce=_mean(reduced),
            slowest_reduce=max(reduced, default=0.0),
            messages=_mean(look.messages for look in survived),
            most_messages=max(look.messages for look in survived),
            reads=_mean(look.reads for look in survived),
            writes=_mean(look.writes for look in survived),
            asks=_mean(look.asks for look in survived),
            refusals=dict(sorted(sum((Counter(look.refusals) for look in survived), Counter()).items())),
            variance=self.variance() / self._initial,
            expected=unaveraged + (1 - unaveraged) * contraction(alive, len(groups)),
        )


def contraction(peers: int, groups: int) -> float:
    """What the variance is multiplied with, on average, by one round in ``groups`` random groups."""
    return (groups - 1) / peers + groups / peers**2


def rounds_needed(factor: float) -> int:
    """Until the variance is below CONSENSUS, if a round multiplies it with ``factor``."""
    return math.ceil(math.log(CONSENSUS) / math.log(factor))


def grid_rounds(setup: Setup) -> int:
    """Until all values are equal, if the grid of keys is full and stays so."""
    return math.ceil(math.log2(setup.peers) / math.log2(setup.group))


def rounds_to_consensus(rounds: Iterable[Round]) -> int | None:
    """How many it took; None if there is none yet."""
    return next((number for number, row in enumerate(rounds, 1) if row.variance < CONSENSUS), None)


def simulate(setup: Setup) -> tuple[Simulation, list[Round]]:
    simulation = Simulation(setup)
    return simulation, [simulation.round() for _ in range(setup.rounds)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0


# --- printing ---------------------------------------------------------------------------------------------

_HEADER = (
    "round alive averaged  groups members  kept     look (max)      late (max)    reduce (max)"
    "   messages (max) reads writes  variance"
)


def _line(number: int, row: Round) -> str:
    sizes = f"{min(row.sizes, default=0)}-{max(row.sizes, default=0)}"
    return (
        f"{number:5} {row.alive:5} {row.averaged:8.1%} {len(row.sizes):7} {sizes:>7} {row.unaveraged:5.1%}"
        f" {row.look:6.2f} ({row.slowest_look:5.2f}) {row.after_declared:6.2f} ({row.latest_after_declared:6.2f})"
        f" {row.reduce:6.2f} ({row.slowest_reduce:5.2f}) {row.messages:9.1f} ({row.most_messages:3})"
        f" {row.reads:5.1f} {row.writes:6.1f} {row.variance:9.1e}"
    )


def picture(rounds: list[Round]) -> str:
    """The variance after each round, two columns to a power of ten; ``|`` is where random groups would be."""
    lines, expected = [], 1.0
    for number, row in enumerate(rounds, 1):
        expected *= row.expected
        length = min(40, max(0, round(-2 * math.log10(max(row.variance, 1e-20)))))
        mark = min(40, max(0, round(-2 * math.log10(expected))))
        bar = ("#" * length).ljust(41)
        lines.append(f"{number:5} {bar[:mark]}|{bar[mark + 1 :]} {row.variance:9.1e}, random {expected:9.1e}")
    return "\n".join(lines)


def summary(setup: Setup, runs: list[list[Round]]) -> str:
    """Means over all rounds of all seeds, and the rounds to consensus beside those that theory expects."""
    rows = [row for rounds in runs for row in rounds]

    def mean(name: str) -> float:
        return _mean(getattr(row, name) for row in rows)

    without, stranded = sum(row.without for row in rows), sum(row.stranded for row in rows)
    most = max(row.most_messages for row in rows)
    refusals = sum((Counter(row.refusals) for row in rows), Counter[str]())
    factor, lossy = contraction(setup.peers, 1 << setup.width), mean("expected")
    lines = [
        f"averaged {mean('averaged'):.2%}, least {min(row.averaged for row in rows):.1%}",
        f"without a group {without} in {len(rows)} rounds, of them not the only one at their key {stranded}",
        f"elements that kept local values {mean('unaveraged'):.2%}",
        f"seconds to the group {mean('look'):.2f}, after the declared time {mean('after_declared'):.2f}",
        f"seconds of the all-reduce {mean('reduce'):.2f}",
        f"messages of a peer in a round {mean('messages'):.1f} (most {most}), requests {mean('asks'):.2f}",
        f"reads {mean('reads'):.1f}, writes {mean('writes'):.1f}",
        f"refusals {dict(refusals)}",
        f"rounds to {CONSENSUS:g}: {[rounds_to_consensus(rounds) for rounds in runs]}",
        f"expected in a full grid: {grid_rounds(setup)}",
        f"expected of random groups: {rounds_needed(factor)} (factor {factor:.4f})",
        f"expected of random groups of these sizes, with these losses: {rounds_needed(lossy)} (factor {lossy:.4f})",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=256)
    parser.add_argument("--group", type=int, default=16, help="target group size")
    parser.add_argument("--churn", type=float, default=0.1, help="share of the peers that changes in a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="one run for each")
    parser.add_argument("--latency", type=float, nargs=2, default=[5, 50], metavar="MS", help="one way, ms")
    parser.add_argument("--spread", type=float, default=1.0, help="seconds in which all peers start")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds of a look for a group")
    matchmaking, request = defaults.AVERAGING_MATCHMAKING_SECONDS, defaults.AVERAGING_REQUEST_SECONDS
    parser.add_argument(
        "--matchmaking", type=float, default=matchmaking, help="seconds a leader waits for others"
    )
    parser.add_argument("--request", type=float, default=request, help="seconds for a leader's first answer")
    parser.add_argument("--skew", type=float, default=0.0, help="greatest error of a clock, seconds")
    parser.add_argument("--random-bits", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for all figures")
    options = parser.parse_args()
    setup = Setup(
        peers=options.peers,
        group=options.group,
        churn=options.churn,
        rounds=options.rounds,
        delays=Delays(options.latency[0] / 1000, options.latency[1] / 1000),
        spread=options.spread,
        timeout=options.timeout,
        matchmaking=options.matchmaking,
        request=options.request,
        skew=options.skew,
        random_bits=options.random_bits,
    )
    runs = []
    for seed in options.seed:
        _, rounds = simulate(replace(setup, seed=seed))
        runs.append(rounds)
        print(f"seed {seed}\n{_HEADER}")
        for number, row in enumerate(rounds, 1):
            print(_line(number, row))
        print(picture(rounds), flush=True)
    print(summary(setup, runs))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = [[asdict(row) for row in rounds] for rounds in runs]
    options.output.write_text(json.dumps({"setup": asdict(setup), "runs": figures}, indent=1))


if __name__ == "__main__":
    main()
