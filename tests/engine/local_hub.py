"""A hub on this machine: the few answers of Hugging Face's that loading needs, and the ways in which servers fail."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "cafe"
REPOSITORY = "org/name"


@dataclass
class LocalHub:
    """Serves a folder as a repository. ``drops`` cuts so many answers off in the middle; counts what was asked."""

    folder: Path
    url: str = ""
    ranges: bool = True
    drops: int = 0
    broken: int = 0
    """How many answers are errors, with this status."""
    status: int = 503
    shift: int = 0
    """By how many bytes the ranges that it sends are others than those asked for."""
    more: int = 0
    """By how many bytes its answers are longer."""
    encoding: str | None = None
    elsewhere: bool = False
    """The hub sends whoever asks on to a place that knows other digests."""
    hold: threading.Event | None = None
    """Weights after the header wait for it."""
    etags: dict[str, str] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that were sent."""
    requests: int = 0

    def etag(self, name: str) -> str:
        return self.etags.get(name) or hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    hub = LocalHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:  # the name in the base class
            self._answer(body=False)

        def do_GET(self) -> None:  # as above
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.requests += 1
            match = re.fullmatch(rf"/{REPOSITORY}/(?:resolve|elsewhere)/[^/]+/(.+)", self.path)
            path = folder / match[1] if match else None
            if path is None or not path.is_file():
                self.send_response(404)
                self.send_header("x-error-code", "EntryNotFound")
                self.send_header("x-repo-commit", COMMIT)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            if body and hub.broken:
                hub.broken -= 1
                self.send_response(hub.status)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            moved = "/elsewhere/" in self.path
            if hub.elsewhere and not moved:
                self.send_response(302)
                self.send_header("x-repo-commit", COMMIT)
                self.send_header("x-linked-etag", f'"{hub.etag(path.name)}"')
                self.send_header("x-linked-size", str(path.stat().st_size))
                self.send_header("etag", '"of-the-redirect"')
                self.send_header(
                    "location",
                    hub.url.replace("127.0.0.1", "localhost") + self.path.replace("/resolve/", "/elsewhere/"),
                )
                self.send_header("content-length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            whole, start = len(data), 0
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
            partial = asked is not None and hub.ranges
            if asked is not None and partial:
                start, stop = int(asked[1]), int(asked[2]) + 1
                start += hub.shift
                data = data[start : stop + hub.shift]
            last = start + len(data) - 1
            if body and path.suffix == ".safetensors":
                data += b"x" * hub.more
                if hub.hold is not None and start > int.from_bytes(path.read_bytes()[:8], "little"):
                    hub.hold.wait(60)
            self.send_response(206 if partial else 200)
            self.send_header("x-repo-commit", COMMIT)
            self.send_header("etag", '"of-elsewhere"' if moved else f'"{hub.etag(path.name)}"')
            if body and hub.encoding is not None:
                self.send_header("content-encoding", hub.encoding)
            if not moved:
                self.send_header("x-linked-size", str(whole))
            self.send_header("content-length", str(len(data)))
            if partial:
                self.send_header("content-range", f"bytes {start}-{last}/{whole}")
            self.end_headers()
            if not body:
                return
            if hub.drops and path.suffix == ".safetensors":
                hub.drops -= 1
                data = data[: len(data) // 2]
                self.close_connection = True
            hub.sent[path.name] = hub.sent.get(path.name, 0) + len(data)
            self.wfile.write(data)
            if self.close_connection:
                self.wfile.flush()
                self.connection.close()

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (OSError, ValueError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
