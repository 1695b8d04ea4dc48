"""``kwaainet-bridge peers``, ``sessions``, ``blocks`` and ``logs``: their options. The work is done elsewhere."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.options import ConfigOption, JsonOption, load

if TYPE_CHECKING:
    from pathlib import Path

    from kwaainet_bridge.cli.watching import View

WatchOption = Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds, until Ctrl-C.")]


class Level(StrEnum):
    """What ``logs --level`` takes."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def peers(config: ConfigOption = None, watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """Show the peers that a running node is connected with, and those that it turned away or could not reach."""
    from kwaainet_bridge.cli.views import PEERS

    _show(config, PEERS, watch=watch, as_json=as_json)


def sessions(config: ConfigOption = None, watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """Show the sessions that a running node serves, and those in which it generates text itself."""
    from kwaainet_bridge.cli.views import SESSIONS

    _show(config, SESSIONS, watch=watch, as_json=as_json)


def blocks(config: ConfigOption = None, watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """Show the blocks that a running node serves or loads, and what each takes in memory."""
    from kwaainet_bridge.cli.views import BLOCKS

    _show(config, BLOCKS, watch=watch, as_json=as_json)


def logs(
    config: ConfigOption = None,
    level: Annotated[Level, typer.Option(help="Leave out what is less grave.")] = Level.debug,
    last: Annotated[
        int, typer.Option(min=0, max=defaults.LOG_ANSWER_RECORDS, help="How many of the newest records.")
    ] = defaults.LOG_RECORDS,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with those that come, until Ctrl-C.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the newest records of a running node's log."""
    from kwaainet_bridge.cli.log_view import show_logs

    show_logs(load(config, {}), level=level.value, last=last, follow=follow, as_json=as_json)


def _show(config: Path | None, view: View, *, watch: bool, as_json: bool) -> None:
    from kwaainet_bridge.cli.watching import show_view

    show_view(load(config, {}), view, watch=watch, as_json=as_json)


def add_view_commands(app: typer.Typer) -> None:
    """Put them among the commands of ``app``."""
    for command in (peers, sessions, blocks, logs):
        app.command()(command)
