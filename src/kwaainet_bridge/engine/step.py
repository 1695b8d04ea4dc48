"""What a session hands to the compute thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class SequencePart:
    """Tokens ``start`` to ``start + count`` of one sequence, and its pages.

    The step that they are of goes up to ``until``, or no further than they do.
    """

    pages: list[int]
    start: int
    count: int
    until: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Tokens of one session: ``hidden`` [B, T, H] at the positions from ``start`` on, through ``blocks``.

    ``rows`` are the pages of each of the B sequences, with room for these tokens; ``copies`` are pages to be copied
    first. ``prompts`` [blocks, B or 1, P, H] are added to the first P tokens before their block.
    """

    blocks: range
    hidden: torch.Tensor
    start: int
    rows: list[list[int]]
    copies: list[tuple[int, int]] = field(default_factory=list)
    prompts: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Batch times tokens."""
        return int(self.hidden.shape[0] * self.hidden.shape[1])

    def parts(self, offset: int, count: int) -> list[SequencePart]:
        until = self.start + int(self.hidden.shape[1])
        return [SequencePart(pages, self.start + offset, count, until) for pages in self.rows]
