"""What an operator has the node do over HTTP: ``POST /api/drain``, ``pause``, ``resume`` and ``reload``.

Pages of other sites cannot: see :mod:`kwaainet_bridge.node.web.connections`. No route reads a body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.control import Control, Stopping
from kwaainet_bridge.node.state import NodeState

Act = Callable[[Request], Awaitable[dict[str, Any]]]


def control_routes(control: Control | None, state: NodeState) -> list[Route]:
    """The routes; none without a node to control."""
    if control is None:
        return []

    async def drain(_request: Request) -> dict[str, Any]:
        control.drain()
        return {"sessions": _sessions(state), "drain_seconds": control.drain_seconds}

    async def pause(request: Request) -> dict[str, Any]:
        now = request.query_params.get("now", "false")
        if now not in ("true", "false"):
            raise ConfigError(f"now={now:.40}: must be true or false")
        control.pause(end_sessions=now == "true")
        return {"paused": state.pausing.reason, "sessions": _sessions(state)}

    async def resume(_request: Request) -> dict[str, Any]:
        control.resume()
        return {"paused": state.pausing.reason}

    async def reload(_request: Request) -> dict[str, Any]:
        result = await control.reload()
        return {"applied": list(result.applied), "restart": list(result.restart)}

    acts = {"drain": drain, "pause": pause, "resume": resume, "reload": reload}
    return [Route(f"/api/{name}", _answering(act), methods=["POST"]) for name, act in acts.items()]


def _answering(act: Act) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await act(request))
        except ConfigError as e:
            return JSONResponse({"error": str(e)}, status_code=422)
        except Stopping as e:
            return JSONResponse({"error": str(e)}, status_code=409)

    return answer


def _sessions(state: NodeState) -> int:
    return sum(model.served.open_sessions for model in state.models.values() if model.served is not None)
