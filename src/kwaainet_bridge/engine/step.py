"""What a session hands to the compute thread."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kwaainet_bridge.engine.tree import Tree


@dataclass(frozen=True, slots=True)
class SequencePart:
    """Tokens ``start`` to ``start + count`` of one sequence, and its pages.

    The step that they are of goes up to ``until``, or no further than they do. With a ``tree`` they are nodes of it.
    """

    pages: list[int]
    start: int
    count: int
    until: int = 0
    adapter: str | None = None
    tree: Tree | None = None

    def positions(self) -> list[int]:
        """Where the tokens are in their sequence."""
        if self.tree is None:
            return list(range(self.start, self.start + self.count))
        first = self.start - self.tree.base
        return self.tree.positions()[first : first + self.count]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Tokens of one session: ``hidden`` [B, T, H] at the positions from ``start`` on, through ``blocks``.

    ``rows`` are the pages of each of the B sequences, with room for these tokens; ``copies`` are pages to be copied
    first. ``prompts`` [blocks, B or 1, P, H] are added to the first P tokens before their block. ``adapter`` is the one
    that the session has chosen. ``moves`` are slots of the one sequence whose content is moved first, (from, to); with
    a ``tree``, of one sequence, the tokens are its nodes.
    """

    blocks: range
    hidden: torch.Tensor
    start: int
    rows: list[list[int]]
    copies: list[tuple[int, int]] = field(default_factory=list)
    prompts: torch.Tensor | None = None
    adapter: str | None = None
    moves: list[tuple[int, int]] = field(default_factory=list)
    tree: Tree | None = None

    @property
    def tokens(self) -> int:
        """Batch times tokens."""
        return int(self.hidden.shape[0] * self.hidden.shape[1])

    def of_rows(self, first: int, last: int) -> Step:
        """The same for some of its sequences, after copies and moves."""
        prompts = self.prompts
        if prompts is not None and prompts.shape[1] > 1:
            prompts = prompts[:, first:last]
        return replace(
            self,
            hidden=self.hidden[first:last],
            rows=self.rows[first:last],
            copies=[],
            moves=[],
            prompts=prompts,
        )

    def parts(self, offset: int, count: int) -> list[SequencePart]:
        until = self.start + int(self.hidden.shape[1])
        return [
            SequencePart(pages, self.start + offset, count, until, adapter=self.adapter, tree=self.tree)
            for pages in self.rows
        ]
