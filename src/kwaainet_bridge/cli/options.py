"""Options that several commands have, and the configuration that they and a file make together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kwaainet_bridge.config import (
    EMBEDDED_MODEL,
    NodeConfig,
    anchored,
    load_config,
    merge_settings,
    parse_config,
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (YAML).", dir_okay=False)
]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        "--bootstrap",
        help="Address of a peer of the swarm, or a preset (petals-public). May be repeated.",
        metavar="ADDR",
    ),
]


KwaaiOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kwaainet-peers",
        help="Address of a peer of a KwaaiNet swarm, or a preset (kwaainet-public). May be repeated.",
        metavar="ADDR",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def found_from_here(model: str | None) -> str | None:
    """A model's name; a folder's from the current folder, whereas names in a file are relative to that file."""
    if model is None or model == EMBEDDED_MODEL or not Path(model).is_dir():
        return model
    return str(Path(model).absolute())


def load(path: Path | None, overrides: dict[str, Any]) -> NodeConfig:
    if path is not None:
        return load_config(path, overrides)
    return anchored(parse_config("", "command line", overrides), Path.cwd())


def swarm_of(addresses: list[str] | None) -> dict[str, Any]:
    """Overrides that put ``addresses``, if there are any, in the place of the configuration's bootstrap peers."""
    return {"networks": {"petals": {"bootstrap": addresses}}} if addresses else {}


def networks_of(petals: list[str] | None, kwaainet: list[str] | None) -> dict[str, Any]:
    """The same for both networks."""
    overrides = swarm_of(petals)
    if kwaainet:
        overrides = merge_settings(overrides, {"networks": {"kwaainet": {"bootstrap": kwaainet}}})
    return overrides
