"""What speaks HTTP on a connection, and who may ask. Imported when somebody asks for the first time."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio
from hypercorn.config import Config
from hypercorn.events import Closed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kwaainet_bridge import defaults
from kwaainet_bridge.node.web.tokens import admits

if TYPE_CHECKING:
    import h11

    from kwaainet_bridge.node.web.server import BoundedStream

_MAX_HEAD_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: with a ``token``, which ``token_key`` of the configuration names, whoever sends it.

    ``open_paths`` may be asked without. ``local_names_only``: refuse requests that name another host than this machine,
    as a page in a browser makes them that has its own name point here, and those of pages that came from elsewhere.
    """

    token: str | None
    token_key: str
    open_paths: Sequence[str] = ()
    local_names_only: bool = False


def make_handler(
    app: ASGIApp, access: Access, *, silent_seconds: int | None = defaults.WEB_IDLE_SECONDS
) -> Callable[[BoundedStream], Awaitable[None]]:
    """What serves one connection, given its stream. Raises what Hypercorn raises for what it did not foresee.

    ``silent_seconds``: how long a client may send nothing, while it is answered, too; None for as long as it likes.
    """
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger(__name__)
    config.include_server_header = False
    config.h11_max_incomplete_size = _MAX_HEAD_BYTES
    config.keep_alive_timeout = defaults.WEB_IDLE_SECONDS
    config.read_timeout = silent_seconds
    guarded: Any = _Guard(app, access)  # two packages type the same thing apart
    wrapped = wrap_app(guarded, config.wsgi_max_body_size, "asgi")
    context = WorkerContext(None)

    async def handle(stream: BoundedStream) -> None:
        await _Server(wrapped, config, context, stream).run()

    return handle


class _Server(TCPServer):
    """Hypercorn's, of HTTP/1.1 alone.

    A client of HTTP/2 that gives no room for its answer, or begins no stream, would be waited for without a limit. So
    would one that asks again before it is answered, and leaves: nothing is read then.
    """

    def __init__(self, app: Any, config: Config, context: WorkerContext, stream: BoundedStream) -> None:
        as_hypercorn_has_it: Any = stream
        super().__init__(app, config, context, ConnectionState({}), as_hypercorn_has_it)
        self._bounded = stream

    async def _read_data(self) -> None:
        made = self.protocol
        made.protocol = _OnlyHttp1(
            made.app,
            made.config,
            made.context,
            made.task_group,
            made.state,
            made.ssl,
            made.client,
            made.server,
            made.send,
        )
        try:
            await super()._read_data()
        except trio.TooSlowError:  # of _Soon
            self._bounded.is_gone()
            await made.handle(Closed())


class _Soon(EventWrapper):
    """That the next request can be read, which is while the last bytes of an answer are on their way."""

    async def wait(self) -> None:
        with trio.fail_after(defaults.WEB_LINGER_SECONDS):
            await super().wait()


class _OnlyHttp1(H11Protocol):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.can_read = _Soon()

    async def _check_protocol(self, event: h11.Request) -> None:
        """Answer as was asked, whatever the client would rather speak."""


class _Guard:
    """Lets through HTTP requests that may be answered: no WebSockets, the right token, a name of this machine."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        refusal = self._refusal(Request(scope))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        access = self._access
        if access.local_names_only:
            host = request.headers.get("host", "")
            if not _is_local(host):
                return PlainTextResponse("this is served to this machine only\n", status_code=421)
            if not _is_of(request.headers.get("origin"), host) or _is_shown_elsewhere(request):
                return PlainTextResponse(
                    "pages of other sites may not ask: open this node's own page\n", status_code=403
                )
        if access.token is None or request.scope["path"] in access.open_paths:
            return None
        if admits(access.token, request.headers.get("authorization", "")):
            return None
        return needs_token(access.token_key)


def needs_token(key: str) -> Response:
    """The refusal of a request without the token that ``key`` of the configuration names."""
    return PlainTextResponse(
        f"needs the header Authorization: Bearer <token>, with what {key} holds\n",
        status_code=401,
        headers={"www-authenticate": "Bearer"},
    )


def _is_of(origin: str | None, host: str) -> bool:
    """Whether a request is of a page from ``host`` itself, or of no page: browsers tell the origin of all others.

    A page cannot read what it gets from elsewhere, but what it sends would be done.
    """
    return origin is None or origin.partition("://")[2] == host


def _is_shown_elsewhere(request: Request) -> bool:
    """Whether a browser asks for a page of another site, as for a picture: without an origin. Links there are good."""
    site, mode = request.headers.get("sec-fetch-site"), request.headers.get("sec-fetch-mode")
    return site in ("cross-site", "same-site") and mode != "navigate"


def _is_local(host: str) -> bool:
    """Whether a ``Host`` header names this machine by a name that nobody else can give to another."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
