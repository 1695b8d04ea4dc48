"""Which compression a tensor gets: by its size, its role in training, or its name.

Averaging peers must choose alike for every part of a tensor, so the size that counts is the whole tensor's. The
receiver needs none of this: each message names its own compression. Source: hivemind 1.1.12,
``compression/adaptive.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from kwaainet_bridge.compression.codec import CompressionType
from kwaainet_bridge.errors import CompressionError


class TensorRole(enum.Enum):
    ACTIVATION = enum.auto()
    PARAMETER = enum.auto()
    GRADIENT = enum.auto()
    OPTIMIZER = enum.auto()
    UNSPECIFIED = enum.auto()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a choice may depend on. ``elements`` are those of the whole tensor if only a part of it is sent."""

    elements: int
    role: TensorRole = TensorRole.UNSPECIFIED
    key: Hashable = None
    """The tensor's name, or its place among several."""


Choice: TypeAlias = Callable[[TensorInfo], CompressionType]


def always(compression: CompressionType) -> Choice:
    return lambda info: compression  # noqa: ARG005 - whatever the tensor


def by_size(threshold: int, *, less: Choice, greater_equal: Choice) -> Choice:
    """``less`` for tensors of fewer than ``threshold`` elements, ``greater_equal`` for the others."""
    return lambda info: (greater_equal if info.elements >= threshold else less)(info)


def by_role(choices: Mapping[TensorRole, Choice], *, default: Choice) -> Choice:
    """``default`` for roles without a choice of their own. An UNSPECIFIED role cannot have one."""
    if TensorRole.UNSPECIFIED in choices:
        raise CompressionError("tensors without a role get the default")
    return lambda info: choices.get(info.role, default)(info)


def by_key(choices: Mapping[Hashable, Choice]) -> Choice:
    """The choice of each tensor by its key; one without a choice raises CompressionError naming it."""

    def choose(info: TensorInfo) -> CompressionType:
        choice = choices.get(info.key)
        if choice is None:
            raise CompressionError(f"no compression was chosen for tensor {info.key!r:.100}")
        return choice(info)

    return choose
