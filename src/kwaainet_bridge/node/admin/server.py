"""Serves the admin side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
import trio

from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.web.server import WebServer
from kwaainet_bridge.node.web.sockets import listening
from kwaainet_bridge.node.web.tokens import read_token

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@asynccontextmanager
async def open_admin(
    address: UnixAddress | TcpAddress | None,
    token_file: Path | None,
    state: NodeState,
    *,
    openai: bool = False,
    control: Control | None = None,
) -> AsyncIterator[None]:
    """Serve ``state`` at ``address`` within the block; nothing if that is None.

    ``openai``: the node is to have an OpenAI endpoint, which its page may use. At the end, or when cancelled, its
    connections are closed at once. Raises ConfigError for an address that cannot be listened on, or a token that
    cannot be used.
    """
    if address is None:
        yield
        return
    token = None if token_file is None else read_token(token_file, key="admin.token_file")
    with listening(address, key="admin.listen") as bound:
        log.info("admin", listen=str(address), token=token is not None)
        host_check = isinstance(address, TcpAddress) and token is None

        async with trio.open_nursery() as nursery:

            def make() -> Callable[[Any], Awaitable[None]]:
                from kwaainet_bridge.node.admin.dashboard import STATIC_PATHS
                from kwaainet_bridge.node.admin.http import make_app
                from kwaainet_bridge.node.web.connections import Access, make_handler

                open_paths = ("/livez", *STATIC_PATHS)
                access = Access(token, "admin.token_file", open_paths, local_names_only=host_check)
                # a page listens for hours without a word; the one route that reads bodies bounds that itself
                app = make_app(state, nursery, openai=openai, has_token=token is not None, control=control)
                return make_handler(app, access, silent_seconds=None)

            nursery.start_soon(WebServer(bound, make, name="admin").run)
            yield
            nursery.cancel_scope.cancel()
