"""Mounting handlers: one implementation for both stacks.

Rules of the stock peers that this side keeps (hivemind 1.1.12 and its daemon, observed):

* A unary caller sends one envelope and then nothing. What comes together with it is ignored; any later byte,
  or the end of its stream, means that it left, so the handler is cancelled.
* An error in a unary handler is answered with ``repr(exception)``, one in a streaming handler with
  ``str(exception)``.
* A streaming caller ends its requests by a frame, never by closing. Its close cancels the handler.
* A streaming server ends its answers by closing, but only after the caller's end-of-stream was read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, Refusal, RemoteError, StreamClosed, StreamReset
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.budget import ReceiveBudget
from kwaainet_bridge.rpc.inbound import InboundRequests
from kwaainet_bridge.rpc.method import AnyMessage, Method, Req, Res, StreamMethod, UnaryMethod
from kwaainet_bridge.rpc.streams import parse, parts, read_delimited
from kwaainet_bridge.wire import envelope
from kwaainet_bridge.wire.frames import MARKER_FIRST, FrameOrder
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

    def __init__(
        self,
        stream: Stream,
        context: CallContext,
        requests: InboundRequests[Req, Res],
        order: FrameOrder = MARKER_FIRST,
        endings: list[Callable[[], None]] | None = None,
    ) -> None:
        self.context = context
        self._endings = [] if endings is None else endings
        self._stream = stream
        self._order = order
        self._requests = requests

    def at_end(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called once the call is over, its closing handshake included."""
        self._endings.append(tell)

    async def receive(self, *, hold: bool = False) -> Req:
        """The next request. Raises trio.EndOfChannel at the caller's end-of-stream.

        A request's bytes count as waiting until the next one is asked for; with ``hold``, until the call
        ends: for handlers that keep them. Cancelled: no request is lost.
        """
        return await self._requests.receive(hold=hold)

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
        await _write(self._stream, self._order.encode_message(*parts(response)))


StreamingHandler = Callable[[ServerStream[Req, Res]], Awaitable[None]]
"""Serves one streaming call; its return ends the answers. Cancelled when the caller leaves."""


class RpcServer:
    """Mounts methods on a host."""

    def __init__(self, host: Host, *, budget: ReceiveBudget | None = None) -> None:
        self._host = host
        self._budget = budget or ReceiveBudget()

    def mount(self, method: UnaryMethod[Req, Res], handler: UnaryHandler[Req, Res]) -> None:
        """Serve a unary method. ValueError if its name is served already."""
        self._host.serve(
            method.name,
            lambda stream: _contain(_serve_unary(stream, method, handler, self._budget), stream),
        )

    def mount_stream(
        self,
        method: StreamMethod[Req, Res],
        handler: StreamingHandler[Req, Res],
        *,
        max_message_bytes: int = defaults.MAX_FRAME_BYTES,
    ) -> None:
        """Serve a streaming method; one message may be ``max_message_bytes`` long.

        ValueError if its name is served already.
        """

        async def serve(stream: Stream) -> None:
            endings: list[Callable[[], None]] = []
            try:
                call = _serve_stream(
                    stream,
                    method,
                    handler,
                    self._budget,
                    max_message_bytes=max_message_bytes,
                    endings=endings,
                )
                await _contain(call, stream)
            finally:
                for tell in endings:
                    tell()

        self._host.serve(method.name, serve)

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
        log.debug("%s: %s broke the protocol: %.200s", stream.protocol, stream.remote, e)
        await stream.reset()


async def _write(stream: Stream, data: bytes) -> None:
    with trio.move_on_after(defaults.SEND_SECONDS) as limit:
        await stream.write(data)
    if limit.cancelled_caught:
        raise StreamClosed(f"{stream.remote} reads nothing of its answer")


def _error_texts(error: Exception, context: CallContext) -> tuple[str, str]:
    """What to answer for an exception, as (unary, streaming) text; the unexpected is logged in full.

    Peers choose part of many texts, so they are cut, and their own mistakes are logged at DEBUG only.
    """
    if isinstance(error, Refusal):
        log.debug("%s refused to %s: %.200s", context.method, context.peer, error)
        texts = error.unary_text, error.stream_text
    else:
        if isinstance(error, RemoteError):
            log.debug("%s: bad request from %s: %.200s", context.method, context.peer, error)
        else:
            log.error("%s failed for %s", context.method, context.peer, exc_info=error)
        texts = repr(error), str(error) or repr(error)
    unary_text, stream_text = (text[: defaults.MAX_ERROR_CHARACTERS] for text in texts)
    return unary_text, stream_text


async def _serve_unary(
    stream: Stream,
    method: UnaryMethod[Req, Res],
    handler: UnaryHandler[Req, Res],
    budget: ReceiveBudget,
) -> None:
    context = CallContext(stream.remote, method.name)
    failure = "sent no request"
    # one scope for all three waits: scopes and tasks are what a small call costs
    with budget.account(stream.remote) as account, trio.CancelScope() as scope:
        scope.deadline = trio.current_time() + defaults.FIRST_REQUEST_SECONDS
        body = await read_delimited(stream, defaults.MAX_UNARY_BYTES, on_read=account.add)
        scope.deadline = math.inf
        call = envelope.decode_call(body)
        if call.protocol != method.name:
            raise RemoteError(f"{method.name}: the envelope names {call.protocol[:100]!r}")
        failure = "left"
        stream.watch(scope.cancel)  # its end, its reset and a further byte all mean that
        try:
            response = await handler(parse(method.request, call.data, method.name), context)
            answer = _encode_answer(call.call_id, response)
        except Exception as e:
            answer = envelope.encode_error(call.call_id, _error_texts(e, context)[0])
        stream.watch(None)
        account.add(len(answer))  # a caller that does not read its answer holds it in memory
        failure = "reads nothing of its answer"
        scope.deadline = trio.current_time() + defaults.SEND_SECONDS
        await stream.write(answer)
    if scope.cancelled_caught:
        raise StreamClosed(f"{stream.remote} {failure}")


def _encode_answer(call_id: bytes, response: AnyMessage) -> bytes:
    answer = envelope.encode_answer(call_id, *parts(response))
    length = envelope.body_length(answer)
    if length > defaults.MAX_UNARY_BYTES:
        raise Refusal(f"response of {length} bytes exceeds the message size limit: use the streaming call")
    return answer


async def _serve_stream(
    stream: Stream,
    method: StreamMethod[Req, Res],
    handler: StreamingHandler[Req, Res],
    budget: ReceiveBudget,
    *,
    max_message_bytes: int,
    endings: list[Callable[[], None]],
) -> None:
    context = CallContext(stream.remote, method.name)
    error: Exception | None = None
    scope = trio.CancelScope()
    with budget.account(stream.remote) as account:
        requests = InboundRequests(stream, method, scope, account, max_message_bytes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.pump)
            nursery.start_soon(requests.watch)
            with scope:
                try:
                    await handler(ServerStream(stream, context, requests, method.order, endings))
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
            await _write(stream, method.order.encode_error(_error_texts(error, context)[1]))
        await requests.wait_for_end()
