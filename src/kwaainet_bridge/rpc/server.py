"""Mounting handlers: one implementation for both stacks.

Rules of the stock peers that this side keeps (hivemind 1.1.12 and its daemon, observed):

* A unary caller sends one envelope and then nothing. Any further byte or the end of its stream means that it
  left, so the handler is cancelled.
* An error in a unary handler is answered with ``repr(exception)``, one in a streaming handler with
  ``str(exception)``.
* A streaming caller ends its requests by a frame, never by closing. Its close cancels the handler.
* A streaming server ends its answers by closing, but only after the caller's end-of-stream was read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, Refusal, RemoteError, StreamClosed, StreamReset
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.method import Method, Req, Res, StreamMethod, UnaryMethod
from kwaainet_bridge.rpc.streams import FrameReader, parse, read_delimited
from kwaainet_bridge.wire import envelope, frames
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallContext:
    """Who calls what. ``peer`` is the connection's authenticated identity, never what the message claims."""

    peer: PeerId
    method: str


UnaryHandler = Callable[[Req, CallContext], Awaitable[Res]]
"""Answers one request. Cancelled when the caller leaves."""


class ServerStream(Generic[Req, Res]):
    """The server's side of one streaming call; iterate over it to receive requests."""

    def __init__(self, stream: Stream, context: CallContext, requests: _Requests[Req, Res]) -> None:
        self.context = context
        self._stream = stream
        self._requests = requests

    async def receive(self) -> Req:
        """The next request. Raises trio.EndOfChannel at the caller's end-of-stream.

        Cancelled: no request is lost.
        """
        return await self._requests.channel.receive()

    def offer(self, request: Req) -> bool:
        """Put a request that came another way in line behind the caller's own.

        Returns whether there was room and the caller's end-of-stream has not been read.
        """
        return self._requests.offer(request)

    def __aiter__(self) -> ServerStream[Req, Res]:
        return self

    async def __anext__(self) -> Req:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def send(self, response: Res) -> None:
        """Send one response; waits while the caller's window is full.

        Raises StreamReset, or StreamClosed when the caller takes longer than ``defaults.SEND_SECONDS`` to
        read it; either way the call is over. Cancelled: the stream cannot be used any more.
        """
        await _write(self._stream, frames.encode_message(response.SerializeToString()))


StreamingHandler = Callable[[ServerStream[Req, Res]], Awaitable[None]]
"""Serves one streaming call; its return ends the answers. Cancelled when the caller leaves."""


