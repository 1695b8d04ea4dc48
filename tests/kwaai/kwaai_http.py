"""A small HTTP server on this machine, which a test tells what to answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11
import trio


@dataclass
class Asked:
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


Answer = Callable[[Asked], Awaitable[tuple[int, bytes]]]


@dataclass
class HttpServer:
    url: str
    asked: list[Asked] = field(default_factory=list)
    dropped: trio.Event = field(default_factory=trio.Event)
    """A connection ended while its request was answered."""
    _changed: trio.Event = field(default_factory=trio.Event)

    def note(self, asked: Asked) -> None:
        self.asked.append(asked)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_asked(self, count: int) -> None:
        """Return once that many requests have come."""
        with trio.fail_after(10):
            while len(self.asked) < count:
                await self._changed.wait()


@asynccontextmanager
async def http_server(answer: Answer, **headers: str) -> AsyncIterator[HttpServer]:
    """Serve on a free port of 127.0.0.1 within the block."""

    async def serve(stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            request, body = None, b""
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return
            asked = Asked(
                request.method.decode(),
                request.target.decode(),
                body,
                {name.decode(): value.decode() for name, value in request.headers},
            )
            server.note(asked)

            async def watch() -> None:
                if not await stream.receive_some():
                    server.dropped.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                status, content = await answer(asked)
                nursery.cancel_scope.cancel()
            fields = [("content-length", str(len(content))), *headers.items()]
            for out in (
                h11.Response(status_code=status, headers=fields),
                h11.Data(content),
                h11.EndOfMessage(),
            ):
                await stream.send_all(connection.send(out) or b"")
            connection.start_next_cycle()

    async def contained(stream: trio.SocketStream) -> None:
        try:
            await serve(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            server.dropped.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(lambda task_status: _listen(contained, task_status))
        port = listeners[0].socket.getsockname()[1]
        server = HttpServer(f"http://127.0.0.1:{port}")
        yield server
        nursery.cancel_scope.cancel()


async def _listen(handler, task_status) -> None:
    await trio.serve_tcp(handler, 0, host="127.0.0.1", task_status=task_status)
