"""Where a block's tensors are in a checkpoint, when that is not where the module has them.

A mixture of experts keeps the weights of all experts in one tensor; most checkpoints of such models have a tensor for
each expert. (The names are those of the checkpoints on the hub: Mixtral's, and those of Qwen's and OLMo's mixtures.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
EXPERT_NAMES = {
    GATE_UP: (("w1", "w3"), ("gate_proj", "up_proj")),
    DOWN: (("w2",), ("down_proj",)),
}
"""For a tensor of all experts: how the matrices of one expert that stand below each other in it may be called."""

RENAMED = ((".mlp.", ".block_sparse_moe."),)
"""What the module calls it, what some checkpoints call it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint's tensor, and where it belongs in the module's: at (expert, first row), or it is the whole."""

    name: str
    shape: list[int]
    place: tuple[int, int] | None = None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of the module's tensor that this part fills."""
        if self.place is None:
            return whole
        expert, row = self.place
        return whole[expert, row : row + self.shape[0]]


def parts_of(name: str, shape: list[int], has: Callable[[str], bool]) -> list[Part]:
    """The tensors that make up the module's tensor ``name`` in a checkpoint that ``has`` those names.

    The module's own name if the checkpoint has nothing else that would do: reading it says what is missing.
    """
    for candidate in _candidates(name):
        if has(candidate):
            return [Part(candidate, shape)]
    kind = next((kind for kind in EXPERT_NAMES if name.endswith(kind)), None)
    if kind is None:
        return [Part(name, shape)]
    for candidate in _candidates(name.removesuffix(kind)):
        for matrices in EXPERT_NAMES[kind]:
            if has(f"{candidate}experts.0.{matrices[0]}.weight"):
                experts, rows, columns = shape[0], shape[1] // len(matrices), shape[2]
                return [
                    Part(
                        f"{candidate}experts.{expert}.{matrix}.weight",
                        [rows, columns],
                        (expert, index * rows),
                    )
                    for expert in range(experts)
                    for index, matrix in enumerate(matrices)
                ]
    return [Part(name, shape)]


def _candidates(name: str) -> Iterator[str]:
    yield name
    for ours, theirs in RENAMED:
        if ours in name:
            yield re.sub(re.escape(ours), theirs, name)
