"""Choosing a chain of servers. No I/O: what is known about the swarm comes as arguments, time included."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NoRoute
from kwaainet_bridge.hivemind.client.directory import PETALS, Span
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Hop:
    """One link of a chain: the server, those of its blocks that it is asked to run, and in which network."""

    peer: PeerId
    blocks: range
    network: str = PETALS

    def __str__(self) -> str:
        network = "" if self.network == PETALS else f" ({self.network})"
        return f"{self.blocks.start}:{self.blocks.stop} via {self.peer.short}{network}"

    @property
    def key(self) -> tuple[PeerId, str]:
        """What fails or works: a peer in one network may do what it refuses in another."""
        return self.peer, self.network


def fastest_chain(
    spans: Sequence[Span],
    blocks: range,
    *,
    model: str,
    rtts: Mapping[PeerId, float],
    cache_tokens: int = 0,
) -> list[Hop]:
    """The chain over ``blocks`` with the lowest expected latency of one step.

    Every hop costs the client's round trip to it (``rtts``, seconds, infinity for no answer), a fixed
    overhead, and ``1 / inference_rps`` per block. A hop whose record has no room for ``cache_tokens`` tokens
    (batch times maximum length) in each of its blocks costs ten seconds more: it is a last resort rather
    than excluded, since records are minutes old. Equal costs go to the span that comes first in ``spans``.

    Raises NoRoute naming the blocks without a server.

    Chains leave a span at its end or where another span begins. Nothing is lost by that: with a constant cost
    per block, moving a switch towards the faster of the two servers never makes a chain slower. A span that only runs
    as a whole is entered at its beginning and left at its end.
    """
    spans = _covering(spans, blocks, model)
    spans_from: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        spans_from.setdefault(max(span.blocks.start, blocks.start), []).append(index)

    # a state is (span, block): the blocks before ``block`` are done and the chain is on ``span``
    states = itertools.count()  # breaks ties of the heap, in the order of discovery
    heap: list[tuple[float, int, int, int, tuple[Hop, ...]]] = []
    done: set[tuple[int, int]] = set()

    def enter(index: int, block: int, cost: float, chain: tuple[Hop, ...]) -> None:
        span = spans[index]
        rest = range(block, min(span.blocks.stop, blocks.stop))
        cost += _entry_cost(span, rest, rtts, cache_tokens)
        heapq.heappush(
            heap,
            (cost, next(states), index, block, (*chain, Hop(span.peer, range(block, block), span.network))),
        )

    for index in spans_from.get(blocks.start, ()):
        enter(index, blocks.start, 0.0, ())
    while heap:
        cost, _, index, block, chain = heapq.heappop(heap)
        if block == blocks.stop:
            return list(chain)
        if (index, block) in done:
            continue
        done.add((index, block))
        span, hop = spans[index], chain[-1]
        if len(hop.blocks):
            for other in _exits(spans, index, block, spans_from):
                enter(other, block, cost, chain)
        if block < span.blocks.stop:
            step = 1 / (span.info.inference_rps or defaults.UNKNOWN_INFERENCE_RPS)
            longer = Hop(hop.peer, range(hop.blocks.start, block + 1), hop.network)
            heapq.heappush(heap, (cost + step, next(states), index, block + 1, (*chain[:-1], longer)))
    raise NoRoute(
        f"{model}: servers hold all blocks, but no chain of them runs each block once", blocks=blocks
    )


def _exits(spans: Sequence[Span], index: int, block: int, spans_from: Mapping[int, list[int]]) -> list[int]:
    """Spans to change to at ``block``: where one's own ends all that hold it, else those that begin there."""
    if block == spans[index].blocks.stop:
        return [
            i
            for i, span in enumerate(spans)
            if block in span.blocks and (not span.whole or block == span.blocks.start)
        ]
    if spans[index].whole:
        return []
    return [i for i in spans_from.get(block, ()) if i != index]


def _entry_cost(span: Span, blocks: range, rtts: Mapping[PeerId, float], cache_tokens: int) -> float:
    rtt = min(rtts.get(span.peer, defaults.UNKNOWN_RTT_SECONDS), defaults.WORST_RTT_SECONDS)
    left = span.info.cache_tokens_left
    # records count the keys and the values of a token apart
    fits = left is None or 2 * cache_tokens * len(blocks) <= left
    return rtt + defaults.HOP_OVERHEAD_SECONDS + (0.0 if fits else defaults.NO_CACHE_PENALTY_SECONDS)


