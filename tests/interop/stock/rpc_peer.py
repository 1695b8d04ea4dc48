"""A stock Hivemind peer that makes and serves calls of each shape; driven over stdin and stdout (lines.py).

A message is known by its size alone: ``payload(n)`` is the same n bytes on both sides. On the wire it is the
``metadata`` of an ExpertRequest or ExpertResponse; a request's ``uid`` is an argument of the handler.

Commands::

    connect {address}                               -> peer id
    unary   {peer, method, size, uid, timeout}      -> size of the response
    stream  {peer, method, sizes, uid, take, end}   -> sizes of the responses; closes after ``take`` of them;
                                                       end=false keeps the requests open
    single  {peer, method, sizes}                   -> size of the one response to a stream of requests
    cancel  {call}                                  -> null, once the command of that id is cancelled

Events: ``ready {peer, addresses}``; ``started`` and ``cancelled {method}`` from handlers that wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from typing import Any, AsyncIterator  # noqa: UP035 - Hivemind tells streaming hints by their typing name

from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse
from hivemind.utils.multiaddr import Multiaddr
from lines import Lines

lines = Lines()


def payload(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def size_of(message: ExpertRequest | ExpertResponse) -> int:
    """The message's size; ValueError if its bytes are not that size's."""
    if message.metadata != payload(len(message.metadata)):
        raise ValueError(f"{len(message.metadata)} bytes arrived changed")
    return len(message.metadata)


def response(size: int) -> ExpertResponse:
    return ExpertResponse(metadata=payload(size))


async def wait_for_cancellation(context: P2PContext) -> None:
    lines.event("started", method=context.handle_name)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        lines.event("cancelled", method=context.handle_name)
        raise


class Conformance(ServicerBase):
    """Its name and those of its methods are on the wire."""

    async def rpc_echo(self, request: ExpertRequest, _context: P2PContext) -> ExpertResponse:
        return response(size_of(request))

    async def rpc_blob(self, request: ExpertRequest, _context: P2PContext) -> ExpertResponse:
        return response(int(request.uid))

    async def rpc_fail(self, request: ExpertRequest, _context: P2PContext) -> ExpertResponse:
        raise {"ValueError": ValueError, "KeyError": KeyError}[request.uid]("boom")

    async def rpc_wait(self, _request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        await wait_for_cancellation(context)
        return response(0)

    async def rpc_echo_stream(
        self, requests: AsyncIterator[ExpertRequest], _context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        async for request in requests:
            yield response(size_of(request))

    async def rpc_fail_stream(
        self, requests: AsyncIterator[ExpertRequest], _context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        async for request in requests:
            yield response(size_of(request))
            raise KeyError("boom")

    async def rpc_count_stream(
        self, request: ExpertRequest, _context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        for size in range(int(request.uid)):
            yield response(size)

    async def rpc_number_stream(
        self, requests: AsyncIterator[ExpertRequest], _context: P2PContext
    ) -> ExpertResponse:
        return response(len([size_of(request) async for request in requests]))

    async def rpc_deaf_stream(
        self, _requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        await wait_for_cancellation(context)
        yield response(0)

    async def rpc_endless_stream(
        self, _requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        lines.event("started", method=context.handle_name)
        try:
            while True:
                yield response(1000)
                await asyncio.sleep(0)
        finally:
            lines.event("cancelled", method=context.handle_name)


class Commands:
    def __init__(self, p2p: P2P) -> None:
        self._p2p = p2p

    def _method(self, peer: str, method: str) -> Any:
        return getattr(Conformance.get_stub(self._p2p, PeerID.from_base58(peer)), method)

    async def connect(self, address: str) -> str:
        maddr, _, peer = address.rpartition("/p2p/")
        await self._p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(maddr)])
        return peer

    async def unary(
        self, peer: str, method: str, size: int = 0, uid: str = "", timeout: float | None = None
    ) -> int:
        request = ExpertRequest(uid=uid, metadata=payload(size))
        return size_of(await self._method(peer, method)(request, timeout=timeout))

    async def stream(
        self,
        peer: str,
        method: str,
        *,
        sizes: list[int],
        uid: str = "",
        take: int | None = None,
        end: bool = True,
    ) -> list[int]:
        """Declared as a stream of requests or as one request, the bytes are the same: both are sent as frames."""
        requests = [ExpertRequest(uid=uid, metadata=payload(size)) for size in sizes]
        single = method == "rpc_count_stream"
        responses = await self._method(peer, method)(requests[0] if single else feed(requests, end))
        received = []
        async with contextlib.aclosing(responses):
            while take is None or len(received) < take:
                try:
                    received.append(size_of(await responses.__anext__()))
                except StopAsyncIteration:
                    break
        return received

    async def single(self, peer: str, method: str, sizes: list[int]) -> int:
        requests = [ExpertRequest(metadata=payload(size)) for size in sizes]
        return size_of(await self._method(peer, method)(feed(requests, end=True)))


async def feed(requests: list[ExpertRequest], end: bool) -> AsyncIterator[ExpertRequest]:
    for request in requests:
        yield request
    if not end:
        await asyncio.Event().wait()


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, auto_nat=False)
    await Conformance().add_p2p_handlers(p2p)
    commands = Commands(p2p)
    running: dict[int, asyncio.Task[None]] = {}

    async def run(request: dict[str, Any]) -> None:
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(commands, request["do"])(**arguments))
        except (Exception, asyncio.CancelledError) as e:
            lines.error(request, e)
        finally:
            del running[request["id"]]

    addresses = [str(a) for a in await p2p.get_visible_maddrs()]
    lines.event("ready", peer=p2p.peer_id.to_base58(), addresses=addresses)
    while line := await reader.readline():
        request = json.loads(line)
        if request["do"] == "cancel":
            task = running.get(request["call"])
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
            lines.result(request, None)
        else:
            running[request["id"]] = asyncio.create_task(run(request))
    await p2p.shutdown()
    os._exit(0)  # threads of the library may still wait for what the test left open


if __name__ == "__main__":
    asyncio.run(main())
