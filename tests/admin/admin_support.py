"""Clients of a node's admin side, and what stands for a node where none is needed."""

from __future__ import annotations

import io
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import structlog
import trio
from prometheus_client.parser import text_string_to_metric_families

from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.admin.server import open_admin
from kwaainet_bridge.node.log_ring import LogRing
from kwaainet_bridge.node.logs import configure_logging
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.web.sockets import reachable

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"


@asynccontextmanager
async def asking(address: UnixAddress | TcpAddress, **options) -> AsyncIterator[httpx.AsyncClient]:
    if isinstance(address, TcpAddress):
        async with httpx.AsyncClient(base_url=address.url, timeout=10, trust_env=False, **options) as client:
            yield client
        return
    with reachable(address.path) as name:
        transport = httpx.AsyncHTTPTransport(uds=name)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=10, **options
        ) as client:
            yield client


@asynccontextmanager
async def served(address, *, token_file=None, state=None, openai=False) -> AsyncIterator[NodeState]:
    """An admin side without a node."""
    state = state or NodeState()
    async with open_admin(address, token_file, state, openai=openai):
        yield state


@contextmanager
def logging_to(ring: LogRing, level: str = "debug") -> Iterator[None]:
    """This process' log goes to the ring alone; afterwards all is as it was."""
    root = logging.getLogger()
    handlers, before = root.handlers[:], root.level
    configure_logging(level, "json", stream=io.StringIO(), ring=ring)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)
        logging.getLogger("kwaainet_bridge").setLevel(logging.NOTSET)
        structlog.reset_defaults()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def condition_of(client: httpx.AsyncClient, name: str) -> SimpleNamespace:
    answer = await client.get("/readyz")
    found = next(c for c in answer.json()["conditions"] if c["name"] == name)
    assert answer.json()["ready"] is (answer.status_code == 200)
    return SimpleNamespace(**found, code=answer.status_code)


def families(text: str) -> dict:
    """Metrics by their names, as Prometheus' own parser reads them."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(found: dict, family: str, **labels: str) -> float:
    """The one sample of a family with these labels, buckets left out."""
    return next(
        s.value
        for s in found[f"kwaainet_bridge_{family}"].samples
        if s.labels == labels and "le" not in s.labels
    )


def table(after: str) -> list[list[str]]:
    """Rows of the table in docs/monitoring.md whose section has this heading."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {after}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


KINDS = {"text": (str,), "number": (int, float), "boolean": (bool,), "object": (dict,), "null": (type(None),)}
ROWS = {row[0]: [kind.strip() for kind in row[1].split(" or ")] for row in table("Status")}


def pattern(key: str) -> re.Pattern[str]:
    parts = re.split(r"<\w+>", key)
    return re.compile("[^\0]+".join(map(re.escape, parts)).replace(r"\.", "\0"))


PATTERNS = {pattern(key): key for key in ROWS}


def walk(value, path: str = ""):
    """Each value of a status with its path, parts separated by zeros; those that are neither object nor list, and null."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from walk(below, f"{path}\0{key}" if path else key)
    elif isinstance(value, list):
        for below in value:
            yield from walk(below, f"{path}[]")
    else:
        yield path, value


def check_documented(status: dict) -> set[str]:
    """Every value of a status is in the table with its type; returns the keys of the table that were met."""
    met = set()
    for path, value in walk(status):
        key = next((key for expected, key in PATTERNS.items() if expected.fullmatch(path)), None)
        assert key is not None, f"{path!r} is not documented"
        allowed = tuple(kind for name in ROWS[key] for kind in KINDS[name])
        assert isinstance(value, allowed), (key, value)
        assert not (isinstance(value, bool) and "boolean" not in ROWS[key]), key
        met.add(key)
    return met


async def until(holds, seconds: float = 20.0) -> None:
    """Wait for what no event tells: an answer over HTTP."""
    with trio.fail_after(seconds):
        while not await holds():  # noqa: ASYNC110
            await trio.sleep(0.05)


@contextmanager
def answering(body: bytes):
    """An HTTP server that answers everything so; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