class RpcServer:
    """Mounts methods on a host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def mount(self, method: UnaryMethod[Req, Res], handler: UnaryHandler[Req, Res]) -> None:
        """Serve a unary method. ValueError if its name is served already."""
        self._host.serve(method.name, lambda stream: _contain(_serve_unary(stream, method, handler), stream))

    def mount_stream(self, method: StreamMethod[Req, Res], handler: StreamingHandler[Req, Res]) -> None:
        """Serve a streaming method. ValueError if its name is served already."""
        self._host.serve(method.name, lambda stream: _contain(_serve_stream(stream, method, handler), stream))

    def unmount(self, method: Method[Any, Any]) -> None:
        """Refuse new calls; running ones go on."""
        self._host.unserve(method.name)


async def _contain(serving: Coroutine[Any, Any, None], stream: Stream) -> None:
    """A caller that leaves or breaks the protocol ends its own stream, quietly, and nothing else."""
    try:
        await serving
    except NetworkError as e:
        log.debug("%s: %s left: %s", stream.protocol, stream.remote, e)
        await stream.reset()
    except RemoteError as e:
        log.info("%s: %s broke the protocol: %s", stream.protocol, stream.remote, e)
        await stream.reset()


async def _write(stream: Stream, data: bytes) -> None:
    with trio.move_on_after(defaults.SEND_SECONDS) as limit:
        await stream.write(data)
    if limit.cancelled_caught:
        raise StreamClosed(f"{stream.remote} reads nothing of its answer")


def _error_texts(error: Exception, context: CallContext) -> tuple[str, str]:
    """What to answer for an exception, as (unary, streaming) text; the unexpected is logged in full."""
    if isinstance(error, Refusal):
        log.debug("%s refused to %s: %s", context.method, context.peer, error)
        return error.unary_text, error.stream_text
    if isinstance(error, RemoteError):
        log.info("%s: bad request from %s: %s", context.method, context.peer, error)
    else:
        log.error("%s failed for %s", context.method, context.peer, exc_info=error)
    return repr(error), str(error) or repr(error)


async def _serve_unary(
    stream: Stream, method: UnaryMethod[Req, Res], handler: UnaryHandler[Req, Res]
) -> None:
    context = CallContext(stream.remote, method.name)
    with trio.move_on_after(defaults.FIRST_REQUEST_SECONDS) as waiting:
        call = envelope.decode_call(await read_delimited(stream, defaults.MAX_UNARY_BYTES))
    if waiting.cancelled_caught:
        raise StreamClosed(f"{method.name}: {stream.remote} sent no request")
    if call.protocol != method.name:
        raise RemoteError(f"{method.name}: the envelope from {stream.remote} names {call.protocol!r}")
    answer = b""  # stays empty when the caller leaves
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_departure, stream, nursery.cancel_scope)
        try:
            response = await handler(parse(method.request, call.data, method.name), context)
            answer = _encode_answer(call.call_id, response.SerializeToString())
        except Exception as e:
            answer = envelope.encode_error(call.call_id, _error_texts(e, context)[0])
        nursery.cancel_scope.cancel()
    if answer:
        await _write(stream, answer)
    else:
        await stream.reset()


def _encode_answer(call_id: bytes, body: bytes) -> bytes:
    answer = envelope.encode_answer(call_id, response=body)
    if envelope.body_length(answer) > defaults.MAX_UNARY_BYTES:
        raise Refusal(f"response of {len(body)} bytes exceeds the message size limit: use the streaming call")
    return answer


async def _cancel_on_departure(stream: Stream, scope: trio.CancelScope) -> None:
    """Cancel the handler when the caller ends, resets or writes on: all three mean that it left."""
    with contextlib.suppress(NetworkError):
        await stream.read(1)
    scope.cancel()


class _Requests(Generic[Req, Res]):
    """Receives the requests of one streaming call while its handler runs."""

    def __init__(self, stream: Stream, method: StreamMethod[Req, Res], scope: trio.CancelScope) -> None:
        self._reader = FrameReader(stream, method.request)
        self._handler_scope = scope
        self._sender, self.channel = trio.open_memory_channel[Req](defaults.READ_AHEAD_MESSAGES)
        self.ended = False  # the caller sent its end-of-stream
        self.departed = False  # the caller closed or broke the stream: the handler is cancelled
        self.error: RemoteError | None = None

    async def pump(self) -> None:
        """Feed the handler, then watch the stream until the caller leaves, dropping frames after the end."""
        try:
            while (frame := await self._reader.next()) is not None and frame.marker == frames.MESSAGE:
                await self._sender.send(self._reader.parse(frame))
            self.ended = frame is not None
            self._sender.close()
            while frame is not None:
                frame = await self._reader.next()
        except NetworkError:
            pass
        except RemoteError as e:
            self.error = e
        self.departed = True
        self._handler_scope.cancel()

    def offer(self, request: Req) -> bool:
        try:
            self._sender.send_nowait(request)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def wait_for_end(self) -> None:
        """Read up to the caller's end-of-stream, its close, or the grace period.

        Stock Petals clients deadlock when the server closes while they still write their end-of-stream.
        """
        with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS), contextlib.suppress(NetworkError, RemoteError):
            while not self.ended:
                frame = await self._reader.next()
                self.ended = frame is None or frame.marker != frames.MESSAGE


async def _serve_stream(
    stream: Stream, method: StreamMethod[Req, Res], handler: StreamingHandler[Req, Res]
) -> None:
    context = CallContext(stream.remote, method.name)
    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        requests = _Requests(stream, method, nursery.cancel_scope)
        nursery.start_soon(requests.pump)
        try:
            await handler(ServerStream(stream, context, requests))
        except (StreamReset, StreamClosed):
            requests.departed = True  # noticed while answering
        except Exception as e:
            error = e
        nursery.cancel_scope.cancel()
    if requests.error is not None:
        raise requests.error
    if requests.departed:
        await stream.reset()
        return
    if error is not None:
        await _write(stream, frames.encode_error(_error_texts(error, context)[1]))
    await requests.wait_for_end()
