"""``kwaainet-bridge drain``, ``pause``, ``resume``, ``reload``: a running node is told what to do."""

from __future__ import annotations

import json
import time
from typing import Any

import typer

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.admin_client import NoAnswer, asking
from kwaainet_bridge.cli.printing import counted
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import NetworkError


def drain(config: NodeConfig, *, wait: bool, as_json: bool) -> None:
    """Have the node drain and end; with ``wait`` return once it has. Raises what asking a node raises."""
    with asking(config) as node:
        before = node.get("/api/status")
        answer = node.post("/api/drain")
        sessions = counted(answer["sessions"], "session")
        _tell(answer, f"drains: {sessions}, {answer['drain_seconds']:g} s at most for them", as_json=as_json)
    if wait:
        _wait_until_gone(config, before)
        if not as_json:
            typer.echo("has ended")


def _wait_until_gone(config: NodeConfig, before: dict[str, Any]) -> None:
    """Return once nobody answers there any more, or a node that has started since."""
    while True:
        time.sleep(defaults.CONTROL_PERIOD_SECONDS)
        try:
            with asking(config) as node:  # anew: a client that finds its socket gone leaves its own end open
                now = node.get("/api/status")
        except NoAnswer:  # it may be busy, or hang: it has not ended
            continue
        except NetworkError:
            return
        if now["uptime_seconds"] < before["uptime_seconds"]:
            return


def pause(config: NodeConfig, *, now: bool, as_json: bool) -> None:
    with asking(config) as node:
        answer = node.post("/api/pause", {"now": "true" if now else "false"})
        sessions = counted(answer["sessions"], "session")
        _tell(
            answer, f"paused; {sessions} {'to end now' if now else 'may go on to the end'}", as_json=as_json
        )


def resume(config: NodeConfig, *, as_json: bool) -> None:
    with asking(config) as node:
        _tell(node.post("/api/resume"), "takes work again", as_json=as_json)


def reload(config: NodeConfig, *, as_json: bool) -> None:
    with asking(config) as node:
        answer = node.post("/api/reload", seconds=defaults.RELOAD_SECONDS)
        lines = []
        if answer["applied"]:
            lines.append(f"applied        {', '.join(answer['applied'])}")
        if answer["restart"]:
            lines.append(f"needs restart  {', '.join(answer['restart'])}")
        _tell(answer, "\n".join(lines) or "nothing has changed", as_json=as_json)


def _tell(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(answer) if as_json else text)
