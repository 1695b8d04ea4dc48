"""The OpenAI endpoint under the admin side's own address and token, for the page that chats.

The page asks no other origin, so that the endpoint need not let any page in.
"""

from __future__ import annotations

import trio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from kwaainet_bridge import defaults
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.web.connections import needs_token
from kwaainet_bridge.node.web.tokens import admits

PATH = "/v1/{rest:path}"


def chat_route(state: NodeState, *, on: bool, has_token: bool) -> Route:
    """The endpoint's routes while ``state`` has it, else why not.

    ``on``: the configuration wants one. ``has_token``: whoever gets here has sent the admin side's token; of others
    the endpoint's own is asked, if it has one.
    """
    return Route(PATH, _Endpoint(state, on=on, has_token=has_token))


class _Endpoint:
    def __init__(self, state: NodeState, *, on: bool, has_token: bool) -> None:
        self._state = state
        self._on = on
        self._has_token = has_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (served := self._state.openai) is None:
            await self._none()(scope, receive, send)
            return
        if not self._has_token and served.token is not None:
            authorization = Request(scope).headers.get("authorization", "")
            if not admits(served.token, authorization):
                await needs_token("openai.token_file")(scope, receive, send)
                return
        try:
            await served(scope, _bounded(receive), send)
        except ClientDisconnect:  # it left before it had said what it asks for
            return

    def _none(self) -> JSONResponse:
        if self._on:
            phase = self._state.phase.value
            message = f"the node is {phase}, and answers nobody now: ask again when it serves"
            return _refused(503, message, "endpoint_not_there")
        return _refused(
            404,
            "the OpenAI endpoint of this node is off: give openai.listen in its configuration, "
            "for instance 127.0.0.1:8000, and start it again",
            "endpoint_off",
        )


def _refused(status: int, message: str, code: str) -> JSONResponse:
    """An error as the endpoint itself tells them."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def _bounded(receive: Receive) -> Receive:
    """The admin side lets pages be silent for hours, but nobody begin a request and never end it."""
    whole = False

    async def within() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        message: Message = {"type": "http.disconnect"}
        with trio.move_on_after(defaults.WEB_IDLE_SECONDS):
            message = await receive()
        whole = not message.get("more_body", False)
        return message

    return within
