"""``kwaainet-bridge config migrate``: a configuration file of an older layout in the present one."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import typer
import yaml

from kwaainet_bridge.config import parse_config
from kwaainet_bridge.config.layouts import MIGRATIONS, Migration, layout_of, migrated, present
from kwaainet_bridge.config.reading import read_yaml
from kwaainet_bridge.errors import ConfigError


def migrate(path: Path, *, check: bool, migrations: Sequence[Migration] = MIGRATIONS) -> bool:
    """Write the file in the present layout, its old text beside it with ``.bak`` at the end; print what changes.

    ``check``: only print. Returns whether the file had the present layout. Raises ConfigError for one that cannot be
    read, that has a mistake, or whose ``.bak`` is there already: nothing is written then.
    """
    text, raw = read_yaml(path)
    before, now = layout_of(raw, str(path), migrations), present(migrations)
    if before == now:
        typer.echo(f"{path}: has the present layout, {now}")
        return True
    new = migrated(raw, str(path), migrations)
    written = yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
    if migrations is MIGRATIONS:
        parse_config(written, f"{path} in layout {now}", folder=path.parent)
    backup = path.with_name(f"{path.name}.bak")
    for line in difflib.unified_diff(
        text.splitlines(),
        written.splitlines(),
        f"{path} (layout {before})",
        f"{path} (layout {now})",
        lineterm="",
    ):
        typer.echo(line)
    if check:
        return False
    try:
        _write(backup, text, like=path)
        try:
            _replace(path.resolve(), written)
        except OSError:
            backup.unlink()
            raise
    except FileExistsError as e:
        raise ConfigError(f"{backup} exists already: move it away, and try again") from e
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e
    typer.echo(f"{path}: now of layout {now}; as it was, with its comments, it is {backup}")
    return False


def _replace(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old one or the new one whole; it keeps its owner and its mode."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    _write(beside, text, like=path)
    try:
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _write(path: Path, text: str, *, like: Path) -> None:
    """Make a file with the owner and the mode of ``like``; until it has both it is this user's alone."""
    path.touch(mode=0o600, exist_ok=False)
    try:
        path.write_text(text, encoding="utf-8")
        status = like.stat()
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):  # who may not give it away owns it
                os.chown(path, status.st_uid, status.st_gid)
        path.chmod(status.st_mode & 0o777)
    except OSError:
        path.unlink(missing_ok=True)
        raise
