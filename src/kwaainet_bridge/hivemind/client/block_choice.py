"""Which blocks of a model a node should serve, given what others serve, and whether it should move there. No I/O.

The rule is that of Petals' servers: of all runs of so many consecutive blocks take the one whose weakest block has the
least throughput; where these are equal compare the second weakest, and so on; where all are equal take the first. A
run that holds more blocks without a server therefore wins over one that holds fewer.
Source: Petals 2.2.0.post1, ``server/block_selection.py`` (``choose_best_blocks``, ``should_choose_other_blocks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.wire.peer_id import PeerId


def throughputs(spans: Iterable[Span], num_blocks: int) -> tuple[float, ...]:
    """For each block of a model what its servers announce together, in requests (tokens) per second.

    Servers that are JOINING count: they will have their blocks before a new one has any. One that has not measured its
    throughput yet announces 0 and counts as ``defaults.UNMEASURED_THROUGHPUT``: little, and more than no server. Spans
    lie within the model.
    """
    sums = [0.0] * num_blocks
    # always in one order, that of the printed ids: sums of floating-point numbers depend on it
    for span in sorted(spans, key=lambda span: str(span.peer)):
        if span.info.state is ServerState.OFFLINE:
            continue
        throughput = _counted(span)
        for block in span.blocks:
            sums[block] += throughput
    return tuple(sums)


def _counted(span: Span) -> float:
    throughput = min(span.info.throughput, defaults.MAX_THROUGHPUT)
    if span.info.state is ServerState.JOINING:
        return throughput or defaults.UNMEASURED_THROUGHPUT
    return throughput


def summed(networks: Iterable[Sequence[float]], num_blocks: int) -> tuple[float, ...]:
    """The throughputs of each block in several networks, added: what :func:`suggest` goes by."""
    totals = [0.0] * num_blocks
    for network in networks:
        totals = [total + own for total, own in zip(totals, network, strict=True)]
    return tuple(totals)


def suggest(coverages: Iterable[Sequence[float]], blocks_that_fit: int, model_blocks: int) -> range:
    """The blocks that a node which can hold ``blocks_that_fit`` (at least 1) should serve.

    ``coverages`` are the :func:`throughputs` of the model in each of the networks where the node would be listed: they
    are added, and an empty one changes nothing. A node with room for more than the model gets all of it.
    """
    if blocks_that_fit < 1 or model_blocks < 1:
        raise ValueError(f"{blocks_that_fit} blocks of {model_blocks}: both must be at least 1")
    totals = summed(coverages, model_blocks)
    size = min(blocks_that_fit, model_blocks)
    start = _best_start(totals, size)
    return range(start, start + size)


def _best_start(totals: Sequence[float], size: int) -> int:
    last, weakest = len(totals) - size, min(totals)
    # only runs that hold a weakest block can win
    starts = {
        start
        for block, total in enumerate(totals)
        if total == weakest
        for start in range(max(0, block - size + 1), min(block, last) + 1)
    }
    return min(starts, key=lambda start: (sorted(totals[start : start + size]), start))


@dataclass(frozen=True, slots=True)
class Advice:
    """Where a server should be, its present ``blocks`` if it should stay, and the ``reason`` for that in words."""

    blocks: range
    reason: str


def advise(
    networks: Iterable[Iterable[Span]],
    own: Span,
    model_blocks: int,
    *,
    balance_quality: float,
    shuffle: Callable[[list[Server]], None],
    most_moves: int = defaults.REBALANCE_SIMULATED_MOVES,
) -> Advice:
    """Whether the server of ``own``, which it is listed with in all of ``networks``, should serve other blocks.

    ``networks`` are the spans of all other servers in each of them. It should move if its present place is not the best
    for it, if nobody is cut off by that, and if the weakest block of the model has less than ``balance_quality`` (0 to
    1) of the throughput that it would have once all servers have moved to where they are best: one after the other, in
    an order that ``shuffle`` draws anew for each round, until none wants to. A server with the same blocks in several
    networks is one there, with the sum of what it announces.

    Takes time in proportion to the servers and rounds. It gives up after ``most_moves`` servers were looked at, since
    the rounds need not end; a stock server hangs then.
    """
    everywhere = [[*spans, own] for spans in networks]
    totals = list(summed((throughputs(spans, model_blocks) for spans in everywhere), model_blocks))
    servers = _servers(everywhere)
    me = next(server for server in servers if server.peer == own.peer and server.blocks == own.blocks)
    present, before = me.blocks, min(totals)

    me.leave(totals)
    if before > defaults.BALANCE_EPSILON and min(totals) <= 0:
        alone = [block for block in present if totals[block] <= 0]
        return Advice(present, f"nobody else serves {_runs(alone)}")
    start = _best_start(totals, len(present))
    if start == present.start:
        return Advice(present, "no other place needs it more")
    me.settle(totals, start)
    best = me.blocks

    if not _even_out(servers, totals, shuffle, most_moves):
        return Advice(present, "what the others would do then has no end")
    after = min(totals)
    if after < before or after < defaults.BALANCE_EPSILON:
        return Advice(
            present, f"the weakest block would have {after:.4g} requests a second, now {before:.4g}"
        )
    gain = f"the weakest block has {before:.4g} of {after:.4g} requests a second that are possible"
    if before / after < balance_quality - defaults.BALANCE_EPSILON:
        return Advice(best, gain)
    return Advice(present, f"{gain}: enough")


@dataclass(slots=True)
class Server:
    """One server in the simulation of what all would do."""

    peer: PeerId
    blocks: range
    throughput: float

    def leave(self, totals: list[float]) -> None:
        """Take its throughput out of ``totals`` and a little more: rounding moves nobody, and ties keep its place."""
        self._add(totals, -self.throughput * (1 + defaults.BALANCE_EPSILON))

    def settle(self, totals: list[float], start: int) -> bool:
        """Add it from the block ``start`` on; whether that is another place than the one it left."""
        self._add(totals, self.throughput * defaults.BALANCE_EPSILON)
        moved = start != self.blocks.start
        self.blocks = range(start, start + len(self.blocks))
        self._add(totals, self.throughput)
        return moved

    def _add(self, totals: list[float], throughput: float) -> None:
        for block in self.blocks:
            totals[block] += throughput


def _servers(networks: Iterable[Iterable[Span]]) -> list[Server]:
    """The servers of all networks that count, in the order in which a stock server has them before it shuffles."""
    found: dict[tuple[PeerId, range], Server] = {}
    for spans in networks:
        for span in spans:
            if span.info.state is not ServerState.OFFLINE and span.blocks:
                server = found.setdefault((span.peer, span.blocks), Server(span.peer, span.blocks, 0.0))
                server.throughput += _counted(span)
    return sorted(found.values(), key=lambda server: (server.blocks.start, str(server.peer)))


def _even_out(
    servers: Sequence[Server],
    totals: list[float],
    shuffle: Callable[[list[Server]], None],
    most_moves: int,
) -> bool:
    """Let each server move to its best place, in rounds, until nobody moves; whether that was within the limit."""
    moved, looks = True, 0
    while moved:
        order = list(servers)
        shuffle(order)
        moved = False
        for server in order:
            if (looks := looks + 1) > most_moves:
                return False
            server.leave(totals)
            moved |= server.settle(totals, _best_start(totals, len(server.blocks)))
    return True


def reason(coverages: Iterable[Sequence[float]], blocks: range, model_blocks: int) -> str:
    """Why ``blocks`` are the ones suggested, in words."""
    totals = summed(coverages, model_blocks)
    if not any(totals):
        return "nobody serves any block of the model"
    bare = [block for block in blocks if not totals[block]]
    if bare:
        return f"nobody serves {_runs(bare)}"
    if len(blocks) == model_blocks:
        return "it is the whole model"
    return f"no other choice has a weaker block: {min(totals):.4g} requests a second"


def _runs(blocks: Sequence[int]) -> str:
    """Ascending numbers as runs: ``0:2, 5:6``."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block + 1 for block in blocks if block + 1 not in blocks]
    return ", ".join(f"{start}:{end}" for start, end in zip(starts, ends, strict=True))
