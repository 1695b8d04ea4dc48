"""The requests of one streaming call, from its stream to its handler."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Generic

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.budget import Account
from kwaainet_bridge.rpc.method import Req, Res, StreamMethod
from kwaainet_bridge.rpc.streams import FrameReader, parts
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.fields import total


class InboundRequests(Generic[Req, Res]):
    """Reads ahead while the handler runs, within bounds, and notices when the caller leaves.

    ``scope`` is the handler's: it is cancelled when the caller closes, resets or breaks the protocol. Bytes
    that have arrived stay on ``account`` until the handler asks for the next request.
    """

    def __init__(
        self,
        stream: Stream,
        method: StreamMethod[Req, Res],
        scope: trio.CancelScope,
        account: Account,
        max_message_bytes: int,
    ) -> None:
        self.ended = False  # the caller sent its end-of-stream
        self.departed = False
        self.error: RemoteError | None = None
        self._stream = stream
        self._scope = scope
        self._account = account
        self._reader = FrameReader(
            stream, method.request, max_message_bytes, order=method.order, on_read=account.add
        )
        self._queue: deque[tuple[Req, int]] = deque()
        self._queued_bytes = 0
        self._in_use = 0  # bytes of the request that the handler has now
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @property
    def _full(self) -> bool:
        enough = len(self._queue) >= defaults.READ_AHEAD_MESSAGES
        return enough or self._queued_bytes >= defaults.READ_AHEAD_BYTES

    async def pump(self) -> None:
        """Queue requests until the end-of-stream, then drop what follows it."""
        try:
            while (frame := await self._reader.next()) is not None and frame.marker == frames.MESSAGE:
                while self._full:
                    await self._changed.wait()
                self._put(self._reader.parse(frame), frames.HEADER_BYTES + len(frame.payload))
                frame = None  # whoever takes the request decides how long its bytes stay
            self.ended = frame is not None
            self._notify()
            while frame is not None:
                self._account.drop(frames.HEADER_BYTES + len(frame.payload))
                frame = None
                frame = await self._reader.next()
        except NetworkError:
            pass
        except RemoteError as e:
            self.error = e
        self.departed = True
        self._scope.cancel()

    async def watch(self) -> None:
        """Notice that the caller left also while the queue is full and nothing is read."""
        await self._stream.wait_ended()
        self.departed = True
        self._scope.cancel()

    def _put(self, request: Req, count: int) -> None:
        self._queue.append((request, count))
        self._queued_bytes += count
        self._notify()

    def offer(self, request: Req) -> bool:
        """Put a request in line that came another way, as long as it is in memory.

        False if there is no room in line or on the account, or the end was read.
        """
        if self.ended or self._full:
            return False
        count = total(parts(request))
        try:
            self._account.add(count)
        except RemoteError:
            return False
        self._put(request, count)
        return True

    async def receive(self, *, hold: bool) -> Req:
        """The next request; trio.EndOfChannel after the last. See ServerStream.receive."""
        self._account.drop(self._in_use)
        self._in_use = 0
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self.ended:
                raise trio.EndOfChannel
            await self._changed.wait()
        request, count = self._queue.popleft()
        self._queued_bytes -= count
        self._in_use = 0 if hold else count
        self._notify()
        return request

    async def wait_for_end(self) -> None:
        """Read up to the caller's end-of-stream, its close, or the grace period.

        Stock Petals clients deadlock when the server closes while they still write their end-of-stream.
        """
        with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS), contextlib.suppress(NetworkError, RemoteError):
            while not self.ended:
                frame = await self._reader.next()
                self.ended = frame is None or frame.marker != frames.MESSAGE
