"""How values and times from peers are shown: nothing that they hold reaches the terminal as a command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Final

import msgpack
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kwaainet_bridge.wire.msgpack import DictionaryValue

_PIPE_COLUMNS: Final = 4096  # where no terminal wraps lines, nothing else does


def printable(text: str, *, limit: int | None = None) -> str:
    """``text`` on one line, without what moves the cursor, hides or turns text; cut to ``limit`` characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def jsonable(value: Any) -> Any:
    """A msgpack value as JSON has it.

    Tuples become lists; bytes ``{"bytes": text}`` if they are text, else ``{"hex": digits}``; numbers that JSON
    lacks their names as text; keys of maps text; tensor descriptors maps of their fields.
    """
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return _bytes(value)
        case tuple() | list():
            return [jsonable(item) for item in value]
        case dict():
            return {key if isinstance(key, str) else _key(key): jsonable(item) for key, item in value.items()}
        case DictionaryValue():
            return {"entries": [jsonable(entry) for entry in value.entries]}
        case msgpack.Timestamp():
            return {"timestamp": value.to_unix()}
    return {key: jsonable(item) for key, item in dataclasses.asdict(value).items()}


def _bytes(value: bytes) -> dict[str, str]:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}
    return {"bytes": text} if text.isprintable() else {"hex": value.hex()}


def _key(key: bytes) -> str:
    (shown,) = _bytes(key).values()
    return shown


def as_text(value: Any) -> str:
    """A msgpack value on one line: JSON, which tells text from numbers."""
    return printable(json.dumps(jsonable(value), ensure_ascii=False))


def expiry(expiration: float, now: float) -> dict[str, Any]:
    """A time of expiration in unix seconds as JSON: from now, and as UTC time; null what no calendar holds."""
    seconds = expiration - now
    return {
        "expires_in": round(seconds, 3) if math.isfinite(seconds) else None,
        "expires_at": _utc(expiration),
    }


def _utc(expiration: float) -> str | None:
    try:
        return datetime.fromtimestamp(expiration, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def expiry_text(expires: dict[str, Any]) -> str:
    """What :func:`expiry` gives, for people."""
    if expires["expires_at"] is None:
        return "never"
    return f"in {expires['expires_in']:.1f} s, {expires['expires_at'].replace('T', ' ').removesuffix('+00:00')} UTC"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def console() -> Console:
    """Standard output: the terminal's width, or no wrapping at all where it is no terminal."""
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    return (
        out if out.is_terminal else Console(width=_PIPE_COLUMNS, highlight=False, markup=False, emoji=False)
    )


def print_table(
    out: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, fixed: Collection[str] = ()
) -> None:
    """A table without frames. Cells are plain text, made printable here; a column without any text is left out.

    Where the terminal is too narrow, other columns than those in ``fixed`` are folded first.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown = [column for column, _ in enumerate(columns) if any(row[column] for row in rows)]
    for column in shown:
        name = columns[column]
        table.add_column(Text(name), overflow="fold", no_wrap=name in fixed)
    for row in rows:
        table.add_row(*(Text(printable(row[column])) for column in shown))
    out.print(table)


def spinner(what: str) -> AbstractContextManager[Any]:
    """Shows that something is going on, on standard error; nothing where it is no terminal."""
    err = Console(stderr=True)
    return err.status(what) if err.is_terminal else contextlib.nullcontext()