def random_chain(
    spans: Sequence[Span],
    blocks: range,
    *,
    model: str,
    rtts: Mapping[PeerId, float],
    rng: random.Random,
) -> list[Hop]:
    """A random chain over ``blocks`` that spreads the load of many clients: for forward and backward.

    From left to right each server is drawn with a weight of its throughput times the number of blocks that it
    would run, and used to the end of its span. Servers that did not answer a ping are drawn only if there is
    hardly anyone else. Raises NoRoute naming the blocks without a server.
    """
    spans = _covering(spans, blocks, model)
    chain: list[Hop] = []
    block = blocks.start
    while block < blocks.stop:
        choices = [
            (span, range(block, min(span.blocks.stop, blocks.stop))) for span in spans if block in span.blocks
        ]
        weights = [_weight(span, rest, rtts) for span, rest in choices]
        ((span, rest),) = rng.choices(choices, weights)
        chain.append(Hop(span.peer, rest))
        block = rest.stop
    return chain


def _weight(span: Span, blocks: range, rtts: Mapping[PeerId, float]) -> float:
    reachable = math.isfinite(rtts.get(span.peer, defaults.UNKNOWN_RTT_SECONDS))
    # the floor keeps servers that claim no throughput, or do not answer, in the draw
    return max(span.info.throughput if reachable else 0.0, 1e-6) * len(blocks)


def _covering(spans: Sequence[Span], blocks: range, model: str) -> list[Span]:
    """Those spans that hold some of ``blocks``. Raises NoRoute unless they hold all of them.

    Full coverage is all that a chain needs where spans may be entered anywhere.
    """
    useful = [
        s
        for s in spans
        if max(s.blocks.start, blocks.start) < min(s.blocks.stop, blocks.stop)
        if not s.whole or (blocks.start <= s.blocks.start and s.blocks.stop <= blocks.stop)
    ]
    held = set[int]().union(*(s.blocks for s in useful))
    if missing := [block for block in blocks if block not in held]:
        raise NoRoute(
            f"{model}: no server is online for blocks {block_list(missing)}; start one that holds them or "
            "wait until one joins",
            blocks=missing,
        )
    return useful


def block_list(blocks: Sequence[int]) -> str:
    """Ascending block numbers as ranges, ends excluded: ``0:4, 7:8``."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return ", ".join(f"{run.start}:{run.stop}" for run in runs)


Server: TypeAlias = tuple[PeerId, str]
"""A peer in one network."""


class Bans:
    """Servers that failed lately, each avoided for a time that doubles with every further failure."""

    def __init__(
        self, *, first: float = defaults.BAN_SECONDS, longest: float = defaults.MAX_BAN_SECONDS
    ) -> None:
        self._first = first
        self._longest = longest
        self._until: dict[Server, float] = {}
        self._failures: dict[Server, int] = {}
        self._reasons: dict[Server, str] = {}

    def add(self, server: Server, now: float, reason: str = "") -> None:
        """Ban ``server``. While it is banned, failures count as the same one: many calls may fail at once."""
        if self.includes(server, now):
            return
        self._reasons[server] = reason[: defaults.MAX_ERROR_CHARACTERS]
        failures = self._failures[server] = self._failures.get(server, 0) + 1
        self._until[server] = now + min(self._first * 2.0 ** min(failures - 1, 30), self._longest)

    def pause(self, server: Server, until: float, reason: str = "") -> None:
        """Leave ``server`` alone until then without holding anything against it: it is well, and full."""
        self._until[server] = max(until, self._until.get(server, -math.inf))
        self._reasons[server] = reason[: defaults.MAX_ERROR_CHARACTERS]

    def lift(self, server: Server) -> None:
        """Forget what ``server`` did: it just worked."""
        self._until.pop(server, None)
        self._failures.pop(server, None)
        self._reasons.pop(server, None)

    def lasting(self, now: float) -> list[tuple[Server, float, str]]:
        """Who is banned or left alone, until when, and why."""
        return [
            (server, until, self._reasons.get(server, ""))
            for server, until in self._until.items()
            if now < until
        ]

    def includes(self, server: Server, now: float) -> bool:
        return now < self._until.get(server, -math.inf)


def retry_delay(failures: int) -> float:
    """Seconds to wait after the n-th failure in a row: 0, 1, 2, 4 … up to the limit."""
    if failures <= 1:
        return 0.0
    return min(defaults.RETRY_MIN_SECONDS * 2.0 ** min(failures - 2, 30), defaults.RETRY_MAX_SECONDS)
