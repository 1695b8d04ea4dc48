"""``/kwaai/inference-mux/1.0.0``, the asking side: HTTP requests to a peer's local endpoint."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError, StreamClosed
from kwaainet_bridge.kwaai.client import granted
from kwaainet_bridge.kwaai.mux import READ_BYTES
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.kwaai_lease import Granted
from kwaainet_bridge.wire.kwaai_mux import (
    PROTOCOL,
    MuxDecoder,
    MuxLeaseKeepalive,
    MuxLeaseRelease,
    MuxLeaseRequest,
    MuxLeaseResponse,
    MuxMessage,
    MuxRequest,
    MuxResponse,
    MuxUnknown,
    encode_frame,
)
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_QUEUED_FRAMES: Final = 16
"""Frames that wait to be written; further callers wait."""


@dataclass(slots=True)
class _Waiting:
    kind: type[MuxResponse | MuxLeaseResponse]
    answer: MuxResponse | MuxLeaseResponse | None = None
    done: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def open_mux(
    host: Host, peer: PeerId, *, open_timeout: float, max_answer_bytes: int = defaults.MAX_MUX_FRAME_BYTES
) -> AsyncIterator[MuxClient]:
    """A mux stream to ``peer`` for the length of the block; its leases end with it.

    Raises what Host.open_stream raises, DeadlineExceeded after ``open_timeout`` seconds.
    """
    stream = None
    with trio.move_on_after(open_timeout):
        stream = await host.open_stream(peer, PROTOCOL)
    if stream is None:
        raise DeadlineExceeded(f"{PROTOCOL} at {peer}: no stream within {open_timeout:g} s")
    mux = MuxClient(stream, max_answer_bytes)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mux.run)
            try:
                yield mux
            except Exception as e:  # out of a nursery it would come in a group
                failure = e
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await (stream.close() if mux.in_order else stream.reset())
    if failure is not None:
        raise failure


class MuxClient:
    """Any number of tasks may ask at the same time. Made by :func:`open_mux`."""

    def __init__(self, stream: Stream, max_answer_bytes: int) -> None:
        self.peer = stream.remote
        self.in_order = True
        """Whether the stream may be closed rather than reset: nothing is half written."""
        self._stream = stream
        self._decoder = MuxDecoder(max_answer_bytes)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._to_write, self._written = trio.open_memory_channel[bytes](_QUEUED_FRAMES)
        self._failure: str | None = None

    async def request(
        self, method: str, path: str, body: bytes = b"", *, lease_id: int | None = None, timeout: float
    ) -> tuple[int, bytes]:
        """Status and body of the peer's answer, within ``timeout`` seconds.

        409 means that the lease has ended. Raises DeadlineExceeded, StreamClosed once the stream is over, ValueError
        for a body that fits into no frame. Cancelled: the peer goes on, its answer is dropped; others are not affected.
        """
        number = next(self._numbers)
        message = MuxRequest(request_id=number, method=method, path=path, body=body, lease_id=lease_id)
        answer = await self._ask(number, message, MuxResponse, timeout)
        assert isinstance(answer, MuxResponse)
        return answer.status, bytes(answer.body)

    async def lease(self, model: str | None = None, *, timeout: float) -> Granted:
        """A lease of this stream. Raises CapacityDenied, LeaseDenied, and what ``request`` raises."""
        number = next(self._numbers)
        message = MuxLeaseRequest(request_id=number, model=model)
        answer = await self._ask(number, message, MuxLeaseResponse, timeout)
        assert isinstance(answer, MuxLeaseResponse)
        return granted(self.peer, answer.outcome)

    async def keep(self, lease_id: int) -> None:
        """Tell the peer that the lease is still needed: about every half of its time without a request."""
        await self._write(MuxLeaseKeepalive(lease_id=lease_id))

    async def release(self, lease_id: int) -> None:
        """Give the lease back."""
        await self._write(MuxLeaseRelease(lease_id=lease_id))

    async def _ask(
        self,
        number: int,
        message: MuxMessage,
        kind: type[MuxResponse | MuxLeaseResponse],
        timeout: float,
    ) -> MuxResponse | MuxLeaseResponse:
        waiting = self._waiting[number] = _Waiting(kind)
        try:
            with trio.move_on_after(timeout):
                await self._write(message)
                await waiting.done.wait()
        finally:
            del self._waiting[number]
        if waiting.answer is not None:
            return waiting.answer
        if self._failure is not None:
            raise StreamClosed(f"mux stream to {self.peer}: {self._failure}")
        raise DeadlineExceeded(f"mux stream to {self.peer}: no answer within {timeout:g} s")

    async def _write(self, message: MuxMessage) -> None:
        frame = encode_frame(message)
        if self._failure is not None:
            raise StreamClosed(f"mux stream to {self.peer}: {self._failure}")
        try:
            await self._to_write.send(frame)
        except trio.BrokenResourceError as e:
            raise StreamClosed(f"mux stream to {self.peer}: {self._failure}") from e

    async def run(self) -> None:
        """Write and read frames until the stream is over; then whoever waits for an answer gets StreamClosed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_frames)
                await self._read()
                nursery.cancel_scope.cancel()
        except* (NetworkError, RemoteError) as e:
            self.in_order = False
            self._failure = str(e.exceptions[0])
        finally:
            self._failure = self._failure or "the peer closed it"
            self._written.close()
            for waiting in self._waiting.values():
                waiting.done.set()

    async def _write_frames(self) -> None:
        async for frame in self._written:
            self.in_order = False
            await self._stream.write(frame)
            self.in_order = True

    async def _read(self) -> None:
        while data := await self._stream.read(READ_BYTES):
            for message in self._decoder.feed(data):
                if isinstance(message, MuxUnknown):
                    log.debug("mux stream to %s: ignored a message %.40r", self.peer, message.name)
                    continue
                if not isinstance(message, MuxResponse | MuxLeaseResponse):
                    raise RemoteError(f"{type(message).__name__} from the side that answers")
                waiting = self._waiting.get(message.request_id)
                if waiting is None:
                    continue  # whoever asked has given up
                if not isinstance(message, waiting.kind):
                    raise RemoteError(f"{type(message).__name__} where a {waiting.kind.__name__} is due")
                if waiting.answer is None:
                    waiting.answer = message
                    waiting.done.set()
            self._decoder.feed(b"")  # raises what was wrong behind the last good frame
        self._decoder.finish()
