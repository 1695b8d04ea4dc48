"""Files of a hub repository, range by range. Everything here blocks: call it from a thread.

Addresses, tokens and what a file is come from huggingface_hub, and the hub's servers know HTTP's Range.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The connection ended before all bytes came: worth another try."""


class NoRanges(Exception):
    """The server gives whole files only."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of one commit of a repository. ``etag`` is its SHA-256 in hexadecimal digits if the hub keeps one."""

    repository: str
    name: str
    commit: str
    size: int
    etag: str

    @property
    def shown(self) -> str:
        return f"{self.repository}/{self.name}"


class Hub(Protocol):
    """Where files of repositories come from."""

    def describe(self, repository: str, name: str, commit: str) -> RemoteFile | None:
        """What the file is, None if the repository has none of this name. Raises CheckpointError."""
        ...

    def local(self, repository: str, name: str, commit: str) -> Path | None:
        """The whole file, if this machine has it already."""
        ...

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, in chunks. Raises Interrupted, NoRanges, CheckpointError."""
        ...


class HttpHub:
    """The hub that HF_ENDPOINT names, or Hugging Face's."""

    def __init__(self, *, timeout: float = defaults.DOWNLOAD_SILENCE_SECONDS) -> None:
        self._timeout = timeout

    def describe(self, repository: str, name: str, commit: str) -> RemoteFile | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        try:
            told = get_hf_file_metadata(hf_hub_url(repository, name, revision=commit))
        except EntryNotFoundError:
            return None
        except (OfflineModeIsEnabled, httpx.HTTPError, ConnectionError) as e:
            raise ModelUnreachable(
                f"{repository}/{name} is not in the local cache and the hub cannot be reached ({e}): "
                "check the connection, or give a local model folder"
            ) from e
        except (HfHubHTTPError, OSError) as e:
            raise CheckpointError(
                f"cannot fetch {repository}/{name}: {e}. Check the repository's name, the revision and, "
                "for a gated model, that HF_TOKEN is set"
            ) from e
        if told.size is None or told.etag is None:
            raise CheckpointError(
                f"the hub does not tell the size of {repository}/{name}: give a local model folder"
            )
        return RemoteFile(repository, name, told.commit_hash or commit, told.size, told.etag)

    def local(self, repository: str, name: str, commit: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

        url = hf_hub_url(file.repository, file.name, revision=file.commit)
        # as they are stored: a range of compressed bytes would be another one
        asked = {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        try:
            headers = build_hf_headers() | asked
            with httpx.stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=self._timeout
            ) as answer:
                if answer.status_code == httpx.codes.OK and (start, stop) != (0, file.size):
                    raise NoRanges
                if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                    raise Interrupted(f"the server answers {answer.status_code}")
                if answer.status_code not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
                    raise CheckpointError(
                        f"cannot fetch {file.shown}: the server answers {answer.status_code}"
                    )
                got = 0
                for chunk in answer.iter_raw(defaults.DOWNLOAD_CHUNK_BYTES):
                    got += len(chunk)
                    if got > stop - start:
                        raise CheckpointError(f"{file.shown}: the server sends more than was asked for")
                    yield chunk
        except httpx.HTTPError as e:
            raise Interrupted(f"{type(e).__name__}: {e}") from e
        if got < stop - start:
            raise Interrupted(f"{stop - start - got} bytes are missing")
