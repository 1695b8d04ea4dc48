"""The local HTTP server that mux streams lead to, and what peers may ask it for."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError, Refusal

if TYPE_CHECKING:
    import httpx

METHODS: Final = ("GET", "POST")
"""HTTP methods that are passed on: what OpenAI-compatible servers need."""

_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~:@!$&'()*+,=-]+)+/?")
"""Segments of plain characters: no query, fragment, escapes, backslashes, parameters or empty segments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxEndpoint:
    """Where mux requests go, and which ones. Raises ConfigError for what would not be safe.

    ``url``: ``http://127.0.0.1:8080``; another host than this one takes ``remote=True``. ``paths``: whole paths, or
    beginnings that end in ``*``, which is whole segments where a slash stands before it: ``/v1/models/*``. ``requests``
    run at one time, ``requests_per_peer`` of one peer; ``seconds`` is the limit of each. Bytes are those of bodies.
    """

    url: str
    paths: Sequence[str]
    remote: bool = False
    requests: int = defaults.KWAAI_MUX_REQUESTS
    requests_per_peer: int = defaults.KWAAI_MUX_REQUESTS_PER_PEER
    seconds: float = defaults.KWAAI_MUX_SECONDS
    body_bytes: int = defaults.KWAAI_MUX_BODY_BYTES
    answer_bytes: int = defaults.KWAAI_MUX_ANSWER_BYTES

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as e:
            raise ConfigError(f"mux endpoint {self.url!r:.200}: {e}") from e
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"mux endpoint {self.url!r:.200}: expected http://host:port")
        if "@" in parts.netloc or parts.query or parts.fragment or parts.path not in ("", "/"):
            raise ConfigError(f"mux endpoint {self.url!r:.200}: an address alone, like http://127.0.0.1:8080")
        if not self.remote and not _is_loopback(host):
            raise ConfigError(
                f"mux endpoint {self.url!r:.200} is not on this machine: peers would reach into its network through "
                "this node; name a loopback address, or allow it expressly"
            )
        if not self.paths:
            raise ConfigError("mux endpoint: no paths are allowed, so nothing could be asked for")
        if max(self.body_bytes, self.answer_bytes) > defaults.MAX_MUX_FRAME_BYTES - defaults.KIB:
            raise ConfigError(
                f"mux endpoint: bodies must fit into a frame of {defaults.MAX_MUX_FRAME_BYTES} bytes"
            )
        for path in self.paths:
            start = path.removesuffix("*")
            if start != "/" and (_PATH.fullmatch(start) is None or "*" in start or not _is_normal(start)):
                raise ConfigError(
                    f"mux endpoint: {path!r:.200} is no path: expected /segments, or a beginning with * at its end"
                )

    def check(self, method: str, path: str) -> None:
        """Raises Refusal unless peers may make this request.

        A path must be in its one normal form, so that it means here what it means to the server behind: plain
        characters, without query, escapes, ``.``, ``..`` or empty segments.
        """
        if method not in METHODS:
            raise Refusal(f"the method {method[:40]!r} is not allowed here, only {' and '.join(METHODS)}")
        if _PATH.fullmatch(path) is None or not _is_normal(path):
            raise Refusal(f"{path[:100]!r} is not a plain path: no query, escapes, dots or empty segments")
        if not any(_matches(allowed, path) for allowed in self.paths):
            raise Refusal(f"{path[:100]!r} is not offered here")

    async def ask(self, client: httpx.AsyncClient, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the endpoint's answer to a checked request; 502 and 504 with a text where it fails.

        No header but the content type is sent, no redirection followed, and no more of the answer kept in memory than
        ``answer_bytes``. Cancelled: the request to the endpoint is dropped.
        """
        import httpx

        headers = {"accept-encoding": "identity"}
        if body:
            headers["content-type"] = "application/json"
        address = self.url.rstrip("/") + path
        try:
            async with client.stream(method, address, content=body or None, headers=headers) as answer:
                content = bytearray()
                # left by cancellation: httpx' generators, one within the other, are closed by nothing else
                with trio.CancelScope() as enough:
                    async for part in answer.aiter_bytes():
                        if len(content) + len(part) <= self.answer_bytes:
                            content += part
                        else:
                            enough.cancel()
                if enough.cancel_called:
                    return 502, b"the answer is too long to be passed on"
                return answer.status_code, bytes(content)
        except httpx.TimeoutException:
            return 504, b"the server behind this node does not answer"
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            return 502, b"the server behind this node cannot be reached"

    def client(self) -> httpx.AsyncClient:
        """A new HTTP client with the limits of this endpoint; it heeds no proxy settings of the environment."""
        import httpx

        limits = httpx.Limits(max_connections=self.requests, max_keepalive_connections=self.requests)
        return httpx.AsyncClient(timeout=self.seconds, limits=limits, trust_env=False, follow_redirects=False)


def _is_normal(path: str) -> bool:
    return not {".", ".."} & set(path.split("/"))


def _matches(allowed: str, path: str) -> bool:
    return path.startswith(allowed[:-1]) if allowed.endswith("*") else path == allowed


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
