"""The admin side's routes. Imported when somebody asks for the first time."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kwaainet_bridge.node.admin.metrics import CONTENT_TYPE, exposition
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.readiness import conditions, is_ready
from kwaainet_bridge.node.state import NodeState


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
