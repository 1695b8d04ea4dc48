"""Steps whose tokens are the nodes of a tree: several candidates at once, of which the next step keeps one path.

Node i of such a step says which earlier node it follows, or -1 if it follows what the session has. Its position is its
depth's, and it sees the session and its own ancestors, as if the path to it were the only one. Its keys and values lie
where those of the i-th token of a plain step would, until the next step moves those of the path that was accepted.
No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Tree:
    """A checked tree at ``base``, the number of tokens that the session has before it.

    ``parents[i]`` < i is the node before node i, -1 for the session itself; ``depths[i]`` is 0 for its children.
    """

    base: int
    parents: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def end(self) -> int:
        """Where the slots of its nodes end."""
        return self.base + len(self.parents)

    def positions(self) -> list[int]:
        """Where each node is in its sequence."""
        return [self.base + depth for depth in self.depths]

    def visible(self) -> torch.Tensor:
        """bool [nodes, nodes]: True where a node (row) sees another, itself included."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def path(self, accepted: Sequence[int]) -> tuple[int, ...]:
        """Check that ``accepted`` are nodes that follow each other from the session on. Raises InvalidRequest."""
        last = -1
        for node in accepted:
            if not _is_number(node) or not 0 <= node < len(self.parents):
                raise InvalidRequest(
                    f"accepted nodes must be numbers in 0..{len(self.parents) - 1}, got {node!r:.40}"
                )
            if self.parents[node] != last:
                raise InvalidRequest(
                    f"accepted nodes must follow each other: node {node} follows {self.parents[node]}, not {last}"
                )
            last = node
        return tuple(accepted)

    def moves(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """Where tokens of ``path`` lie and where they belong, (from, to), counted from the session's first token."""
        pairs = ((self.base + node, self.base + depth) for depth, node in enumerate(path))
        return [(source, target) for source, target in pairs if source != target]


def plant(parents: Sequence[int], *, base: int, tokens: int) -> Tree:
    """The tree of a step of ``tokens`` tokens after ``base``. Raises InvalidRequest that says what is wrong with it."""
    if len(parents) != tokens:
        raise InvalidRequest(f"a tree must give a parent for each of the {tokens} tokens, got {len(parents)}")
    if tokens > defaults.MAX_TREE_TOKENS:
        raise InvalidRequest(f"a tree may have {defaults.MAX_TREE_TOKENS} tokens, {tokens} are more")
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not _is_number(parent) or not -1 <= parent < node:
            raise InvalidRequest(
                f"the parent of token {node} must be -1 or an earlier token of the step, got {parent!r:.40}"
            )
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return Tree(base, tuple(parents), tuple(depths))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
