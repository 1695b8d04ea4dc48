"""The admin side's HTTP: routes, and Hypercorn's connections. Imported when somebody asks for the first time."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kwaainet_bridge import defaults
from kwaainet_bridge.node.admin.metrics import CONTENT_TYPE, exposition
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.admin.tokens import admits
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState

_OPEN: Final = "/livez"
"""What may be asked without a token: it tells nothing but that the node runs."""

_MAX_HEAD_BYTES: Final = 16 * 1024


def make_handler(
    state: NodeState, *, token: str | None, local_names_only: bool
) -> Callable[[Any], Awaitable[None]]:
    """What serves one connection, given its stream. Raises what Hypercorn raises for what it did not foresee."""
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger(__name__)
    config.include_server_header = False
    config.h11_max_incomplete_size = _MAX_HEAD_BYTES
    config.keep_alive_timeout = defaults.ADMIN_IDLE_SECONDS
    config.read_timeout = defaults.ADMIN_IDLE_SECONDS
    guarded: Any = _Guard(make_app(state), token, local_names_only)  # two packages type the same thing apart
    app = wrap_app(guarded, config.wsgi_max_body_size, "asgi")
    context = WorkerContext(None)

    async def handle(stream: Any) -> None:
        await TCPServer(app, config, context, ConnectionState({}), stream).run()

    return handle


def make_app(state: NodeState) -> Starlette:
    """The routes. ``state`` is read when somebody asks."""

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        judged = conditions(state)
        ready = is_ready(judged)
        body = {
            "ready": ready,
            "conditions": [{"name": c.name, "met": c.met, "reason": c.reason} for c in judged],
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(_request: Request) -> Response:
        return Response(exposition(state), media_type=CONTENT_TYPE)

    async def status(_request: Request) -> Response:
        return JSONResponse(status_of(state))

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/api/status", status),
        ]
    )


class _Guard:
    """Lets through HTTP requests that may be answered: no WebSockets, the right token, a name of this machine."""

    def __init__(self, app: ASGIApp, token: str | None, local_names_only: bool) -> None:
        self._app = app
        self._token = token
        self._local_names_only = local_names_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        refusal = self._refusal(Request(scope))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if self._local_names_only and not _is_local(request.headers.get("host", "")):
            return PlainTextResponse("this is served to this machine only\n", status_code=421)
        if self._token is None or request.scope["path"] == _OPEN:
            return None
        if admits(self._token, request.headers.get("authorization", "")):
            return None
        return PlainTextResponse(
            "needs the header Authorization: Bearer <token>, with what admin.token_file holds\n",
            status_code=401,
            headers={"www-authenticate": "Bearer"},
        )


def _is_local(host: str) -> bool:
    """Whether a ``Host`` header names this machine by a name that nobody else can give to another."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
