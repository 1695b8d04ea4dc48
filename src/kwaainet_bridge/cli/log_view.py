"""``kwaainet-bridge logs``: the newest records of a running node's log, and those that come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import httpx
import typer
from rich.console import Console
from rich.text import Text

from kwaainet_bridge import defaults
from kwaainet_bridge.cli.admin_client import AdminClient, asking
from kwaainet_bridge.cli.printing import console, printable
from kwaainet_bridge.cli.views import SCHEMA
from kwaainet_bridge.cli.watching import check_schema
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import NetworkError, RemoteError

_PATH: Final = "/api/logs"

_COLOURS: Final = {
    "debug": "dim",
    "info": "green",
    "warning": "yellow",
    "error": "red",
    "critical": "bold red",
}


def show_logs(config: NodeConfig, *, level: str, last: int, follow: bool, as_json: bool) -> None:
    """Print the newest ``last`` records of this level and above; with ``follow`` those that come, too, until Ctrl-C.

    Raises ConfigError if the node has no admin side, wants another token or keeps no records; NetworkError if none
    answers, or if it stops while it is followed; RemoteError if it answers something else.
    """
    out = console()
    params = {"level": level, "last": str(last)}
    with asking(config) as node:
        if not follow:
            told = node.get(_PATH, params)
            if as_json:
                typer.echo(json.dumps(told))
                return
            check_schema(told, SCHEMA)
            with _taken_for_records():
                _draw(told, out)
            return
        try:
            for record in _followed(node, params | {"follow": "1"}):
                if as_json:
                    typer.echo(json.dumps(record))
                    continue
                with _taken_for_records():
                    _draw_record(record, out)
        except KeyboardInterrupt:
            return


def _followed(node: AdminClient, params: dict[str, str]) -> Iterator[dict[str, Any]]:
    silence = 3 * defaults.LOG_SILENCE_SECONDS
    timeout = httpx.Timeout(defaults.STATUS_SECONDS, read=silence)
    with (
        node.failures_told(silence),
        node.client.stream("GET", _PATH, params=params, timeout=timeout) as answer,
    ):
        if not answer.is_success:
            answer.read()
            if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                raise NetworkError(f"the node at {node.where} says: {answer.text.strip()[:200]}")
            node.json_of(answer)
        for line in answer.iter_lines():
            if line.strip():
                yield _record(line, node.where)
    raise NetworkError(f"the node at {node.where} has ended the log: it has stopped")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise RemoteError(f"what answers at {where} is no node: {line[:100]!r}") from e
    if not isinstance(record, dict):
        raise RemoteError(f"what answers at {where} is no node: {line[:100]!r}")
    return record


@contextmanager
def _taken_for_records() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise RemoteError(f"what answered sent no records of a log: {e!r:.200}") from e


def _draw(told: dict[str, Any], out: Console) -> None:
    if told["missed"]:
        _say(out, f"{told['missed']} older records are kept no longer")
    if told["left_out"]:
        _say(out, f"{told['left_out']} older records are left out: --last shows more")
    for record in told["records"]:
        _draw_record(record, out)


def _say(out: Console, text: str) -> None:
    out.print(Text(printable(text), style="dim"), soft_wrap=True)


def _draw_record(record: dict[str, Any], out: Console) -> None:
    if "missed" in record:
        _say(out, f"{int(record['missed'])} records came too fast to be shown")
        return
    at = datetime.fromtimestamp(float(record["at"]), UTC).isoformat(sep=" ", timespec="milliseconds")
    level = str(record["level"])
    line = Text()
    line.append(at.removesuffix("+00:00") + " ", style="dim")
    line.append(f"{printable(level, limit=8):<8} ", style=_COLOURS.get(level, ""))
    line.append(printable(record["event"]), style="bold")
    for name, value in record["fields"].items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        line.append(f" {printable(str(name))}=", style="cyan")
        line.append(printable(shown))
    line.append(f" [{printable(record['logger'])}]", style="dim")
    out.print(line, soft_wrap=True)
    for trace in (record["exception"] or "").splitlines():
        out.print(Text(f"    {printable(trace)}"), soft_wrap=True)
