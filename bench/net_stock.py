"""The stock peers of the network benchmark: Hivemind's ``P2P`` and its Go daemon, driven like ``net_ours.py``.

Runs in the stock environment and must not import this package. Commands and answers are those of ``net_ours.py``.
Its one argument is the event loop: ``uvloop``, as in every stock program, or ``asyncio``, Python's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, AsyncIterator, Self  # noqa: UP035 - Hivemind tells streaming hints by their typing name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "stock"))

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse
from hivemind.utils.asyncio import switch_to_uvloop
from hivemind.utils.multiaddr import Multiaddr
from lines import Lines

ECHO, STEP, SINK = "Bench.echo", "Bench.step", "Bench.sink"
IN_FLIGHT = 50
PIECE_BYTES = 64 * 1024  # what Hivemind itself writes at a time; larger ones make it slower
Answer = dict[str, Any]


async def echo(request: ExpertRequest, _context) -> ExpertResponse:
    return ExpertResponse(metadata=request.metadata)


async def echo_steps(requests, _context):
    async for request in requests:
        yield ExpertResponse(metadata=request.metadata)


async def sink(_info, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    missing = int.from_bytes(await reader.readexactly(8), "big")
    while missing and (data := await reader.read(PIECE_BYTES)):
        missing -= len(data)
    if not missing:
        writer.write(b"k")
        await writer.drain()
    await reader.read()
    writer.close()


async def transfer(p2p: P2P, peer: PeerID, payload: bytes) -> float:
    _, reader, writer = await p2p.call_binary_stream_handler(peer, SINK)
    began = time.perf_counter()
    writer.write(len(payload).to_bytes(8, "big"))
    for start in range(0, len(payload), PIECE_BYTES):
        writer.write(payload[start : start + PIECE_BYTES])
        await writer.drain()
    answer = await reader.read(1)
    seconds = time.perf_counter() - began
    writer.close()
    check(answer == b"k", "the transfer was cut short")
    return seconds


@cache
def payload_of(size: int) -> bytes:
    """Made once, by the warm-up: random bytes cost as much as sending them."""
    return os.urandom(size)


def check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class Steps:
    """One streaming call, a request and its response at a time."""

    def __init__(self, p2p: P2P, peer: str) -> None:
        self._p2p = p2p
        self._peer = PeerID.from_base58(peer)
        self._requests: asyncio.Queue[ExpertRequest | None] = asyncio.Queue()

    async def _feed(self) -> AsyncIterator[ExpertRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def __aenter__(self) -> Self:
        self._responses = await self._p2p.iterate_protobuf_handler(
            self._peer, STEP, self._feed(), ExpertResponse
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._requests.put_nowait(None)
        async for _response in self._responses:
            raise ValueError("an answer too many")

    async def one(self, request: ExpertRequest) -> float:
        began = time.perf_counter()
        self._requests.put_nowait(request)
        response = await self._responses.__anext__()
        seconds = time.perf_counter() - began
        check(len(response.metadata) == len(request.metadata), "the answer has another size")
        return seconds


class Commands:
    def __init__(self) -> None:
        self.peers: dict[str, P2P] = {}

    async def open(self, name: str) -> str:
        p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, auto_nat=False)
        self.peers[name] = p2p
        await p2p.add_protobuf_handler(ECHO, echo, ExpertRequest)
        await p2p.add_protobuf_handler(STEP, echo_steps, ExpertRequest, stream_input=True, stream_output=True)
        await p2p.add_binary_stream_handler(SINK, sink)
        return str((await p2p.get_visible_maddrs())[0])

    async def connect(self, name: str, address: str) -> str:
        transport, _, peer = address.partition("/p2p/")
        client = self.peers[name]._client  # noqa: SLF001 - P2P itself connects by peer id alone
        await client.connect(PeerID.from_base58(peer), [Multiaddr(transport)])
        return peer

    async def call(self, name: str, peer: str, size: int, count: int) -> Answer:
        seconds, failed = await self._calls(name, peer, size, count)
        return {"seconds": seconds, "calls": count, "failed": failed}

    async def parallel(self, name: str, peer: str, size: int, count: int) -> Answer:
        each = count // IN_FLIGHT
        began = time.perf_counter()
        done = await asyncio.gather(*(self._calls(name, peer, size, each) for _ in range(IN_FLIGHT)))
        seconds = time.perf_counter() - began
        return {"seconds": [seconds], "calls": each * IN_FLIGHT, "failed": sum(f for _, f in done)}

    async def _calls(self, name: str, peer: str, size: int, count: int) -> tuple[list[float], int]:
        p2p = self.peers[name]
        remote = PeerID.from_base58(peer)
        request = ExpertRequest(metadata=payload_of(size))
        seconds: list[float] = []
        failed = 0
        for _ in range(count):
            began = time.perf_counter()
            try:
                response = await p2p.call_protobuf_handler(remote, ECHO, request, ExpertResponse)
            except (P2PDaemonError, P2PHandlerError):
                failed += 1
                continue
            seconds.append(time.perf_counter() - began)
            check(response.metadata == request.metadata, "the answer is not what was sent")
        return seconds, failed

    async def step(self, name: str, peer: str, size: int, count: int) -> Answer:
        request = ExpertRequest(metadata=payload_of(size))
        async with Steps(self.peers[name], peer) as steps:
            seconds = [await steps.one(request) for _ in range(count)]
        return {"seconds": seconds, "calls": count, "failed": 0}

    async def bulk(self, name: str, peer: str, size: int, count: int) -> Answer:
        payload = payload_of(size)
        remote = PeerID.from_base58(peer)
        seconds = [await transfer(self.peers[name], remote, payload) for _ in range(count)]
        return {"seconds": seconds, "calls": count, "failed": 0}

    async def busy(self, name: str, peer: str, size: int, count: int, bulk: int) -> Answer:
        request = ExpertRequest(metadata=payload_of(size))
        payload = payload_of(bulk)
        busy: list[float] = []

        async def transfers() -> None:
            while len(busy) < count:
                await transfer(self.peers[name], PeerID.from_base58(peer), payload)

        async with Steps(self.peers[name], peer) as steps:
            idle = [await steps.one(request) for _ in range(count)]
            running = asyncio.create_task(transfers())
            while not running.done():
                busy.append(await steps.one(request))
            await running
        return {"idle": idle, "busy": busy, "calls": len(idle) + len(busy), "failed": 0}


async def main() -> None:
    lines = Lines()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    commands = Commands()
    while line := await reader.readline():
        request = json.loads(line)
        arguments = {k: v for k, v in request.items() if k not in ("id", "do")}
        try:
            lines.result(request, await getattr(commands, request["do"])(**arguments))
        except Exception as e:
            lines.error(request, e)
    for p2p in commands.peers.values():
        await p2p.shutdown()
    os._exit(0)  # threads of the library may still wait


if __name__ == "__main__":
    if sys.argv[1] == "uvloop":
        switch_to_uvloop().run_until_complete(main())
    else:
        asyncio.run(main())
