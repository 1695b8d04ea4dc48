"""Tensors of hub repositories on this machine's disk: those that are needed are fetched, and old ones make room."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.hub import HttpHub, Hub, Interrupted, NoRanges
from kwaainet_bridge.engine.partial_file import RECORD, PartialFile, Range, bytes_of, merged
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

log = logging.getLogger(__name__)

Fetched = Callable[[int, int], None]
"""Told how many bytes of how many have been fetched."""


def default_folder() -> Path:
    """Where weights are kept unless the configuration says: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kwaainet-bridge" / "weights"


class WeightCache:
    """A folder with files of which only needed tensors are there. Several processes may use it.

    ``quota``: most bytes that it may hold; those used longest ago are removed first. ``wait`` sleeps, ``free`` tells
    the free bytes of a folder's disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        quota: int | None = None,
        hub: Hub | None = None,
        wait: Callable[[float], None] = time.sleep,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        rng: random.Random | None = None,
    ) -> None:
        self.folder = folder or default_folder()
        self._quota = quota
        self._hub = hub or HttpHub()
        self._wait = wait
        self._free = free
        self._rng = rng or random.Random()
        self._files: dict[tuple[str, str, str], PartialFile | Path | None] = {}

    def path(self, repository: str, name: str, commit: str) -> Path | None:
        """Where the file lies, with its header at least; None if the repository has no such file."""
        found = self._find(repository, name, commit)
        if isinstance(found, PartialFile):
            with self._using([found]):
                self._header(found)
            return found.path
        return found

    def fetch(self, repository: str, commit: str, tensors: dict[str, list[str]], told: Fetched) -> None:
        """Have these tensors, by file, on the disk. Raises CheckpointError that says what to do.

        ``told`` hears of progress, and ends it by raising; what has come is kept.
        """
        found = {name: self._find(repository, name, commit) for name in tensors}
        files = {name: file for name, file in found.items() if isinstance(file, PartialFile)}
        with self._using(files.values()):
            missing = [
                (file, file.missing(self._ranges(file, tensors[name]))) for name, file in files.items()
            ]
            total = sum(stop - start for _, ranges in missing for start, stop in ranges)
            self._make_room(total, keep={file.path for file in files.values()})
            done = 0
            told(0, total)
            for file, ranges in missing:
                for start, stop in ranges:
                    for count in self._download(file, start, stop):
                        done = min(total, done + count)  # a server without ranges sends more
                        told(done, total)
                if ranges:
                    file.check_whole()
                os.utime(file.path)  # it was used

    def _find(self, repository: str, name: str, commit: str) -> PartialFile | Path | None:
        key = repository, name, commit
        if key not in self._files:
            self._files[key] = self._open(repository, name, commit)
        return self._files[key]

    def _open(self, repository: str, name: str, commit: str) -> PartialFile | Path | None:
        local = self._hub.local(repository, name, commit)
        if local is not None:
            return local
        path = self.folder / repository.replace("/", "--") / commit / name
        file = PartialFile.known(path, repository, name, commit)
        if file is None:
            remote = self._hub.describe(repository, name, commit)
            if remote is None:
                return None
            file = PartialFile(path, remote)
        return file

    @contextmanager
    def _using(self, files: Iterable[PartialFile]) -> Iterator[None]:
        """No other process writes or removes these within the block. What is there already is known then."""
        with ExitStack() as locks:
            for file in sorted(files, key=lambda file: file.path):
                file.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    locks.enter_context(file.lock.acquire(timeout=0))
                except Timeout:
                    log.info("another process fetches %s: waiting for it", file.path)
                    locks.enter_context(file.lock.acquire())
                file.open()
            yield

    def _header(self, file: PartialFile) -> dict[str, Range]:
        """Where each tensor lies. Raises CheckpointError for what is no header of safetensors."""
        size = file.remote.size
        self._have(file, 0, min(size, defaults.DOWNLOAD_CHUNK_BYTES))
        with file.path.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8).ljust(8, b"\0"))
            if not 0 < length <= min(size - 8, defaults.MAX_TENSOR_HEADER_BYTES):
                raise CheckpointError(f"{file.remote.shown} is no safetensors file")
            self._have(file, 0, 8 + length)
            data.seek(8)
            text = data.read(length)
        try:
            told = json.loads(text)
            told.pop("__metadata__", None)
            places = {name: tuple(int(at) for at in entry["data_offsets"]) for name, entry in told.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{file.remote.shown}: its header cannot be read: {e}") from e
        result = {}
        for name, place in places.items():
            if len(place) != 2 or not 0 <= place[0] <= place[1] <= size - 8 - length:  # two ends
                raise CheckpointError(f"{file.remote.shown}: {name} lies outside of the file")
            result[name] = (8 + length + place[0], 8 + length + place[1])
        return result

    def _ranges(self, file: PartialFile, names: Iterable[str]) -> list[Range]:
        places = self._header(file)
        lacking = [name for name in names if name not in places]
        if lacking:
            raise CheckpointError(
                f"{lacking[0]} is not in {file.remote.shown}, where the index puts it: the repository is broken"
            )
        return merged((places[name] for name in names), gap=defaults.DOWNLOAD_GAP_BYTES)

    def _have(self, file: PartialFile, start: int, stop: int) -> None:
        for first, last in file.missing([(start, stop)]):
            for _ in self._download(file, first, last):
                pass

    def _download(self, file: PartialFile, start: int, stop: int) -> Iterable[int]:
        """Fetch a range, with new tries from where it stands as long as each brings something, or few have failed."""
        failures = 0
        while start < stop:
            try:
                for count in file.write(start, self._hub.read(file.remote, start, stop)):
                    start += count
                    failures = 0
                    yield count
            except NoRanges:
                log.warning("%s: the server gives whole files only", file.remote.shown)
                yield from file.write(0, self._hub.read(file.remote, 0, file.remote.size))
                return
            except Interrupted as e:
                failures += 1
                if failures > defaults.DOWNLOAD_TRIES:
                    raise ModelUnreachable(
                        f"{file.remote.shown} cannot be fetched ({e}): what has come is kept, start again later"
                    ) from e
                pause = min(defaults.DOWNLOAD_MAX_PAUSE_SECONDS, 2.0 ** (failures - 1)) * self._rng.uniform(
                    0.5, 1.0
                )
                log.info("%s: %s; again in %.1f s", file.remote.shown, e, pause)
                self._wait(pause)

    # --- room

    def _make_room(self, needed: int, keep: set[Path]) -> None:
        """Remove what was used longest ago until ``needed`` bytes fit. Raises CheckpointError if they do not."""
        if not needed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {path: bytes_of(path.with_name(path.name + RECORD)) for path in self._all()}
        held = sum(kept.values())
        oldest = sorted((path for path in kept if path not in keep), key=lambda path: path.stat().st_mtime)

        def fits() -> bool:
            within = self._quota is None or held + needed <= self._quota
            return within and self._free(self.folder) >= needed + defaults.DISK_RESERVE_BYTES

        while not fits() and oldest:
            path = oldest.pop(0)
            if self._remove(path):
                log.info("%s makes room: it was used longest ago", path)
                held -= kept[path]
        if not fits():
            quota = "" if self._quota is None else f", its quota is {self._quota // defaults.MIB} MiB"
            raise CheckpointError(
                f"{needed // defaults.MIB + 1} MiB of weights do not fit into {self.folder}: it holds "
                f"{held // defaults.MIB} MiB{quota}, and its disk has "
                f"{self._free(self.folder) // defaults.MIB} MiB left. "
                "Serve fewer blocks, raise model.cache_quota_gib, or give another model.cache_dir"
            )

    def _all(self) -> list[Path]:
        records = self.folder.glob(f"*/*/*{RECORD}") if self.folder.is_dir() else ()
        return [
            path
            for record in records
            if (path := record.with_name(record.name.removesuffix(RECORD))).is_file()
        ]

    def _remove(self, path: Path) -> bool:
        """Whether nobody uses it, so that it could be removed."""
        lock = FileLock(path.with_name(path.name + ".lock"))
        try:
            with lock.acquire(timeout=0):
                path.with_name(path.name + RECORD).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except (Timeout, OSError):
            return False
        return True
