"""The state of a torch optimizer as peers exchange it: a flat list of values, and the tensors among them.

Source: hivemind 1.1.12, ``optim/state_averager.py``, ``utils/nested.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from kwaainet_bridge.errors import RemoteError

Path = tuple[Any, ...]

_OWN_CHOICES: Final = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Of the options of a group of parameters: how this machine computes, not what."""


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The values of nested dicts, lists and tuples with their places, dicts by sorted keys.

    Keys of several types have no order in Python; they come by type then. Stock cannot share such states.
    """
    if isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from leaves(item, (*path, number))
    elif isinstance(tree, dict):
        for key in _sorted(tree):
            yield from leaves(tree[key], (*path, key))
    else:
        yield path, tree


def rebuilt(tree: Any, values: Iterator[Any]) -> Any:
    """A tree of the same shape with other ``values``, in the order of ``leaves``."""
    if isinstance(tree, list | tuple):
        return type(tree)(rebuilt(item, values) for item in tree)
    if isinstance(tree, dict):
        return {key: rebuilt(tree[key], values) for key in _sorted(tree)}
    return next(values)


def _sorted(tree: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(tree)
    except TypeError:
        return sorted(tree, key=lambda key: (type(key).__name__, key))


def dump(optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """What is sent: an entry for each value, in order, and the tensors that entries name by index.

    Raises ValueError, naming the place, for values that are neither tensors, numbers, text nor None.
    """
    entries: list[dict[str, Any]] = []
    tensors: list[torch.Tensor] = []
    for path, value in leaves(optimizer.state_dict()):
        if isinstance(value, torch.Tensor):
            entries.append({"type": "tensor", "index": len(tensors)})
            tensors.append(value)
        else:
            entries.append({"type": "value", "value": _plain(path, value)})
    return entries, tensors


def _plain(path: Path, value: Any) -> Any:
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # NumPy's floats are floats, too, and not what msgpack carries
    if value is None:
        return None
    raise ValueError(f"optimizer state {_name(path)} is a {type(value).__name__}: peers cannot exchange it")


def checked(
    optimizer: torch.optim.Optimizer, entries: Any, tensors: Sequence[torch.Tensor], *, own_options: bool
) -> dict[str, Any]:
    """What ``load_state_dict`` takes, of entries and tensors that a peer sent.

    They must fit the optimizer's state one by one. The order of parameters and how this machine computes stay its own;
    with ``own_options`` so do all options of the groups of parameters, such as the learning rate. Raises RemoteError,
    naming the place, for anything that does not fit.
    """
    own = optimizer.state_dict()
    places = list(leaves(own))
    if not isinstance(entries, list | tuple) or len(entries) != len(places):
        count = len(entries) if isinstance(entries, list | tuple) else "no"
        raise RemoteError(
            f"{count} values of optimizer state, {len(places)} expected: is it another optimizer?"
        )
    values: list[Any] = []
    used = 0
    for (path, ours), entry in zip(places, entries, strict=True):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if isinstance(ours, torch.Tensor):
            index = entry.get("index") if kind == "tensor" else None
            if index != used or isinstance(index, bool) or used >= len(tensors):
                raise RemoteError(f"optimizer state {_name(path)}: tensor {used} expected")
            check_tensor(f"optimizer state {_name(path)}", tensors[used], ours)
            values.append(tensors[used])
            used += 1
            continue
        if kind != "value" or "value" not in entry:
            raise RemoteError(f"optimizer state {_name(path)}: a value expected")
        theirs = entry["value"]
        if _is_own_choice(path):
            theirs = ours
        elif path[-2:-1] == ("params",) and theirs != ours:
            raise RemoteError(f"optimizer state {_name(path)}: the parameters are in another order")
        elif not _alike(ours, theirs):
            raise RemoteError(f"optimizer state {_name(path)}: {theirs!r:.60} instead of {ours!r:.60}")
        values.append(ours if own_options and path[0] == "param_groups" else theirs)
    if used != len(tensors):
        raise RemoteError(f"{len(tensors)} tensors of optimizer state, {used} expected")
    state: dict[str, Any] = rebuilt(own, iter(values))
    return state


def check_tensor(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """RemoteError unless ``theirs`` can take the place of ``ours``: its shape, floats for floats, and finite."""
    if theirs.shape != ours.shape:
        raise RemoteError(f"{name}: shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
    both_float = theirs.is_floating_point() and ours.is_floating_point()
    if not both_float and theirs.dtype != ours.dtype:
        raise RemoteError(f"{name}: {theirs.dtype} instead of {ours.dtype}")
    if both_float and not bool(torch.isfinite(theirs).all()):
        raise RemoteError(f"{name}: not finite")


def _is_own_choice(path: Path) -> bool:
    return path[0] == "param_groups" and path[-1] in _OWN_CHOICES


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether ``theirs`` may replace ``ours``: a number a number, else the same type."""
    if isinstance(ours, int | float) and not isinstance(ours, bool):
        return (
            isinstance(theirs, int | float)
            and not isinstance(theirs, bool)
            and (math.isfinite(theirs) or not math.isfinite(ours))
        )
    return type(theirs) is type(ours)


def _name(path: Path) -> str:
    return ".".join(map(str, path))
