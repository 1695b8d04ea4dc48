"""How well the servers that are online cover a model's blocks. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kwaainet_bridge.hivemind.client.directory import Span
from kwaainet_bridge.hivemind.experts.records import ServerState


@dataclass(frozen=True, slots=True)
class Coverage:
    """For each block of a model, how many servers are online for it."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, spans: Iterable[Span], num_blocks: int) -> Coverage:
        """Count spans whose server is ONLINE; they lie within the model."""
        steps = [0] * (num_blocks + 1)
        for span in spans:
            if span.info.state is ServerState.ONLINE and span.blocks:
                steps[span.blocks.start] += 1
                steps[span.blocks.stop] -= 1
        return cls(tuple(itertools.accumulate(steps[:-1])))

    @property
    def gaps(self) -> list[range]:
        """The runs of blocks that nobody serves, as long as they can be."""
        gaps: list[range] = []
        for block, count in enumerate(self.counts):
            if count:
                continue
            if gaps and gaps[-1].stop == block:
                gaps[-1] = range(gaps[-1].start, block + 1)
            else:
                gaps.append(range(block, block + 1))
        return gaps

    def cells(self, width: int) -> tuple[int, list[int]]:
        """Groups of equal size (the last may be smaller), at most ``width``: blocks in each, and each one's count.

        A group counts as its worst block does, so that no gap disappears in it.
        """
        size = -(-len(self.counts) // width)
        return size, [min(self.counts[at : at + size]) for at in range(0, len(self.counts), size)]
