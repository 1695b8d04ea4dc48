"""The admin side's routes. Imported when somebody asks for the first time."""

from __future__ import annotations

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kwaainet_bridge.node.admin.chat import chat_route
from kwaainet_bridge.node.admin.control import control_routes
from kwaainet_bridge.node.admin.dashboard import dashboard_routes
from kwaainet_bridge.node.admin.metrics import CONTENT_TYPE, exposition
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.admin.views import view_routes
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState


def make_app(
    state: NodeState, nursery: trio.Nursery, *, openai: bool, has_token: bool, control: Control | None = None
) -> Starlette:
    """The routes. ``state`` is read when somebody asks; what a page needs from other peers is read in ``nursery``.

    ``openai``: the configuration wants an OpenAI endpoint, which pages may use here, too; with its token, unless
    this side asks for its own (``has_token``).
    """

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        judged = conditions(state)
        ready = is_ready(judged)
        body = {
            "ready": ready,
            "conditions": [
                {"name": c.name, "model": c.model, "met": c.met, "reason": c.reason} for c in judged
            ],
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
            *view_routes(state),
            *control_routes(control, state),
            *dashboard_routes(state, nursery),
            chat_route(state, on=openai, has_token=has_token),
        ]
    )
