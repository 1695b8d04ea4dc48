"""Runs in the environment of the stock peers: the frames of calls, as the Go daemon and Hivemind's streams write them.

Two daemons on 127.0.0.1. One side of each call is stock; the other is a raw stream, which the Go daemon lends to any
program, so what is heard on it are the bytes of the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

SECONDS = 20.0  # for one exchange over loopback
ATTEMPTS = 3
SILENCE = 0.3  # after it nothing more is expected


class Body:
    """A message that is its bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's names
        return self.data

    def ParseFromString(self, data: bytes) -> None:  # noqa: N802
        self.data = data

    @classmethod
    def FromString(cls, data: bytes) -> Body:  # noqa: N802
        return cls(data)


def without_length(frame: bytes) -> bytes:
    """The body of a frame behind a varint."""
    start = next(i for i, byte in enumerate(frame) if byte < 0x80) + 1
    return frame[start:]


async def read_all(reader: asyncio.StreamReader, expected: int) -> bytes:
    """What comes until the end of the stream or silence, which is short once ``expected`` bytes are there."""
    data = b""
    with contextlib.suppress(asyncio.TimeoutError):
        while more := await asyncio.wait_for(reader.read(4096), SECONDS if len(data) < expected else SILENCE):
            data += more
    return data


def write_identity(path: Path) -> str:
    """An Ed25519 identity, as that of the recorded frames: its peer id has 38 bytes, an RSA one 34."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    path.write_bytes(b"\x08\x01\x12\x40" + secret)
    return str(path)


async def frames(golden: dict[str, Any]) -> dict[str, str]:
    """The recorded frames of ``golden`` made anew, in hex."""
    from hivemind.p2p import P2P
    from hivemind.proto import p2pd_pb2

    frame = {name: bytes.fromhex(text) for name, text in golden.items() if isinstance(text, str)}
    request = p2pd_pb2.PersistentConnectionRequest.FromString(without_length(frame["unary_request"]))
    answer = p2pd_pb2.PersistentConnectionRequest.FromString(without_length(frame["unary_response"]))
    method, message = request.callUnary.proto, frame["stream_message"][9:]

    async def fail(_body: Body, _context: Any) -> Body:
        raise ValueError("boom")

    async def respond(_body: Body, _context: Any) -> Body:
        return Body(answer.unaryResponse.response)

    async def stream_and_fail(_bodies: AsyncIterator[Body], _context: Any) -> AsyncIterator[Body]:
        yield Body(message)
        raise ValueError("boom")

    async def one_request() -> AsyncIterator[Body]:
        yield Body(message)

    with tempfile.TemporaryDirectory() as folder:
        options = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "check_if_identity_free": False}
        server = await P2P.create(identity_path=write_identity(Path(folder, "server")), **options)
        client = await P2P.create(
            identity_path=write_identity(Path(folder, "client")),
            initial_peers=await server.get_visible_maddrs(),
            **options,
        )

        async def heard(name: str, count: int, call: Callable[[], Any]) -> bytes:
            """What the stock client writes to a handler that only listens."""
            written: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

            async def listen(_info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                written.set_result(await read_all(reader, count))
                writer.close()

            await server.add_binary_stream_handler(name, listen)
            calling = asyncio.ensure_future(call())
            try:
                return await asyncio.wait_for(written, 2 * SECONDS)
            finally:
                calling.cancel()
                await asyncio.gather(calling, return_exceptions=True)  # the call has no answer to wait for
                await server.remove_binary_stream_handler(name)

        async def answered(name: str, sent: bytes, count: int) -> bytes:
            """What the stock server writes on the bytes ``sent``.

            Asked again if it is too short: stock daemons reset a few finished streams in a thousand.
            """
            data = b""
            for _ in range(ATTEMPTS):
                _, reader, writer = await client.call_binary_stream_handler(server.peer_id, name)
                with contextlib.closing(writer):
                    writer.write(sent)
                    data = await read_all(reader, count)
                if len(data) == count:
                    break
            return data

        async def answered_by(handler: Callable[..., Any], count: int) -> bytes:
            """The same of a unary handler, on the recorded request."""
            await server.add_protobuf_handler(method, handler, Body)
            try:
                return await answered(method, frame["unary_request"], count)
            finally:
                await server.remove_protobuf_handler(method)

        async def stream() -> None:
            responses = await client.iterate_protobuf_handler(
                server.peer_id, "Drift.heard", one_request(), Body
            )
            async for _ in responses:
                pass

        try:
            await server.add_protobuf_handler(
                "Drift.stream", stream_and_fail, Body, stream_input=True, stream_output=True
            )
            call = Body(request.callUnary.data)
            asked = await heard(
                method,
                len(frame["unary_request"]),
                lambda: client.call_protobuf_handler(server.peer_id, method, call, Body),
            )
            said = await heard("Drift.heard", len(frame["stream_message"] + frame["stream_end"]), stream)
            sizes = {name: len(frame[name]) for name in ("stream_message", "stream_error")}
            streamed = await answered("Drift.stream", frame["stream_end"], sum(sizes.values()))
            return {
                "unary_request": with_ids_of(request, asked, p2pd_pb2).hex(),
                "unary_response": (await answered_by(respond, len(frame["unary_response"]))).hex(),
                "unary_error": (await answered_by(fail, len(frame["unary_error"]))).hex(),
                "stream_message": streamed[: sizes["stream_message"]].hex(),
                "stream_error": streamed[sizes["stream_message"] :].hex(),
                "stream_end": said.removeprefix(frame["stream_message"]).hex(),
            }
        finally:
            await client.shutdown()
            await server.shutdown()


def with_ids_of(request: Any, asked: bytes, p2pd_pb2: Any) -> bytes:
    """``asked`` with the call id and the peer id of the recorded request: these are its only random parts."""
    message = p2pd_pb2.PersistentConnectionRequest.FromString(without_length(asked))
    with_call_id = asked.replace(message.callId, request.callId, 1)
    return with_call_id.replace(message.callUnary.peer, request.callUnary.peer, 1)
