"""Calling a peer's methods."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Generic

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, HandlerError, RemoteError, StreamReset
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.method import Req, Res, StreamMethod, UnaryMethod
from kwaainet_bridge.rpc.streams import FrameReader, parse, parts, read_delimited
from kwaainet_bridge.wire import envelope, frames
from kwaainet_bridge.wire.peer_id import PeerId


def _new_call_id() -> bytes:
    """16 random bytes: stock daemons mix up two calls of one id, whoever made them."""
    return os.urandom(envelope.CALL_ID_BYTES)


class _Deadline:
    """A ``with`` block that ends in DeadlineExceeded after ``seconds``. Without a limit it costs nothing: a scope
    takes a twentieth of a small step's time."""

    def __init__(self, seconds: float, method: str, peer: PeerId) -> None:
        self._scope = None if seconds == math.inf else trio.move_on_after(seconds)
        self._what = (method, peer, seconds)

    def __enter__(self) -> None:
        if self._scope is not None:
            self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._scope is None:
            return None
        handled = self._scope.__exit__(kind, error, trace)
        if self._scope.cancelled_caught:
            method, peer, seconds = self._what
            raise DeadlineExceeded(f"{method} at {peer}: no answer within {seconds:g} s")
        return handled


class RpcClient:
    """Calls methods of peers through a host. Holds no state of its own."""

    def __init__(self, host: Host, *, new_call_id: Callable[[], bytes] = _new_call_id) -> None:
        self._host = host
        self._new_call_id = new_call_id

    async def call(self, peer: PeerId, method: UnaryMethod[Req, Res], request: Req, *, timeout: float) -> Res:
        """Make one unary call; ``timeout`` in seconds covers dialling, opening, sending and the answer.

        Raises HandlerError with the peer's error text, DeadlineExceeded, RemoteError for an answer that
        breaks the protocol, ValueError for a request over ``defaults.MAX_UNARY_BYTES``, and what
        Host.open_stream raises. Cancelled: the peer's handler is cancelled too.
        """
        name = method.name
        message = envelope.encode_call(self._new_call_id(), peer.raw, name, *parts(request))
        length = envelope.body_length(message)
        if length > defaults.MAX_UNARY_BYTES:
            raise ValueError(f"{name}: a request of {length} bytes needs the streaming call")
        with _Deadline(timeout, name, peer):
            stream = await self._host.open_stream(peer, name)
            try:
                await stream.write(message)
                # half-closing here would tell the peer that we left
                answer = envelope.decode_answer(await read_delimited(stream, defaults.MAX_UNARY_BYTES))
            except BaseException:
                await _reset(stream)
                raise
            await stream.close()
        if answer.error is not None:
            raise HandlerError(name, peer, answer.error)
        if answer.response is None:
            raise RemoteError(f"{name} at {peer}: the answer holds neither a response nor an error")
        return parse(method.response, answer.response, name)

    @asynccontextmanager
    async def stream(
        self,
        peer: PeerId,
        method: StreamMethod[Req, Res],
        *,
        open_timeout: float,
        max_message_bytes: int = defaults.MAX_FRAME_BYTES,
    ) -> AsyncIterator[ClientStream[Req, Res]]:
        """Open a streaming call for the length of the ``async with`` block.

        One response may be ``max_message_bytes`` long.

        Leaving the block normally closes the stream, after what was sent; leaving it by an exception or
        cancellation resets it. Both cancel a handler that is still running.
        """
        with _Deadline(open_timeout, method.name, peer):
            stream = await self._host.open_stream(peer, method.name)
        try:
            yield ClientStream(stream, method, max_message_bytes)
        except BaseException:
            await _reset(stream)
            raise
        await stream.close()


async def _reset(stream: Stream) -> None:
    with trio.CancelScope(shield=True):
        await stream.reset()


class ClientStream(Generic[Req, Res]):
    """The caller's side of one streaming call; iterate over it to receive responses."""

    def __init__(
        self,
        stream: Stream,
        method: StreamMethod[Req, Res],
        max_message_bytes: int = defaults.MAX_FRAME_BYTES,
    ) -> None:
        self.peer = stream.remote
        self._method = method
        self._stream = stream
        self._reader = FrameReader(stream, method.response, max_message_bytes, order=method.order)

    async def send(self, request: Req, *, timeout: float = math.inf) -> None:
        """Send one request; waits while the peer's window is full. Raises StreamReset, DeadlineExceeded."""
        with _Deadline(timeout, self._method.name, self.peer):
            await self._stream.write(self._method.order.encode_message(*parts(request)))

    async def end(self, *, timeout: float = math.inf) -> None:
        """Tell the peer that no more requests follow. The stream stays open for its responses."""
        with _Deadline(timeout, self._method.name, self.peer):
            await self._stream.write(self._method.order.encode_end())

    async def receive(self, *, timeout: float = math.inf) -> Res:
        """The next response.

        Raises trio.EndOfChannel when the peer finished, HandlerError with the peer's text, RemoteError when
        the stream ends inside a message or holds something else, DeadlineExceeded. Cancelled: nothing is
        lost.
        """
        with _Deadline(timeout, self._method.name, self.peer):
            try:
                frame = await self._reader.next()
            except StreamReset:
                # the Go daemon ends about 0.3 % of finished streams this way; whoever expects
                # more messages sees their absence
                self._reader.check_boundary()
                raise trio.EndOfChannel from None
        if frame is None:
            raise trio.EndOfChannel
        if frame.marker != frames.MESSAGE:
            raise HandlerError(self._method.name, self.peer, frame.error_text)
        return self._reader.parse(frame)

    def __aiter__(self) -> ClientStream[Req, Res]:
        return self

    async def __anext__(self) -> Res:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
