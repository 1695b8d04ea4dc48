"""Our peers of the network benchmark: a server or a client process, driven over stdin and stdout (lines.py).

Uses what any user of the package has. ``net_stock.py`` has the same commands; times are in seconds::

    open     {name}                       -> address of a new host of this process
    connect  {name, address}              -> peer id
    call     {name, peer, size, count}    -> unary calls, one after the other
    parallel {name, peer, size, count}    -> the same, IN_FLIGHT of them at a time; ``seconds`` holds the total
    step     {name, peer, size, count}    -> requests and responses on one open stream
    bulk     {name, peer, size, count}    -> transfers of ``size`` bytes, each on a stream of its own
    busy     {name, peer, size, count, bulk} -> ``idle``: steps; ``busy``: steps beside transfers of ``bulk`` bytes
    cipher   {size, message}              -> raw ChaCha20-Poly1305: seconds for ``size`` bytes
    profile  {on}                         -> null; when switched off, where the time went

Measurements answer ``{"seconds": [...], "calls": how many, "failed": how many of them}``.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from typing import Any

import trio

from bench.net_lines import Lines, requests
from kwaainet_bridge.errors import HandlerError, NetworkError, RemoteError
from kwaainet_bridge.net import Host, HostConfig, Stream, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.rpc import CallContext, RpcClient, RpcServer, ServerStream, streaming, unary
from kwaainet_bridge.rpc.client import ClientStream
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

ECHO = unary("Bench.echo", ExpertRequest, ExpertResponse)
STEP = streaming("Bench.step", ExpertRequest, ExpertResponse)
SINK = "Bench.sink"
IN_FLIGHT = 50
TIMEOUT = 60.0
PIECE_BYTES = 256 * 1024
PROFILE_LINES = 25
Answer = dict[str, Any]


async def echo(request: ExpertRequest, _context: CallContext) -> ExpertResponse:
    return ExpertResponse(metadata=request.metadata)


async def echo_steps(call: ServerStream[ExpertRequest, ExpertResponse]) -> None:
    async for request in call:
        await call.send(ExpertResponse(metadata=request.metadata))


async def sink(stream: Stream) -> None:
    """Read a length of 8 bytes and as many bytes, answer with one."""
    received = b""
    while len(received) < 8 and (data := await stream.read(PIECE_BYTES)):
        received += data
    missing = int.from_bytes(received[:8], "big") - len(received[8:])
    while missing and (data := await stream.read(PIECE_BYTES)):
        missing -= len(data)
    if not missing:
        await stream.write(b"k")
    await stream.wait_ended()  # a stock daemon may reset what is closed before it was read


async def transfer(host: Host, peer: PeerId, payload: bytes) -> float:
    stream = await host.open_stream(peer, SINK)
    began = time.perf_counter()
    await stream.write(len(payload).to_bytes(8, "big"))
    for start in range(0, len(payload), PIECE_BYTES):
        await stream.write(payload[start : start + PIECE_BYTES])
    answer = await stream.read(1)
    seconds = time.perf_counter() - began
    await stream.close()
    check(answer == b"k", "the transfer was cut short")
    return seconds


@cache
def payload_of(size: int) -> bytes:
    """Made once, by the warm-up: random bytes cost as much as sending them."""
    return os.urandom(size)


def check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class Commands:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._hosts: dict[str, Host] = {}
        self._profile = cProfile.Profile()

    async def open(self, name: str) -> str:
        config = HostConfig(Identity.generate("ed25519"))
        self._hosts[name] = host = await self._stack.enter_async_context(open_host(config))
        server = RpcServer(host)
        server.mount(ECHO, echo)
        server.mount_stream(STEP, echo_steps)
        host.serve(SINK, sink)
        return host.addresses()[0]

    async def connect(self, name: str, address: str) -> str:
        return str(await self._hosts[name].connect(address))

    async def call(self, name: str, peer: str, size: int, count: int) -> Answer:
        seconds, failed = await self._calls(name, peer, size, count)
        return {"seconds": seconds, "calls": count, "failed": failed}

    async def parallel(self, name: str, peer: str, size: int, count: int) -> Answer:
        failed = 0

        async def some() -> None:
            nonlocal failed
            failed += (await self._calls(name, peer, size, count // IN_FLIGHT))[1]

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT):
                nursery.start_soon(some)
        seconds = time.perf_counter() - began
        return {"seconds": [seconds], "calls": count // IN_FLIGHT * IN_FLIGHT, "failed": failed}

    async def _calls(self, name: str, peer: str, size: int, count: int) -> tuple[list[float], int]:
        client = RpcClient(self._hosts[name])
        remote = PeerId.parse(peer)
        request = ExpertRequest(metadata=payload_of(size))
        seconds: list[float] = []
        failed = 0
        for _ in range(count):
            began = time.perf_counter()
            try:
                response = await client.call(remote, ECHO, request, timeout=TIMEOUT)
            except (NetworkError, RemoteError, HandlerError):
                failed += 1
                continue
            seconds.append(time.perf_counter() - began)
            check(response.metadata == request.metadata, "the answer is not what was sent")
        return seconds, failed

    async def step(self, name: str, peer: str, size: int, count: int) -> Answer:
        request = ExpertRequest(metadata=payload_of(size))
        async with self._steps(name, peer) as stream:
            seconds = [await one_step(stream, request) for _ in range(count)]
        return {"seconds": seconds, "calls": count, "failed": 0}

    @asynccontextmanager
    async def _steps(
        self, name: str, peer: str
    ) -> AsyncIterator[ClientStream[ExpertRequest, ExpertResponse]]:
        client = RpcClient(self._hosts[name])
        async with client.stream(PeerId.parse(peer), STEP, open_timeout=TIMEOUT) as stream:
            yield stream
            await stream.end()
            async for _ in stream:
                raise ValueError("an answer too many")

    async def bulk(self, name: str, peer: str, size: int, count: int) -> Answer:
        payload = payload_of(size)
        remote = PeerId.parse(peer)
        seconds = [await transfer(self._hosts[name], remote, payload) for _ in range(count)]
        return {"seconds": seconds, "calls": count, "failed": 0}

    async def busy(self, name: str, peer: str, size: int, count: int, bulk: int) -> Answer:
        request = ExpertRequest(metadata=payload_of(size))
        payload = payload_of(bulk)
        busy: list[float] = []
        over = False

        async def transfers() -> None:
            nonlocal over
            while len(busy) < count:
                await transfer(self._hosts[name], PeerId.parse(peer), payload)
            over = True

        async with self._steps(name, peer) as stream:
            idle = [await one_step(stream, request) for _ in range(count)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transfers)
                while not over:
                    busy.append(await one_step(stream, request))
        return {"idle": idle, "busy": busy, "calls": len(idle) + len(busy), "failed": 0}

    async def cipher(self, size: int, message: int) -> float:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        await trio.lowlevel.checkpoint()
        cipher = ChaCha20Poly1305(ChaCha20Poly1305.generate_key())
        plaintext = os.urandom(message)
        began = time.perf_counter()
        for number in range(size // message):
            cipher.encrypt(number.to_bytes(12, "little"), plaintext, b"")
        return time.perf_counter() - began

    async def profile(self, on: bool) -> str | None:
        await trio.lowlevel.checkpoint()
        if on:
            self._profile.enable()
            return None
        self._profile.disable()
        text = io.StringIO()
        pstats.Stats(self._profile, stream=text).sort_stats("tottime").print_stats(PROFILE_LINES)
        return text.getvalue()


async def one_step(stream: ClientStream[ExpertRequest, ExpertResponse], request: ExpertRequest) -> float:
    began = time.perf_counter()
    await stream.send(request)
    response = await stream.receive(timeout=TIMEOUT)
    seconds = time.perf_counter() - began
    check(len(response.metadata) == len(request.metadata), "the answer has another size")
    return seconds


async def main() -> None:
    lines = Lines()
    async with AsyncExitStack() as stack:
        commands = Commands(stack)
        async for request in requests():
            arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
            try:
                lines.result(request, await getattr(commands, request["do"])(**arguments))
            except Exception as e:
                lines.error(request, e)


if __name__ == "__main__":
    trio.run(main)
