"""The newest records of a node's log over HTTP: once, or as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kwaainet_bridge import defaults
from kwaainet_bridge.node.log_ring import LEVELS, LogEntry, LogRing

if TYPE_CHECKING:
    from kwaainet_bridge.node.state import NodeState

LOGS_VERSION: Final = 1

_LINES: Final = "application/x-ndjson"


def log_route(state: NodeState) -> Route:
    """``/api/logs``; ``level``, ``last`` (how many) and ``follow`` (1) are what a request may say."""
    followers: set[Followed] = set()

    async def logs(request: Request) -> Response | Followed:
        asked = request.query_params
        level, last, follow = asked.get("level", "debug"), asked.get("last"), asked.get("follow", "0")
        if level not in LEVELS:
            return _wrong(f"level {level[:40]!r} is none of {', '.join(LEVELS)}")
        most = defaults.LOG_RECORDS if last is None else _number(last)
        if most is None:
            return _wrong(f"last {(last or '')[:40]!r} is no number from 0 to {defaults.LOG_ANSWER_RECORDS}")
        if follow not in ("0", "1"):
            return _wrong(f"follow {follow[:40]!r} is neither 0 nor 1")
        if state.logs is None:
            return _wrong(
                "this process keeps no records of its log: it was not started by `kwaainet-bridge run`"
            )
        if follow == "0":
            return _answer(state.logs, level, most)
        if request.method == "HEAD":
            return Response(media_type=_LINES)
        if len(followers) >= defaults.LOG_FOLLOWERS:
            return PlainTextResponse(
                f"{len(followers)} readers follow the log, and no more are told at one time: end one\n",
                status_code=503,
                headers={"retry-after": "5"},
            )
        return Followed(state.logs, LEVELS[level], most, followers)

    return Route("/api/logs", logs)


def _wrong(error: str) -> Response:
    return JSONResponse({"error": error}, status_code=422)


def _number(asked: str) -> int | None:
    if not (asked.isascii() and asked.isdecimal() and len(asked) <= 9):
        return None
    return number if (number := int(asked)) <= defaults.LOG_ANSWER_RECORDS else None


def _answer(ring: LogRing, level: str, most: int) -> Response:
    answer = ring.newest(level=LEVELS[level], most=most)
    records = ", ".join(entry.text for entry in answer.entries)
    body = (
        f'{{"schema": {LOGS_VERSION}, "level": "{level}", "left_out": {answer.left_out}, '
        f'"missed": {answer.missed}, "records": [{records}]}}'
    )
    return Response(body, media_type="application/json")


class Followed(Response):
    """Records as lines, those of before first, until the client goes; among ``followers`` meanwhile.

    An empty line tells that there is nothing new. ``{"missed": n}`` stands where records went before they were sent,
    since more came than a reader took.
    """

    def __init__(self, ring: LogRing, level: int, most: int, followers: set[Followed]) -> None:
        super().__init__(media_type=_LINES, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._ring = ring
        self._level = level
        self._most = most
        self._followers = followers

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self._followers.add(self)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
                await self._tell(send)
        finally:
            self._followers.discard(self)

    async def _tell(self, send: Send) -> None:
        ring = self._ring
        _, seen = ring.since(0, level=self._level)
        entries = ring.newest(level=self._level, most=self._most).entries
        entries, missed = [entry for entry in entries if entry.number <= seen], 0
        quiet_since = float("-inf")
        while True:
            now = trio.current_time()
            if entries or missed or now - quiet_since >= defaults.LOG_SILENCE_SECONDS:
                body = "".join(_lines(entries, missed)) or "\n"
                await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
                quiet_since = now
            await trio.sleep(defaults.LOG_FOLLOW_SECONDS)
            answer, seen = ring.since(seen, level=self._level)
            entries, missed = list(answer.entries), answer.missed


def _lines(entries: list[LogEntry], missed: int) -> Iterator[str]:
    if missed:
        yield f'{{"missed": {missed}}}\n'
    for entry in entries:
        yield f"{entry.text}\n"


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
