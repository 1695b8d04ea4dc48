"""What must hold of the models of one node together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kwaainet_bridge.config.values import EMBEDDED_MODEL
from kwaainet_bridge.config.work import ModelConfig
from kwaainet_bridge.errors import ConfigError


def check_together(models: Sequence[ModelConfig], *, kwaainet: bool) -> None:
    """Raise ValueError for models that cannot be served side by side. ``kwaainet``: whether blocks are served there."""
    by_name: dict[str, list[ModelConfig]] = defaultdict(list)
    for model in models:
        for name in dict.fromkeys((_called(model), model.key)):
            by_name[name].append(model)
    for called, same in by_name.items():
        if len(same) > 1:
            shown = ", ".join(f"{model.name} ({model.blocks or 'all blocks'})" for model in same)
            raise ValueError(
                f"models: the blocks of {shown} would have the same names, {called}: make one entry with all their "
                "blocks of it, or give each another dht_prefix"
            )
    in_kwaainet = [model.key for model in models if "kwaainet" in model.networks]
    if kwaainet and len(in_kwaainet) > 1:
        raise ValueError(
            f"models: KwaaiNet's requests name no model, so only one of {', '.join(in_kwaainet)} can be served there: "
            "set networks: [petals] for the others, or protocols.kwaai_inference to false"
        )
    threads = {model.threads for model in models if model.threads is not None}
    if len(threads) > 1:
        raise ValueError(
            f"models: threads are {', '.join(map(str, sorted(threads)))}, but torch has one number of them for all "
            "models of a process: give the same everywhere"
        )
    if len(split := [model.key for model in models if model.tensor_parallel > 1]) > 1:
        raise ValueError(
            f"models: only one model of a node can be split, and {', '.join(split)} have tensor_parallel above 1"
        )


def _called(model: ModelConfig) -> str:
    """What tells apart, before a checkpoint is read, how models will be called."""
    return model.dht_prefix or model.name.rstrip("/").rpartition("/")[2].replace(".", "-")


def pick_model(raw: Mapping[str, Any], asked: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The configuration ``raw``, with ``models``, as one of that model which the command line asks for.

    It is the entry of that name, or of that name and ``dht_prefix``; one that is not listed has default settings. Names
    of folders are relative to ``folder``. Raises ConfigError if it is not clear which entry is meant.
    """
    listed = [entry for entry in raw["models"] if isinstance(entry, dict)]
    name, prefix = asked.get("name"), asked.get("dht_prefix")
    found = listed
    if name is not None:
        found = [entry for entry in listed if _same(entry.get("name", EMBEDDED_MODEL), name, folder)]
        if len(found) > 1 and prefix is not None:
            found = [entry for entry in found if entry.get("dht_prefix") == prefix]
    if len(found) > 1 or (name is None and not found):
        names = ", ".join(str(entry.get("name", EMBEDDED_MODEL)) for entry in listed)
        raise ConfigError(
            f"the configuration has several models ({names}): say with --model which one is meant"
        )
    rest = {key: value for key, value in raw.items() if key != "models"}
    return {**rest, "model": found[0] if found else {}}


def _same(entry: Any, name: str, folder: Path | None) -> bool:
    if not isinstance(entry, str):
        return False
    return entry == name or (
        folder is not None and (folder / Path(entry).expanduser()).absolute() == Path(name)
    )
