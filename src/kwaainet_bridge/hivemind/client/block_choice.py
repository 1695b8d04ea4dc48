"""Which blocks of a model a node should serve, given what others serve. No I/O.

The rule is that of Petals' servers: of all runs of so many consecutive blocks take the one whose weakest block has the
least throughput; where these are equal compare the second weakest, and so on; where all are equal take the first. A
run that holds more blocks without a server therefore wins over one that holds fewer.
Source: Petals 2.2.0.post1, ``server/block_selection.py`` (``choose_best_blocks``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerState


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
        throughput = span.info.throughput
        if span.info.state is ServerState.JOINING:
            throughput = throughput or defaults.UNMEASURED_THROUGHPUT
        for block in span.blocks:
            sums[block] += throughput
    return tuple(sums)


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
    start = min(
        range(model_blocks - size + 1), key=lambda start: (sorted(totals[start : start + size]), start)
    )
    return range(start, start + size)


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
