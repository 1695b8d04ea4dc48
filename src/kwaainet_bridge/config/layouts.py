"""Layouts of configuration files: which one a file has, and how one of an older layout becomes one of the present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from kwaainet_bridge.errors import ConfigError

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Gives what the keys of a file become in the next layout. It does not change what it is given."""

MIGRATIONS: Final[tuple[Migration, ...]] = ()
"""The first leads from layout 1 to 2, and so on. So far no key was ever renamed, moved or given another meaning."""

VERSION: Final = "version"


def present(migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """The layout that this program reads."""
    return 1 + len(migrations)


def layout_of(raw: dict[str, Any], source: str, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """The layout of a file with these keys; without a ``version`` it is the first.

    Raises ConfigError for what is no number of a layout, and for a layout that is newer than this program.
    """
    version = raw.get(VERSION, 1)
    newest = present(migrations)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"{source}:\n  version: must be a number from 1 to {newest} (found {version!r})")
    if version > newest:
        raise ConfigError(
            f"{source}:\n  version: the file has layout {version}, and this program reads {newest} at most: take a "
            "newer kwaainet-bridge, or the file as it was before"
        )
    return version


def check_layout(raw: dict[str, Any], source: str, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Raise ConfigError for a file whose layout is not the present one."""
    version = layout_of(raw, source, migrations)
    if version < present(migrations):
        raise ConfigError(
            f"{source}:\n  version: the file has layout {version}, and this program reads {present(migrations)}: "
            f"kwaainet-bridge config migrate {source}"
        )


def migrated(
    raw: dict[str, Any], source: str, migrations: Sequence[Migration] = MIGRATIONS
) -> dict[str, Any]:
    """The same keys in the present layout; those of a file that has it are returned as they are. Raises ConfigError."""
    version = layout_of(raw, source, migrations)
    if version == present(migrations):
        return raw
    for migrate in migrations[version - 1 :]:
        raw = migrate(raw)
    return {VERSION: present(migrations), **{key: value for key, value in raw.items() if key != VERSION}}
