"""Files of a hub repository, range by range. Everything here blocks: call it from a thread.

Addresses, tokens, HTTP sessions and what a file is come from huggingface_hub, and the hub's servers know HTTP's Range.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import CheckpointError, ModelUnreachable

_TRY_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class Interrupted(Exception):
    """The server cannot be reached or the connection ended before all bytes came: worth another try."""


class NoRanges(Exception):
    """The server gives whole files only."""


class Changed(Exception):
    """The server has another content under this name than it told before."""


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
        """What the file is, None if the repository has none of this name. Raises Interrupted, CheckpointError."""
        ...

    def local(self, repository: str, name: str, commit: str) -> Path | None:
        """The whole file, if this machine has it already."""
        ...

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, in chunks.

        Raises Interrupted, NoRanges, Changed, CheckpointError.
        """
        ...


class HttpHub:
    """The hub that HF_ENDPOINT names, or Hugging Face's."""

    def __init__(self, *, timeout: float = defaults.DOWNLOAD_SILENCE_SECONDS) -> None:
        self._timeout = timeout

    def describe(self, repository: str, name: str, commit: str) -> RemoteFile | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        shown = f"{repository}/{name}"
        try:
            told = get_hf_file_metadata(hf_hub_url(repository, name, revision=commit), timeout=self._timeout)
        except EntryNotFoundError:
            return None
        except OfflineModeIsEnabled as e:
            raise _offline(shown) from e
        except HfHubHTTPError as e:
            _check_status(shown, e.response.status_code)
            raise CheckpointError(f"cannot fetch {shown}: {e}") from e
        except (_http_error(), ConnectionError) as e:
            raise Interrupted(f"{type(e).__name__}: {e}") from e
        if told.size is None or told.etag is None or not 0 <= told.size <= defaults.MAX_WEIGHT_FILE_BYTES:
            raise CheckpointError(
                f"the hub tells no usable size of {shown} ({told.size}): give a local model folder"
            )
        return RemoteFile(repository, name, told.commit_hash or commit, told.size, told.etag)

    def local(self, repository: str, name: str, commit: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

        url = hf_hub_url(file.repository, file.name, revision=file.commit)
        # as they are stored: a range of compressed bytes would be another one
        asked = {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        try:
            with get_session().stream(
                "GET", url, headers=build_hf_headers() | asked, follow_redirects=True, timeout=self._timeout
            ) as answer:
                _check_answer(file, start, stop, answer)
                got = 0
                for chunk in answer.iter_raw(defaults.DOWNLOAD_CHUNK_BYTES):
                    got += len(chunk)
                    if got > stop - start:
                        raise CheckpointError(f"{file.shown}: the server sends more than was asked for")
                    yield chunk
        except OfflineModeIsEnabled as e:
            raise _offline(file.shown) from e
        except _http_error() as e:
            raise Interrupted(f"{type(e).__name__}: {e}") from e
        if got < stop - start:
            raise Interrupted(f"{stop - start - got} bytes are missing")


def _check_answer(file: RemoteFile, start: int, stop: int, answer: Any) -> None:
    """Whether the body will be these bytes of this file."""
    _check_status(file.shown, answer.status_code)
    # of what lies on another server the hub tells the digest when it sends us there, and that server one of its own
    headers = [
        step.headers.get(name) for step in (*answer.history, answer) for name in ("x-linked-etag", "etag")
    ]
    told = {etag.removeprefix("W/").strip('"') for etag in headers if etag is not None}
    if told and file.etag not in told:
        raise Changed
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise CheckpointError(
            f"{file.shown}: the server compresses parts of files, which cannot be put together"
        )
    if answer.status_code == HTTPStatus.PARTIAL_CONTENT:
        place = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/.*", answer.headers.get("content-range", ""))
        if place is None or (int(place[1]), int(place[2]) + 1) != (start, stop):
            raise CheckpointError(f"{file.shown}: the server sends other bytes than it was asked for")
    elif (start, stop) != (0, file.size):
        raise NoRanges


def _check_status(shown: str, status: int) -> None:
    if status in _TRY_AGAIN or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise Interrupted(f"the server answers {status}")
    if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise CheckpointError(
            f"cannot fetch {shown}: the server answers {status}. Check the repository's name, the revision and, "
            "for a gated model, that HF_TOKEN is set"
        )


def _offline(shown: str) -> ModelUnreachable:
    return ModelUnreachable(
        f"{shown} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, "
        "or give a local model folder"
    )


def _http_error() -> type[Exception]:
    """What the HTTP library that huggingface_hub uses raises; which library that is changes with its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
