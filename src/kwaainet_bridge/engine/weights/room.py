"""What files of the cache take, and which of them go when others need the room."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.weights.locks import lock_alone
from kwaainet_bridge.engine.weights.partial_file import LOCK, RECORD, USE, bytes_of
from kwaainet_bridge.errors import CheckpointError

log = logging.getLogger(__name__)


class Room:
    """The folder of a cache. ``quota``: most bytes in it; ``free`` tells the free bytes of its disk."""

    def __init__(self, folder: Path, quota: int | None, free: Callable[[Path], int]) -> None:
        self.folder = folder
        self._quota = quota
        self._free = free

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Nobody else decides within the block what there is room for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ("room" + LOCK)):
            yield

    def make(self, needed: int, *, keep: Collection[Path]) -> None:
        """Remove what was used longest ago, and neither in use nor in ``keep``, until ``needed`` bytes fit.

        Raises CheckpointError if they never will, and removes nothing then. To be called within :meth:`deciding`.
        """
        if not needed:
            return
        sizes = {path: bytes_of(path.with_name(path.name + RECORD)) for path in self._files()}
        idle = [path for path in sizes if path not in keep and _is_idle(path)]
        # what others are fetching is as good as there; an idle file waits for nothing that it may say
        coming = sum(
            bytes_of(path.with_name(path.name + RECORD), coming=True) - sizes[path]
            for path in sizes.keys() - idle
        )
        held, gone = sum(sizes.values()) + coming, sum(sizes[path] for path in idle)
        if self._lacks(held - gone, coming + needed - gone, needed):
            raise self._full(needed, held, gone)
        for path in sorted(idle, key=_last_use):
            if not self._lacks(held, coming + needed, needed):
                break
            if remove(path):
                log.info("%s makes room: it was used longest ago", path)
                held -= sizes[path]
        if self._lacks(held, coming + needed, needed):  # others have taken room or begun to use files
            raise self._full(needed, held, 0)

    def _lacks(self, held: int, of_the_disk: int, needed: int) -> bool:
        beyond = self._quota is not None and held + needed > self._quota
        return beyond or self._free(self.folder) < of_the_disk + defaults.DISK_RESERVE_BYTES

    def _full(self, needed: int, held: int, gone: int) -> CheckpointError:
        quota = "" if self._quota is None else f", its quota is {_mib(self._quota)}"
        return CheckpointError(
            f"{_mib(needed)} of weights do not fit into {self.folder}: it holds {_mib(held)}, {_mib(gone)} of which "
            f"are not in use{quota}, and its disk has {_mib(self._free(self.folder))} left, of which "
            f"{_mib(defaults.DISK_RESERVE_BYTES)} stay free. Serve fewer blocks, raise model.cache_quota_gib, free the "
            "disk, or give another model.cache_dir"
        )

    def _files(self) -> list[Path]:
        found = (
            record.with_name(record.name.removesuffix(RECORD))
            for record in self.folder.glob(f"*/*/*{RECORD}")
        )
        return [path for path in found if path.is_file()]


def _mib(count: int) -> str:
    return f"{count / defaults.MIB:.1f} MiB"


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


def _is_idle(path: Path) -> bool:
    with _exclusive(path) as alone:
        return alone


def remove(path: Path) -> bool:
    """Whether nobody uses the file, so that it could be removed."""
    with _exclusive(path) as alone:
        if alone:
            path.with_name(path.name + RECORD).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return alone


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether nobody fetches the file or reads it; nobody begins to within the block."""
    try:
        with (
            FileLock(path.with_name(path.name + LOCK)).acquire(timeout=0),
            path.with_name(path.name + USE).open("ab") as use,
        ):
            yield lock_alone(use)
    except Timeout:
        yield False
