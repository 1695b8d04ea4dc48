"""A TCP proxy of the network benchmark that delays each direction and limits neither; driven by lines.py.

Commands::

    forward {port, seconds} -> port    a loopback port whose connections go to ``port``, each way ``seconds`` late
"""

from __future__ import annotations

import math
from functools import partial

import trio

from bench.net_lines import Lines, requests

LOOPBACK = "127.0.0.1"
RECEIVE_BYTES = 256 * 1024


async def delayed(source: trio.SocketStream, sink: trio.SocketStream, seconds: float) -> None:
    """Pass on all of one direction, then its end. What is under way is not bounded: a long wire holds much."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](math.inf)

    async def read() -> None:
        with send:
            while data := await source.receive_some(RECEIVE_BYTES):
                send.send_nowait((trio.current_time() + seconds, data))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        async for due, data in receive:
            await trio.sleep_until(due)
            await sink.send_all(data)
    await sink.send_eof()


async def serve(near: trio.SocketStream, *, port: int, seconds: float) -> None:
    try:
        async with near, await trio.open_tcp_stream(LOOPBACK, port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(delayed, near, far, seconds)
            nursery.start_soon(delayed, far, near, seconds)
    except* trio.BrokenResourceError:
        pass  # either end may leave as it likes


async def main() -> None:
    lines = Lines()
    async with trio.open_nursery() as nursery:
        async for request in requests():
            [listener] = await trio.open_tcp_listeners(0, host=LOOPBACK)
            handler = partial(serve, port=request["port"], seconds=request["seconds"])
            nursery.start_soon(trio.serve_listeners, handler, [listener])
            lines.result(request, listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
