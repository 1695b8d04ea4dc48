"""Position embeddings of runs of positions, computed by the model's own module and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kwaainet_bridge.engine import family
from kwaainet_bridge.engine.family import Family

Embeddings = tuple[torch.Tensor, torch.Tensor]
Places = Sequence[tuple[int, int, int]]
"""Of each run of positions: the first, how many, and where the step ends that they are part of."""

FIRST_TABLE = 2048
"""Positions in a fresh table; it doubles when a session grows beyond it."""


class RotaryTable:
    """Cosines and sines [1, T, rotary_dim] for any run of positions, for one dtype and device."""

    def __init__(self, model: Family, dtype: torch.dtype, device: torch.device) -> None:
        module = model.rotary()
        self._module = module if module is None else module.to(device)
        self._per_type = module is not None and family.takes_layer_type(module)
        # longrope has two sets of frequencies and chooses by the last position of a step: nothing to keep
        self.keeps = "longrope" not in family.rope_types(model.config)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._positions = torch.empty(1, 0, dtype=torch.int64, device=device)
        self._tables: dict[str, Embeddings] = {}
        self._asked: tuple[Places, torch.Tensor] = [], self._positions
        self._last: dict[str, tuple[Places, Embeddings]] = {}

    def positions(self, places: Places) -> torch.Tensor:
        """int64 [1, N]: for each place (start, count, …): start, start + 1, … The last answer is kept."""
        if places == self._asked[0]:
            return self._asked[1]
        end = max(start + count for start, count, _ in places)
        if end > self._positions.shape[1]:
            size = max(FIRST_TABLE, 1 << (end - 1).bit_length())
            self._positions = torch.arange(size, device=self._like.device)[None]
            self._tables.clear()
        found = _joined([self._positions[:, start : start + count] for start, count, _ in places])
        self._asked = list(places), found
        return found

    def embeddings(self, places: Places, layer_type: str) -> Embeddings | None:
        """What a layer of this type takes as ``position_embeddings`` for the positions of ``places``.

        None if the model has none. The last answer is kept for each type: all layers ask the same of one batch.
        """
        if self._module is None:
            return None
        key = layer_type if self._per_type else ""
        last = self._last.get(key)
        if last is not None and last[0] == places:
            return last[1]
        if self.keeps:
            self.positions(places)
            if key not in self._tables:
                self._tables[key] = self._compute(self._positions, layer_type)
            cos, sin = self._tables[key]
            parts = [(cos[:, s : s + n], sin[:, s : s + n]) for s, n, _ in places]
        else:
            parts = [self._at_once(*place, layer_type) for place in places]
        found = _joined([cos for cos, _ in parts]), _joined([sin for _, sin in parts])
        self._last[key] = places, found
        return found

    def _at_once(self, start: int, count: int, until: int, layer_type: str) -> Embeddings:
        """As they are in a step that goes up to ``until``, although only a part of it runs now."""
        positions = self.positions([(start, count, until)])
        last = positions.new_full((1, 1), until - 1)
        cos, sin = self._compute(torch.cat([positions, last], 1), layer_type)
        return cos[:, :-1], sin[:, :-1]

    def _compute(self, positions: torch.Tensor, layer_type: str) -> Embeddings:
        assert self._module is not None
        if self._per_type:
            cos, sin = self._module(self._like, positions, layer_type=layer_type)
        else:
            cos, sin = self._module(self._like, positions)
        return cos, sin


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
