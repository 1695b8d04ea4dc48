"""Tensors of hub repositories on this machine's disk: those that are needed are fetched, and old ones make room."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.config import Storage
from kwaainet_bridge.engine.weights.header import Place, length_of, places_in
from kwaainet_bridge.engine.weights.hub import Changed, HttpHub, Hub, Interrupted, NoRanges, RemoteFile
from kwaainet_bridge.engine.weights.partial_file import PartialFile, Range, merged
from kwaainet_bridge.engine.weights.room import Room
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

log = logging.getLogger(__name__)

Fetched = Callable[[int, int], None]
"""Told how many bytes of how many have been fetched."""


def default_folder() -> Path:
    """Where weights are kept unless the configuration says: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kwaainet-bridge" / "weights"


def free_bytes(folder: Path) -> int:
    """What is left on the disk of a folder."""
    return shutil.disk_usage(folder).free


class WeightCache:
    """A folder with files of which only needed tensors are there. Several processes may use it.

    What this one has asked for is not removed by others before :meth:`close`. By itself it is, when there is no other
    room and other tensors are fetched: those before are in memory by then. ``quota``: most bytes that the folder may
    hold. ``wait`` sleeps, ``free`` tells the free bytes of a folder's disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        quota: int | None = None,
        hub: Hub | None = None,
        wait: Callable[[float], None] = time.sleep,
        free: Callable[[Path], int] = free_bytes,
        rng: random.Random | None = None,
    ) -> None:
        self.folder = folder or default_folder()
        self._hub = hub or HttpHub()
        self._wait = wait
        self._rng = rng or random.Random()
        self._room = Room(self.folder, quota, free)
        self._files: dict[tuple[str, str, str], PartialFile | Path | None] = {}
        self._fetching: list[PartialFile] = []

    def path(self, repository: str, name: str, commit: str) -> Path | None:
        """Where the file lies, with its header at least; None if the repository has no such file."""
        with self._disk_errors():
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
        with self._disk_errors():
            found = {name: self._find(repository, name, commit) for name in tensors}
            files = {name: file for name, file in found.items() if isinstance(file, PartialFile)}
            with self._using(files.values()):
                missing = [
                    (file, file.missing(self._ranges(file, tensors[name]))) for name, file in files.items()
                ]
                total = sum(stop - start for _, ranges in missing for start, stop in ranges)
                with self._room.deciding():
                    self._make_room(total)
                    for file, ranges in missing:
                        file.want(sum(stop - start for start, stop in ranges))
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

    def close(self) -> None:
        """Others may remove what this one has used."""
        for file in self._files.values():
            if isinstance(file, PartialFile):
                file.release()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise CheckpointError(
                f"weights cannot be kept in {self.folder}: {e}. Make room, see whether it can be written, "
                "or give another model.cache_dir"
            ) from e

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
            remote = self._describe(repository, name, commit)
            if remote is None:
                return None
            file = PartialFile(path, remote)
        return file

    @contextmanager
    def _using(self, files: Iterable[PartialFile]) -> Iterator[None]:
        """No other process writes these within the block, or removes them later. What is there is known then."""
        with ExitStack() as locks:
            for file in sorted(files, key=lambda file: file.path):
                file.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    locks.enter_context(file.lock.acquire(timeout=0))
                except Timeout:
                    log.info("another process fetches %s: waiting for it", file.path)
                    locks.enter_context(file.lock.acquire())
                self._fetching.append(file)
                locks.callback(self._fetching.remove, file)
                file.use()
                file.open()
                locks.callback(file.want, 0)
            yield

    def _make_room(self, needed: int) -> None:
        keep = {file.path for file in self._fetching}
        try:
            self._room.make(needed, keep=keep)
        except CheckpointError:
            before = [file for file in self._files.values() if isinstance(file, PartialFile)]
            for file in before:
                if file.path not in keep:
                    file.release()
            self._room.make(needed, keep=keep)

    def _header(self, file: PartialFile) -> dict[str, Place]:
        """Where each tensor lies. Raises CheckpointError for what is no header of safetensors."""
        if file.places is None:
            size, shown = file.remote.size, file.remote.shown
            self._have(file, 0, min(size, defaults.DOWNLOAD_CHUNK_BYTES))
            with file.path.open("rb") as data:
                length = length_of(data.read(8), size, shown)
                self._have(file, 0, 8 + length)
                data.seek(8)
                file.places = places_in(data.read(length), size, shown)
        return file.places

    def _ranges(self, file: PartialFile, names: Iterable[str]) -> list[Range]:
        places = self._header(file)
        lacking = [name for name in names if name not in places]
        if lacking:
            raise CheckpointError(
                f"{lacking[0]} is not in {file.remote.shown}, where the index puts it: the repository is broken"
            )
        return merged((places[name][:2] for name in names), gap=defaults.DOWNLOAD_GAP_BYTES)

    def _have(self, file: PartialFile, start: int, stop: int) -> None:
        for first, last in file.missing([(start, stop)]):
            for _ in self._download(file, first, last):
                pass

    # --- the hub

    def _describe(self, repository: str, name: str, commit: str) -> RemoteFile | None:
        failures = 0
        while True:
            try:
                return self._hub.describe(repository, name, commit)
            except Interrupted as e:
                failures += 1
                self._pause(f"{repository}/{name}", failures, e)

    def _download(self, file: PartialFile, start: int, stop: int) -> Iterable[int]:
        """Fetch a range, with new tries from where it stands as long as each brings something, or few have failed."""
        shown, furthest, failures, whole = file.remote.shown, start, 0, False
        while start < stop:
            try:
                for count in file.write(start, self._hub.read(file.remote, start, stop)):
                    start += count
                    if start > furthest:
                        furthest, failures = start, 0
                    yield count
            except NoRanges:
                log.warning("%s: the server gives whole files only", shown)
                with self._room.deciding():
                    file.want(0)
                    self._make_room(file.lacking_bytes)
                    file.want(file.lacking_bytes)
                whole, start, furthest, stop = True, 0, 0, file.remote.size
            except Changed as e:
                file.forget()
                raise CheckpointError(
                    f"{shown} is another file on the server than the one that was begun: what was there is removed, "
                    "start again"
                ) from e
            except Interrupted as e:
                failures += 1
                self._pause(shown, failures, e)
                if whole:
                    start = 0

    def _pause(self, shown: str, failures: int, error: Interrupted) -> None:
        if failures > defaults.DOWNLOAD_TRIES:
            raise ModelUnreachable(
                f"{shown} cannot be fetched ({error}): what has come is kept, check the connection and start again, "
                "or give a local model folder"
            ) from error
        pause = min(defaults.DOWNLOAD_MAX_PAUSE_SECONDS, 2.0 ** (failures - 1)) * self._rng.uniform(0.5, 1.0)
        log.info("%s: %s; again in %.1f s", shown, error, pause)
        self._wait(pause)


def cache_of(storage: Storage) -> WeightCache:
    """Where the configuration has tensors kept. To be closed."""
    return WeightCache(storage.cache_dir, quota=storage.cache_quota)
