"""Weight files of which only parts are on the disk, and what is known of these parts.

A file has its full size and holes, so that safetensors reads it like any other. Beside it a record tells which ranges
are there, each with its SHA-256: a download that was cut off goes on from there, and a flipped bit is found at the next
start. Whoever reads tensors of a file says so by a shared lock on a third one, so that nobody removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from kwaainet_bridge import defaults
from kwaainet_bridge.engine.weights.header import Place
from kwaainet_bridge.engine.weights.hub import RemoteFile
from kwaainet_bridge.engine.weights.locks import lock_shared
from kwaainet_bridge.errors import CheckpointError

log = logging.getLogger(__name__)

Range = tuple[int, int]
RECORD = ".parts.json"
LOCK = ".lock"
USE = ".use"


def merged(ranges: Iterable[Range], *, gap: int = 0) -> list[Range]:
    """The same bytes in as few ranges as possible; those at most ``gap`` apart are made one."""
    result: list[Range] = []
    for start, stop in sorted(ranges):
        if result and start <= result[-1][1] + gap:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        elif start < stop:
            result.append((start, stop))
    return result


def without(ranges: Iterable[Range], there: Iterable[Range]) -> list[Range]:
    """What of ``ranges`` is not in ``there``."""
    left = merged(ranges)
    for start, stop in merged(there):
        left = [
            piece
            for first, last in left
            for piece in ((first, min(last, start)), (max(first, stop), last))
            if piece[0] < piece[1]
        ]
    return left


class PartialFile:
    """One file of the cache. Whoever reads its record or writes holds :attr:`lock`; tensors are read within
    :meth:`use`."""

    def __init__(self, path: Path, remote: RemoteFile) -> None:
        """The file of a download that is for another content is begun anew."""
        self.path = path
        self.remote = remote
        self.lock = FileLock(path.with_name(path.name + LOCK))
        self.places: dict[str, Place] | None = None
        """Where each tensor lies, once the header has been read."""
        self._use: int | None = None
        self._record = path.with_name(path.name + RECORD)
        self._parts: dict[Range, str] = {}
        self._wanted = 0
        self._trusted: set[Range] = set()
        """Parts that this process has written or verified."""

    @classmethod
    def known(cls, path: Path, repository: str, name: str, commit: str) -> PartialFile | None:
        """A file of which some part is there: nobody has to be asked what it is."""
        told = _read(path.with_name(path.name + RECORD))
        if told is None or not path.is_file() or path.stat().st_size != told["size"]:
            return None
        return cls(path, RemoteFile(repository, name, commit, told["size"], told["etag"]))

    def open(self) -> None:
        """Learn what is there now."""
        told = _read(self._record)
        as_recorded = (
            told is not None
            and (told["size"], told["etag"]) == (self.remote.size, self.remote.etag)
            and self.path.is_file()
            and self.path.stat().st_size == self.remote.size
        )
        if as_recorded:
            assert told is not None
            self._parts = {(start, stop): digest for start, stop, digest in told["parts"]}
            self._trusted &= self._parts.keys()
            self._wanted = told["wanted"]
            return
        self.forget()  # another process may have the old file mapped: it keeps that, and this is a new one
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._save()
        with self.path.open("xb") as file:
            file.truncate(self.remote.size)

    def use(self) -> None:
        """Keep others from removing the file, until :meth:`release` or the end of the process. Needs the lock."""
        if self._use is None:
            descriptor = os.open(self.path.with_name(self.path.name + USE), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                lock_shared(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._use = descriptor

    def release(self) -> None:
        """The file may be removed."""
        if self._use is not None:
            os.close(self._use)
            self._use = None

    @property
    def ranges(self) -> list[Range]:
        """What is there."""
        return merged(self._parts)

    @property
    def lacking_bytes(self) -> int:
        """How much of the whole file is not there."""
        return self.remote.size - sum(stop - start for start, stop in self.ranges)

    def missing(self, ranges: Iterable[Range]) -> list[Range]:
        """What of these bytes is not there, after those that are have been verified."""
        wanted = list(ranges)
        for part in [p for p in self._parts if p not in self._trusted and without([p], without([p], wanted))]:
            if self._digest(part) == self._parts[part]:
                self._trusted.add(part)
            else:
                log.warning("bytes %d to %d of %s have changed on the disk: fetched again", *part, self.path)
                del self._parts[part]
        return without(wanted, self._parts)

    def write(self, start: int, chunks: Iterator[bytes]) -> Iterator[int]:
        """Write what comes, from ``start`` on; yields the number of new bytes as they come.

        Whatever ends it, what has come is kept.
        """
        at, begun = start, start
        digest = hashlib.sha256()
        with self.path.open("r+b") as file:
            file.seek(start)
            try:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    at += len(chunk)
                    yield len(chunk)
                    if at - begun >= defaults.DOWNLOAD_PART_BYTES:
                        self._note(file, (begun, at), digest.hexdigest())
                        begun, digest = at, hashlib.sha256()
            finally:
                if at > begun:
                    self._note(file, (begun, at), digest.hexdigest())

    def want(self, num_bytes: int) -> None:
        """Have others leave room for so many bytes more than are there now; for none after an end with 0."""
        wanted = sum(stop - start for start, stop in self.ranges) + num_bytes if num_bytes else 0
        if wanted != self._wanted:
            self._wanted = wanted
            self._save()

    def check_whole(self) -> None:
        """If all of the file is there, compare it with what the hub says. Raises CheckpointError, and forgets it."""
        etag = self.remote.etag
        if len(etag) != 64 or self.ranges != [(0, self.remote.size)]:  # hexadecimal digits of SHA-256
            return
        if self._digest((0, self.remote.size)) != etag:
            self.forget()
            raise CheckpointError(
                f"{self.remote.shown} has another SHA-256 than the hub says: it was removed, start again to fetch it"
            )

    def forget(self) -> None:
        """Remove the file and what is known of it."""
        for path in (self._record, self.path):
            path.unlink(missing_ok=True)
        self._parts, self._trusted, self.places, self._wanted = {}, set(), None, 0

    def _note(self, file: Any, part: Range, digest: str) -> None:
        file.flush()
        os.fsync(file.fileno())  # the record must not know more than the disk
        self._parts[part] = digest
        self._trusted.add(part)
        self._save()

    def _save(self) -> None:
        told = {
            "repository": self.remote.repository,
            "size": self.remote.size,
            "etag": self.remote.etag,
            "wanted": self._wanted,
            "parts": [[start, stop, digest] for (start, stop), digest in sorted(self._parts.items())],
        }
        new = self._record.with_name(self._record.name + ".new")
        new.write_text(json.dumps(told))
        new.replace(self._record)

    def _digest(self, part: Range) -> str:
        digest = hashlib.sha256()
        start, stop = part
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(stop - start, defaults.DOWNLOAD_CHUNK_BYTES))
                if not data:
                    break
                digest.update(data)
                start += len(data)
        return digest.hexdigest()


def bytes_of(record: Path, *, coming: bool = False) -> int:
    """How much of the file that a record is about is on the disk; with what is ``coming``, if that is said there."""
    told = _read(record)
    if told is None:
        return 0
    there = sum(stop - start for start, stop in merged((a, b) for a, b, _ in told["parts"]))
    return max(there, told["wanted"]) if coming else there


def _read(record: Path) -> dict[str, Any] | None:
    """What a record tells; None for one that is not there or not as this module writes it."""
    try:
        told = json.loads(record.read_text())
        parts = [(int(start), int(stop), str(digest)) for start, stop, digest in told["parts"]]
        size, etag, wanted = int(told["size"]), str(told["etag"]), int(told.get("wanted", 0))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not all(0 <= start < stop <= size for start, stop, _ in parts):
        return None
    return {"size": size, "etag": etag, "wanted": min(wanted, size), "parts": parts}
