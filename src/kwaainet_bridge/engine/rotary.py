"""Position embeddings of consecutive positions, computed by the model's own module and kept."""

from __future__ import annotations

import torch

from kwaainet_bridge.engine import family
from kwaainet_bridge.engine.family import Family

Embeddings = tuple[torch.Tensor, torch.Tensor]

FIRST_TABLE = 2048
"""Positions in a fresh table; it doubles when a session grows beyond it."""


class RotaryTable:
    """Cosines and sines [1, T, rotary_dim] for any run of positions, for one dtype and device."""

    def __init__(self, model: Family, dtype: torch.dtype, device: torch.device) -> None:
        self._module = model.rotary().to(device)
        self._per_type = family.takes_layer_type(self._module)
        # longrope has two sets of frequencies and chooses by the last position: nothing to keep
        self._keep = "longrope" not in family.rope_types(model.config)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._positions = torch.empty(1, 0, dtype=torch.int64, device=device)
        self._tables: dict[str, Embeddings] = {}

    def positions(self, start: int, count: int) -> torch.Tensor:
        """int64 [1, count]: start, start + 1, …"""
        end = start + count
        if end > self._positions.shape[1]:
            size = max(FIRST_TABLE, 1 << (end - 1).bit_length())
            self._positions = torch.arange(size, device=self._like.device)[None]
            self._tables.clear()
        return self._positions[:, start:end]

    def embeddings(self, start: int, count: int, layer_type: str) -> Embeddings:
        """What a layer of this type takes as ``position_embeddings`` for ``count`` positions from ``start``
        on."""
        positions = self.positions(start, count)
        if not self._keep:
            return self._compute(positions, layer_type)
        key = layer_type if self._per_type else ""
        if key not in self._tables:
            self._tables[key] = self._compute(self._positions, layer_type)
        cos, sin = self._tables[key]
        return cos[:, start : start + count], sin[:, start : start + count]

    def _compute(self, positions: torch.Tensor, layer_type: str) -> Embeddings:
        if self._per_type:
            cos, sin = self._module(self._like, positions, layer_type=layer_type)
        else:
            cos, sin = self._module(self._like, positions)
        return cos, sin
