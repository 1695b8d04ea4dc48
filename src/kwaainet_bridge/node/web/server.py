"""Serves HTTP in the node's own event loop, and lets no client of it hold anything up.

Hypercorn speaks HTTP; what accepts connections is here. Hypercorn's own loop waits for a client that does not read
its answer without a limit, the end of the process included, and what goes wrong on one connection would end the node.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
import trio

from kwaainet_bridge import defaults

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class WebServer:
    """Accepts connections on ``bound``, which listens.

    ``make`` gives what serves a connection's stream. It is called in a thread when somebody connects for the first
    time: most nodes are never asked, and what HTTP needs takes a tenth or two of a second to import.
    """

    def __init__(
        self, bound: socket.socket, make: Callable[[], Callable[[Any], Awaitable[None]]], *, name: str
    ) -> None:
        self._bound = bound
        self._make = make
        self._name = name
        self._open: set[BoundedStream] = set()

    async def run(self) -> None:
        """Serve until cancelled; then all connections are closed at once."""
        await trio.lowlevel.wait_readable(self._bound.fileno())
        handler = await trio.to_thread.run_sync(self._make)
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
        if len(self._open) >= defaults.WEB_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        bounded = BoundedStream(stream)
        self._open.add(bounded)
        try:
            with bounded.scope:
                await handler(bounded)
        except Exception:  # whatever is wrong with one connection, the node goes on
            log.exception("a connection failed", to=self._name)
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
                self.is_gone()
        return received

    def is_gone(self) -> None:
        """Have who serves it end soon."""
        self.scope.deadline = trio.current_time() + defaults.WEB_LINGER_SECONDS

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(defaults.WEB_SEND_SECONDS) as limit:
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
