"""The dashboard: its pages, and what they are told while somebody looks at them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kwaainet_bridge import defaults
from kwaainet_bridge.node.admin.coverage import CoverageWatch
from kwaainet_bridge.node.admin.peers import peers_of
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.state import NodeState

_FILES: Final = {
    "/": ("dashboard.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/chat": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
}

STATIC_PATHS: Final = tuple(_FILES)
"""They tell nothing of the node, and the pages that ask for a token are among them."""

_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the files are those of the program's version
}

_PART_OF = "kwaainet_bridge.node.admin"

_STATUS: Final = "status"


def dashboard_routes(state: NodeState, nursery: trio.Nursery) -> list[Route]:
    """The pages' files and ``/api/events``. Networks are read in ``nursery``."""
    coverage = CoverageWatch(state, nursery)
    pages: set[EventStream] = set()

    async def events(request: Request) -> Response | EventStream:
        if request.method == "HEAD":
            return Response(media_type=_EVENT_STREAM)
        if len(pages) >= defaults.DASHBOARD_PAGES:
            return PlainTextResponse(
                f"{len(pages)} pages are open, and no more are served at one time: close one\n",
                status_code=503,
                headers={"retry-after": "5"},
            )
        only = request.query_params.get("only")
        if only not in (None, _STATUS):
            return PlainTextResponse(f"only={_STATUS}, or nothing for everything\n", status_code=400)
        return EventStream(_News(state, None if only else coverage), pages)

    return [*(_file(path, name, kind) for path, (name, kind) in _FILES.items()), Route("/api/events", events)]


def _file(path: str, name: str, kind: str) -> Route:
    content = resources.files(_PART_OF).joinpath("static", name).read_bytes()

    async def answer(_request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, answer)


def _json(value: Any) -> str:
    """One line, whatever text it holds. ValueError for numbers that JSON has no way to write."""
    return json.dumps(value, allow_nan=False)


class _News:
    """What one page has not been told yet. Everything at first; then the status each time, the rest when it changes.

    Without ``coverage`` the status alone, which asks nobody.
    """

    def __init__(self, state: NodeState, coverage: CoverageWatch | None) -> None:
        self._state = state
        self._coverage = coverage
        self._told: dict[str, object] = {}

    def __call__(self) -> Iterator[tuple[str, Any]]:
        state, coverage = self._state, self._coverage
        if coverage is None:
            yield _STATUS, status_of(state)
            return
        coverage.refresh()
        yield _STATUS, status_of(state)
        if self._is_new("events", state.events.noted):
            yield "events", [{"at": e.at, "kind": e.kind, "text": e.text} for e in state.events]
        peers = peers_of(state)
        if self._is_new("peers", peers):
            yield "peers", peers
        if self._is_new("coverage", coverage.version):
            yield "coverage", coverage.as_json()

    def _is_new(self, name: str, value: object) -> bool:
        known = name in self._told and self._told[name] == value
        self._told[name] = value
        return not known


_EVENT_STREAM: Final = "text/event-stream"


class EventStream(Response):
    """Server-sent events, a batch of ``news`` every second until the client goes; among ``open_streams`` meanwhile."""

    def __init__(self, news: Callable[[], Iterator[tuple[str, Any]]], open_streams: set[EventStream]) -> None:
        super().__init__(media_type=_EVENT_STREAM, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._news = news
        self._open = open_streams

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self._open.add(self)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
                while True:
                    body = "".join(f"event: {name}\ndata: {_json(value)}\n\n" for name, value in self._news())
                    await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
                    await trio.sleep(defaults.DASHBOARD_PERIOD_SECONDS)
        finally:
            self._open.discard(self)


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
