"""Tree steps between nodes of this package: docs/protocols/tree-steps.md. Stock servers and clients know none of it.

A server announces in ``rpc_info`` that it takes them; only then a client puts the key into the metadata of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import Refusal

KEY = "kwaainet_bridge_tree"
"""In the map of rpc_info and in the metadata of a step."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class TreeFields:
    """What a step's metadata says of trees, see ``Session.step``. Numbers are checked there, against the session."""

    parents: tuple[int, ...] | None = None
    accept: tuple[int, ...] = ()


def announcement() -> dict[str, int]:
    """The value in the map of rpc_info."""
    return {"version": VERSION, "max_tokens": defaults.MAX_TREE_TOKENS}


def announced(info: dict[Any, Any]) -> int:
    """How many tokens a tree may have for a server with this rpc_info: 0 if it takes none, or others than ours."""
    value = info.get(KEY)
    if not isinstance(value, dict) or value.get("version") != VERSION:
        return 0
    most = value.get("max_tokens")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        return 0
    return min(most, defaults.MAX_TREE_TOKENS)


def to_metadata(fields: TreeFields) -> dict[str, Any]:
    """What is added to a step's metadata: nothing where there is neither a tree nor a path."""
    value: dict[str, list[int]] = {}
    if fields.parents is not None:
        value["parents"] = list(fields.parents)
    if fields.accept:
        value["accept"] = list(fields.accept)
    return {KEY: value} if value else {}


def from_metadata(raw: dict[str, Any]) -> TreeFields:
    """Read a step's metadata. Raises Refusal that names what is wrong."""
    if KEY not in raw:
        return TreeFields()
    value = raw[KEY]
    if not isinstance(value, dict):
        raise Refusal(f"metadata: {KEY} has type {type(value).__name__}, expected a map", kind="ValueError")
    for name in value:
        if name not in ("parents", "accept"):
            raise Refusal(f"metadata: {KEY} has the unknown key {name!r:.40}", kind="ValueError")
    parents = _numbers(value["parents"], "parents") if "parents" in value else None
    return TreeFields(parents, _numbers(value.get("accept", ()), "accept"))


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Refusal(
            f"metadata: {KEY}.{name} has type {type(value).__name__}, expected a list", kind="ValueError"
        )
    if len(value) > defaults.MAX_TREE_TOKENS:
        raise Refusal(
            f"metadata: {KEY}.{name} has {len(value)} entries, at most {defaults.MAX_TREE_TOKENS} are taken",
            kind="ValueError",
        )
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool):
            raise Refusal(
                f"metadata: {KEY}.{name} holds {number!r:.40}, expected integers", kind="ValueError"
            )
    return tuple(value)
