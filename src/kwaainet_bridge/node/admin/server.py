"""Serves the admin side in the node's own event loop, and lets no client of it hold anything up.

Hypercorn speaks HTTP; what accepts connections is here. Hypercorn's own loop waits for a client that does not read
its answer without a limit, the end of the process included, and what goes wrong on one connection would end the node.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.admin.sockets import listening
from kwaainet_bridge.node.admin.tokens import read_token
from kwaainet_bridge.node.state import NodeState

if TYPE_CHECKING:
    from pathlib import Path

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@asynccontextmanager
async def open_admin(
    address: UnixAddress | TcpAddress | None, token_file: Path | None, state: NodeState
) -> AsyncIterator[None]:
    """Serve ``state`` at ``address`` within the block; nothing if that is None.

    At the end, or when cancelled, its connections are closed at once. Raises ConfigError for an address that cannot be
    listened on, or a token that cannot be used.
    """
    if address is None:
        yield
        return
    token = None if token_file is None else read_token(token_file)
    with listening(address) as bound:
        log.info("admin", listen=str(address), token=token is not None)
        host_check = isinstance(address, TcpAddress) and token is None
        server = AdminServer(bound, state, token=token, local_names_only=host_check)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            yield
            nursery.cancel_scope.cancel()


class AdminServer:
    """Accepts connections on ``bound``, which listens. With a ``token`` clients must send it.

    ``local_names_only``: refuse requests that name another host than this machine, as a page in a browser makes them
    that has its own name point here.
    """

    def __init__(
        self, bound: socket.socket, state: NodeState, *, token: str | None, local_names_only: bool
    ) -> None:
        self._bound = bound
        self._state = state
        self._token = token
        self._local_names_only = local_names_only
        self._open: set[BoundedStream] = set()

    async def run(self) -> None:
        """Serve until cancelled; then all connections are closed at once."""
        await trio.lowlevel.wait_readable(self._bound.fileno())
        # only now, since most nodes are never asked: a tenth or two of a second of imports
        await trio.to_thread.run_sync(importlib.import_module, "kwaainet_bridge.node.admin.http")
        from kwaainet_bridge.node.admin.http import make_handler

        handler = make_handler(self._state, token=self._token, local_names_only=self._local_names_only)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._bound.dup()))
        try:
            async with trio.open_nursery() as nursery:
                serve = partial(self._serve, handler)
                nursery.start_soon(partial(trio.serve_listeners, serve, [listener], handler_nursery=nursery))
                try:
                    await trio.sleep_forever()
                finally:
                    for stream in self._open:
                        stream.abort()
        finally:
            listener.socket.close()

    async def _serve(self, handler: Callable[[Any], Any], stream: trio.SocketStream) -> None:
        if len(self._open) >= defaults.ADMIN_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        bounded = BoundedStream(stream)
        self._open.add(bounded)
        try:
            with bounded.scope:
                await handler(bounded)
        except Exception:  # whatever is wrong with one connection, the node goes on
            log.exception("a connection to the admin side failed")
        finally:
            self._open.discard(bounded)
            bounded.abort()


class BoundedStream:
    """A client's stream as Hypercorn uses it; sending fails for one that does not read.

    ``scope`` is for who serves it: that ends soon after the client has closed its end.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.scope = trio.CancelScope()
        self._stream = stream
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        received: bytes | bytearray = b""
        try:
            received = await self._stream.receive_some(max_bytes)
        finally:
            if not received:
                self.scope.deadline = trio.current_time() + defaults.ADMIN_LINGER_SECONDS
        return received

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(defaults.ADMIN_SEND_SECONDS) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client does not read")

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Close at once; whoever waits to send or receive gets trio.ClosedResourceError."""
        self.socket.close()
