"""A configuration that is read again while the node runs: what has changed, and what of it can change now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kwaainet_bridge.config import ModelConfig, NodeConfig

LIVE: Final = ("limits", "idle", "peers", "log.level", "model.public_name", "models.*.public_name")
"""Keys, and sections, that apply while a node runs; any other needs a restart. docs/operating.md has the same list."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Keys whose values in the file were others than those that the node had: ``applied`` now, or not before a
    ``restart``."""

    applied: tuple[str, ...]
    restart: tuple[str, ...]


def compare(running: NodeConfig, wanted: NodeConfig) -> Reloaded:
    """What would become of ``wanted`` in a node that runs with ``running``."""
    keys = sorted(set(changed_keys(running, wanted)))
    applied = tuple(key for key in keys if _is_live(key))
    return Reloaded(applied, tuple(key for key in keys if key not in applied))


def merged(running: NodeConfig, wanted: NodeConfig) -> NodeConfig:
    """``running`` with what applies of ``wanted``: what the node runs with after that."""
    names = {model.key: model.public_name for model in wanted.served_models}

    def renamed(model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"public_name": names.get(model.key, model.public_name)})

    return running.model_copy(
        update={
            "limits": wanted.limits,
            "idle": wanted.idle,
            "peers": wanted.peers,
            "log": running.log.model_copy(update={"level": wanted.log.level}),
            "model": None if running.model is None else renamed(running.model),
            "models": tuple(map(renamed, running.models)),
        }
    )


def changed_keys(before: NodeConfig, after: NodeConfig) -> Iterator[str]:
    """The full names of keys with other values. Of a list of models that of each entry, by what the model is called.

    Lists are compared whole otherwise, as are sections that are off in one of the two.
    """
    yield from _changed(_settings(before), _settings(after), ())


def _settings(config: NodeConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    settings["models"] = {
        model.key: entry for model, entry in zip(config.models, settings["models"], strict=True)
    }
    return settings


def _changed(before: Any, after: Any, path: Sequence[str]) -> Iterator[str]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield ".".join(path)
        return
    for key in dict.fromkeys((*before, *after)):
        if key in before and key in after:
            yield from _changed(before[key], after[key], (*path, key))
        else:
            yield ".".join((*path, key))


def _is_live(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "models" and len(parts) > 2:  # what a model is called may have dots
        parts = ["models", "*", parts[-1]]
    key = ".".join(parts)
    return any(key == live or key.startswith(f"{live}.") for live in LIVE)
