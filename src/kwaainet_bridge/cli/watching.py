"""Something that a running node tells of itself, printed once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.admin_client import asking
from kwaainet_bridge.cli.printing import console
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import RemoteError


@dataclass(frozen=True, slots=True)
class View:
    """What the node answers at ``path`` in version ``schema``, and what prints it.

    ``draw`` raises KeyError or its kin for an object that is none.
    """

    path: str
    schema: int
    draw: Callable[[dict[str, Any], Console], None]


def show_view(config: NodeConfig, view: View, *, watch: bool, as_json: bool) -> None:
    """Print a view of the node with this configuration, again and again if it is to be watched, until Ctrl-C.

    Raises ConfigError if the node has no admin side or wants another token; NetworkError if none answers; RemoteError
    if it answers something else.
    """
    out = console()
    with asking(config) as node:
        while True:
            told = node.get(view.path)
            if as_json:
                typer.echo(json.dumps(told))
            else:
                if watch and out.is_terminal:
                    out.clear()
                check_schema(told, view.schema)
                try:
                    view.draw(told, out)
                except (KeyError, TypeError, AttributeError, ValueError) as e:
                    name = view.path.rpartition("/")[2]
                    raise RemoteError(f"what answered sent no {name} of a node: {e!r:.200}") from e
            if not watch:
                return
            try:
                time.sleep(defaults.STATUS_WATCH_SECONDS)
            except KeyboardInterrupt:
                return


def check_schema(told: dict[str, Any], schema: int) -> None:
    """Raise RemoteError for an answer of another version."""
    if told.get("schema") != schema:
        raise RemoteError(
            f"the node is of another version (it answers in schema {told.get('schema')!r:.40}): use its own "
            "kwaainet-bridge, or --json"
        )
