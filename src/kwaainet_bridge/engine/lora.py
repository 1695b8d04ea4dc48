"""Linear layers to which adapters add something, each to the tokens of those who asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from kwaainet_bridge.engine.adapters import Pair
from kwaainet_bridge.engine.quantized import LINEAR
from kwaainet_bridge.errors import CheckpointError, EngineError

Rows = Sequence[tuple[str, int, int]]
"""Adapters, and from which token of a batch to which each applies."""


class Active:
    """What applies to what a span's layers are given now: one adapter to all of it, or some to rows of a batch."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.rows: Rows = ()

    @contextmanager
    def to_all(self, adapter: str | None) -> Iterator[None]:
        """``adapter`` applies to everything."""
        self.adapter, before = adapter, self.adapter
        try:
            yield
        finally:
            self.adapter = before

    @contextmanager
    def to_rows(self, rows: Rows) -> Iterator[None]:
        """Adapters apply to rows of a ragged batch."""
        self.rows, before = rows, self.rows
        try:
            yield
        finally:
            self.rows = before


class AdaptedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What ``plain`` computes, and what the active adapters add."""

    def __init__(self, plain: torch.nn.Module, pairs: Mapping[str, Pair], active: Active) -> None:
        super().__init__()
        self.plain = plain
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._pairs = pairs
        for number, pair in enumerate(pairs.values()):  # so that their memory is counted
            self.register_buffer(f"down_{number}", pair.down, persistent=False)
            self.register_buffer(f"up_{number}", pair.up, persistent=False)
        self._active = active

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name in torch's layers
        output: torch.Tensor = self.plain(input)
        active = self._active
        if active.adapter is not None:
            pair = self._pairs.get(active.adapter)
            return output if pair is None else output + _added(input, pair)
        if active.rows:
            hidden, into = input.reshape(-1, self.in_features), output.view(-1, self.out_features)
            if active.rows[-1][2] > len(hidden):
                raise EngineError("an adapter cannot be applied to a layer that gets some of the tokens only")
            for name, start, stop in active.rows:
                pair = self._pairs.get(name)
                if pair is not None:
                    into[start:stop] += _added(hidden[start:stop], pair)
        return output


def _added(hidden: torch.Tensor, pair: Pair) -> torch.Tensor:
    return (hidden @ pair.down.t()) @ pair.up.t() * pair.scale


def install(
    layer: torch.nn.Module, block: int, by_adapter: Mapping[str, Mapping[str, Pair]], active: Active
) -> None:
    """Have adapters, by name, add to the linear layers of a block. Raises CheckpointError for what does not fit."""
    modules: dict[str, dict[str, Pair]] = {}
    for adapter, pairs in by_adapter.items():
        for module, pair in pairs.items():
            modules.setdefault(module, {})[adapter] = pair
            _check(layer, block, module, adapter, pair)
    for module, pairs in modules.items():
        parent_name, _, name = module.rpartition(".")
        parent = layer.get_submodule(parent_name)
        setattr(parent, name, AdaptedLinear(getattr(parent, name), pairs, active))


def _check(layer: torch.nn.Module, block: int, module: str, adapter: str, pair: Pair) -> None:
    where = f"adapter {adapter} cannot be served: {module} of block {block}"
    try:
        plain = layer.get_submodule(module)
    except AttributeError:
        raise CheckpointError(f"{where} does not exist in this model") from None
    if not isinstance(plain, LINEAR):
        raise CheckpointError(f"{where} is no linear layer but {type(plain).__name__}")
    shape, expected = [pair.up.shape[0], pair.down.shape[1]], [plain.out_features, plain.in_features]
    if shape != expected:
        raise CheckpointError(f"{where} has the shape {expected}, the adapter is for {shape}")
