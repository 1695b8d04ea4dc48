"""Our side of ``stock/rpc_peer.py``: the same methods, messages and handlers."""

from __future__ import annotations

import random
from collections import defaultdict

import trio

from kwaainet_bridge.rpc import CallContext, RpcServer, ServerStream, streaming, unary
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse

ECHO, BLOB, FAIL, WAIT = (
    unary(f"Conformance.rpc_{name}", ExpertRequest, ExpertResponse)
    for name in ("echo", "blob", "fail", "wait")
)
ECHO_STREAM, FAIL_STREAM, COUNT_STREAM, NUMBER_STREAM, DEAF_STREAM, ENDLESS_STREAM = (
    streaming(f"Conformance.rpc_{name}_stream", ExpertRequest, ExpertResponse)
    for name in ("echo", "fail", "count", "number", "deaf", "endless")
)
UNSERVED = unary("Conformance.rpc_unserved", ExpertRequest, ExpertResponse)
UNSERVED_STREAM = streaming("Conformance.rpc_unserved", ExpertRequest, ExpertResponse)

Stream = ServerStream[ExpertRequest, ExpertResponse]


def payload(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def request(size: int = 0, uid: str = "") -> ExpertRequest:
    return ExpertRequest(uid=uid, metadata=payload(size))


def response(size: int) -> ExpertResponse:
    return ExpertResponse(metadata=payload(size))


def size_of(message: ExpertRequest | ExpertResponse) -> int:
    assert message.metadata == payload(len(message.metadata)), (
        f"{len(message.metadata)} bytes arrived changed"
    )
    return len(message.metadata)


class Handlers:
    """The handlers, and which of them were started and cancelled how often."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], trio.Event] = defaultdict(trio.Event)

    def mount(self, server: RpcServer) -> None:
        server.mount(ECHO, self.echo)
        server.mount(BLOB, self.blob)
        server.mount(FAIL, self.fail)
        server.mount(WAIT, self.wait)
        server.mount_stream(ECHO_STREAM, self.echo_stream)
        server.mount_stream(FAIL_STREAM, self.fail_stream)
        server.mount_stream(COUNT_STREAM, self.count_stream)
        server.mount_stream(NUMBER_STREAM, self.number_stream)
        server.mount_stream(DEAF_STREAM, self.deaf_stream)
        server.mount_stream(ENDLESS_STREAM, self.endless_stream)

    async def event(self, name: str, method: str) -> None:
        """Wait until a handler of the method was ``started`` or ``cancelled``."""
        with trio.fail_after(20):
            await self._events[name, method].wait()

    async def echo(self, request: ExpertRequest, _context: CallContext) -> ExpertResponse:
        return response(size_of(request))

    async def blob(self, request: ExpertRequest, _context: CallContext) -> ExpertResponse:
        return response(int(request.uid))

    async def fail(self, request: ExpertRequest, _context: CallContext) -> ExpertResponse:
        raise {"ValueError": ValueError, "KeyError": KeyError}[request.uid]("boom")

    async def wait(self, _request: ExpertRequest, context: CallContext) -> ExpertResponse:
        await self._wait_for_cancellation(context)
        return response(0)

    async def echo_stream(self, call: Stream) -> None:
        async for item in call:
            await call.send(response(size_of(item)))

    async def fail_stream(self, call: Stream) -> None:
        await call.send(response(size_of(await call.receive())))
        raise KeyError("boom")

    async def count_stream(self, call: Stream) -> None:
        for size in range(int((await call.receive()).uid)):
            await call.send(response(size))

    async def number_stream(self, call: Stream) -> None:
        await call.send(response(len([size_of(item) async for item in call])))

    async def deaf_stream(self, call: Stream) -> None:
        await self._wait_for_cancellation(call.context)

    async def endless_stream(self, call: Stream) -> None:
        self._events["started", call.context.method].set()
        try:
            while True:
                await call.send(response(1000))
        finally:  # by cancellation, or because a write failed: whichever tells of the caller's leaving first
            self._events["cancelled", call.context.method].set()

    async def _wait_for_cancellation(self, context: CallContext) -> None:
        self._events["started", context.method].set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self._events["cancelled", context.method].set()
            raise
