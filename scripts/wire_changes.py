"""The difference of two sets of golden values, as lines to read."""

from __future__ import annotations

from typing import Any


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> value. Entries of a list go by what names them, so that a missing one does not shift the others."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        items = [(entry_name(v, i), v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {p: leaf for key, v in items for p, leaf in leaves(v, (*path, key)).items()}


def entry_name(entry: dict[str, Any], index: int) -> str:
    """The name of a vector is its tensor and codec, or the Python text of its value; else its place."""
    if "py" in entry:
        return entry["py"]
    return f"{entry['name']} {entry['type']}" if "name" in entry and "type" in entry else str(index)


def wire_changes(recorded: Any, made: Any, *, whole: bool) -> list[str]:
    """One line for each value of ``made`` that is not the recorded one. ``whole``: also for those that it lacks."""
    old, new = leaves(recorded), leaves(made)
    paths = [*new, *(p for p in old if whole and p not in new)]
    return [change(path, old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)]


def change(path: tuple[str, ...], old: Any, new: Any) -> str:
    return f"{' / '.join(path)}: {'+' if old is None else '-' if new is None else '~'} {difference(old, new)}"


def difference(old: Any, new: Any) -> str:
    """Long hex is shown from shortly before its first different byte."""
    if old is None or new is None:
        return shortened(str(new if old is None else old))
    if isinstance(old, str) and isinstance(new, str) and max(len(old), len(new)) > 80:
        at = first_difference(old, new) // 2
        lengths = f"{len(old) // 2} -> {len(new) // 2} bytes, " if len(old) != len(new) else ""
        start = max(0, 2 * at - 8)
        return f"{lengths}from byte {at}: …{shortened(old[start:])} -> …{shortened(new[start:])}"
    return f"{old} -> {new}"


def first_difference(old: str, new: str) -> int:
    unequal = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    return next(unequal, min(len(old), len(new)))


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + "…"
