"""Serves the endpoint where the configuration says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
import trio

from kwaainet_bridge.admin_address import TcpAddress, parse_admin_address
from kwaainet_bridge.config import OpenAIConfig
from kwaainet_bridge.engine import Storage
from kwaainet_bridge.node.generating import TextModels, TextNetwork, load_text_model
from kwaainet_bridge.node.openai.sharing import SharedApp
from kwaainet_bridge.node.state import NodeState
from kwaainet_bridge.node.web.server import WebServer
from kwaainet_bridge.node.web.sockets import listening
from kwaainet_bridge.node.web.tokens import read_token

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@asynccontextmanager
async def open_openai(
    config: OpenAIConfig,
    names: Sequence[str],
    networks: Sequence[TextNetwork],
    storage: Callable[[str], Storage],
    state: NodeState,
) -> AsyncIterator[None]:
    """Serve text of the models ``names`` within the block, if the configuration wants it.

    Their ends are kept as ``storage`` says of each. ``state`` has the routes meanwhile, for the admin side. Raises
    ConfigError for an address that cannot be listened on, or a token that cannot be used.
    """
    address = parse_admin_address(config.listen)
    if address is None:
        yield
        return
    token = None if config.token_file is None else read_token(config.token_file, key="openai.token_file")
    with listening(address, key="openai.listen") as bound:
        log.info("openai", listen=str(address), token=token is not None, models=list(names))
        host_check = isinstance(address, TcpAddress) and token is None
        models = TextModels(names, networks, load=lambda name: load_text_model(name, storage=storage(name)))

        def make_routes() -> ASGIApp:
            from kwaainet_bridge.node.openai.app import make_app
            from kwaainet_bridge.node.openai.limits import Limits

            limits = Limits(at_once=config.at_once, per_minute=config.most_per_minute)
            return make_app(models, limits)

        def make() -> Callable[[Any], Awaitable[None]]:
            from kwaainet_bridge.node.web.connections import Access, make_handler

            access = Access(token, "openai.token_file", local_names_only=host_check)
            # a client is silent for as long as its answer takes
            return make_handler(routes.made(), access, silent_seconds=None)

        routes = SharedApp(make_routes, token=token)
        server = WebServer(bound, make, name="openai")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            state.openai, state.texts = routes, models
            try:
                yield
            finally:
                state.openai = state.texts = None
                await routes.close()
            nursery.cancel_scope.cancel()
