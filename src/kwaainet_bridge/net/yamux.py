"""Yamux: many streams over one secured connection.

One task reads and one writes. Frames that streams queue while a write is under way leave together in the next
one, of which each stream has a bounded share: so they take turns. SYN and ACK travel on the first frame that a
stream has to send anyway. A stream waits for its peer's window without a limit of its own; an overrun window, a
frame out of order or a peer that never reads ends the connection. Source: hashicorp/yamux spec.md; go-yamux
v4.0.1 in hivemind 1.1.12's p2pd.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, RemoteError, StreamReset
from kwaainet_bridge.net.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    NORMAL_TERMINATION,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW_UPDATE,
    FrameParser,
    Header,
    Payload,
    encode_header,
)
from kwaainet_bridge.net.yamux_stream import YamuxStream
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

_MAX_DISCARDED_FRAME = defaults.MAX_STREAM_WINDOW_BYTES
_MAX_STREAM_ID = (1 << 32) - 1


class Channel(Protocol):
    """The secured connection below: see :class:`kwaainet_bridge.net.channel.SecureChannel`."""

    async def receive_chunks(self) -> list[bytes]:
        """Return what has arrived, or ``[]`` at the end."""

    async def send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send ``pieces`` one after the other."""

    def abort(self) -> None:
        """Close at once."""


class YamuxConnection:
    """The streams of one connection to ``remote``.

    ``accept`` is called, without waiting, with each stream that the peer opens, and has to see to it that
    something is sent on it or that it is reset: go-yamux closes a connection that leaves a stream without an
    ACK for 75 s. :meth:`run` must be running for anything to happen; when it returns the connection is closed
    and every stream has ended.
    """

    def __init__(
        self,
        channel: Channel,
        remote: PeerId,
        *,
        initiator: bool,
        accept: Callable[[YamuxStream], None],
    ) -> None:
        self.remote = remote
        self.initiator = initiator
        self.opened_at = trio.current_time()
        self.closed = trio.Event()
        self.round_trip_seconds = 0.0
        """The shortest round trip measured so far; 0 before the first."""
        self.close_reason = ""
        self.agreed: set[str] = set()
        """Protocols that the peer has agreed to speak on a stream of ours."""

        self._channel = channel
        self._accept = accept
        self._streams: dict[int, YamuxStream] = {}
        self._inbound = 0
        self._next_id = 1 if initiator else 2
        self._unacknowledged = trio.Semaphore(
            defaults.MAX_UNACKNOWLEDGED_STREAMS, max_value=defaults.MAX_UNACKNOWLEDGED_STREAMS
        )
        self._window_budget = defaults.WINDOW_GROWTH_BYTES
        self._peer_leaves = False
        self._stopping = trio.Event()

        self._parser = FrameParser()
        self._receiving: YamuxStream | None = None  # whose payload is arriving
        self._receiving_flags = 0

        self._queue: list[bytes | memoryview] = []
        self._queued = 0
        self._queue_filled = trio.Event()
        self.write_round = 0
        """How many writes have taken the queue; streams count their shares of the next one by it."""
        self.write_share = defaults.STREAM_SHARE_BYTES
        """Bytes that each stream may put into the next write: less if many wait for it, so that it has room for all
        of them."""
        self._room = trio.Event()  # set, and replaced, whenever the queue goes out
        self._idle = trio.Event()  # set while nothing is queued or being written

        self._pings: dict[int, trio.Event] = {}
        self._next_ping = 0

    # --- life

    async def run(self) -> None:
        """Serve the connection until either side closes it or it breaks. Raises nothing but cancellation."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_queue, nursery.cancel_scope)
                nursery.start_soon(self._keep_alive)
                nursery.start_soon(self._wait_for_stop, nursery.cancel_scope)
                try:
                    await self._read_frames()
                except RemoteError as e:
                    log.info("closing the connection to %s: %s", self.remote, e)
                    self.stop(str(e), code=PROTOCOL_ERROR)
                except NetworkError as e:
                    self.stop(str(e))
                else:
                    self.stop("the peer closed the connection")
                    nursery.cancel_scope.cancel()
        finally:
            self._end()

    @property
    def usable(self) -> bool:
        """Whether new streams can be opened."""
        return not (self.ending or self._peer_leaves or self._next_id > _MAX_STREAM_ID)

    @property
    def ending(self) -> bool:
        """Whether it is closed, or being closed by this side."""
        return self.closed.is_set() or self._stopping.is_set()

    @property
    def open_streams(self) -> int:
        """Streams that are not over on both sides."""
        return len(self._streams)

    def stop(self, reason: str, *, code: int = NORMAL_TERMINATION) -> None:
        """Close: say so to the peer, send what is queued if that goes quickly, end all streams."""
        if not self._stopping.is_set():
            self.close_reason = reason
            self.send_frame(GO_AWAY, 0, 0, code)
            self._stopping.set()

    async def close(self) -> None:
        """:meth:`stop`, and wait until :meth:`run` has ended everything."""
        self.stop("closed here")
        await self.closed.wait()

    async def _wait_for_stop(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        with trio.move_on_after(defaults.LAST_WORDS_SECONDS):
            await self._idle.wait()
        scope.cancel()

    def _end(self) -> None:
        self.closed.set()
        self._channel.abort()
        for stream in list(self._streams.values()):
            stream.end()
        self._queue.clear()
        self._queued = 0
        self._room.set()
        for answered in self._pings.values():
            answered.set()

    async def _keep_alive(self) -> None:
        while True:
            with trio.move_on_after(defaults.KEEP_ALIVE_SECONDS) as waiting:
                await self.ping()
            if waiting.cancelled_caught:
                self.stop(f"no answer to a ping within {defaults.KEEP_ALIVE_SECONDS:g} s")
                return
            await trio.sleep(defaults.KEEP_ALIVE_SECONDS)
            oldest = trio.current_time() - defaults.CLOSED_STREAM_SECONDS
            for stream in list(self._streams.values()):
                if stream.closed_at is not None and stream.closed_at < oldest:
                    stream.reset_now()

    async def ping(self) -> float:
        """Return the seconds of one round trip. Waits as long as the peer is silent; StreamReset if it is
        gone."""
        value, self._next_ping = self._next_ping, (self._next_ping + 1) & 0xFFFFFFFF
        self._pings[value] = answered = trio.Event()
        start = trio.current_time()
        try:
            self.send_frame(PING, SYN, 0, value)
            await answered.wait()
        finally:
            del self._pings[value]
        if self.closed.is_set():
            raise StreamReset(f"the connection to {self.remote} ended")
        seconds = trio.current_time() - start
        self.round_trip_seconds = min(seconds, self.round_trip_seconds or math.inf)
        return seconds

    # --- streams

    async def open_stream(self) -> YamuxStream:
        """Open a stream; the peer hears of it with the first bytes on it. Waits while 256 others are not
        accepted yet. StreamReset if the connection is closed.

        Cancelled: no stream is opened.
        """
        try:
            self._unacknowledged.acquire_nowait()  # without giving way: what was queued just now leaves with this
        except trio.WouldBlock:
            await self._unacknowledged.acquire()
        if not self.usable:
            self._unacknowledged.release()
            reason = self.close_reason or (
                "the peer leaves" if self._peer_leaves else "no stream ids are left"
            )
            raise StreamReset(f"the connection to {self.remote} is closed: {reason}")
        stream = YamuxStream(self, self._next_id, outbound=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        return stream

    def forget(self, stream: YamuxStream) -> None:
        """Drop a stream that is over on both sides."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._window_budget += stream.window_growth
        if stream.outbound:
            self._acknowledge(stream)
        else:
            self._inbound -= 1

    def _acknowledge(self, stream: YamuxStream) -> None:
        if stream.outbound and not stream.acknowledged:
            stream.acknowledged = True
            self._unacknowledged.release()

    def reserve_window(self, growth: int) -> bool:
        """Take ``growth`` bytes of the connection's budget for a stream's window, until the stream is
        over."""
        if not 0 < growth <= self._window_budget:
            return False
        self._window_budget -= growth
        return True

    # --- outgoing

    @property
    def congested(self) -> bool:
        """Whether writers should wait for the socket."""
        return self._queued > defaults.SEND_QUEUE_BYTES

    async def wait_for_room(self) -> None:
        """Wait until what is queued goes out, or the connection ends."""
        if not self.closed.is_set():
            await self._room.wait()

    def send_frame(
        self, type_: int, flags: int, stream_id: int, length: int, payload: memoryview | None = None
    ) -> None:
        """Queue a frame; frames queued before the socket is free again leave in one write."""
        if self.closed.is_set() or self._stopping.is_set():
            return
        header = encode_header(type_, flags, stream_id, length)
        self._queue.append(header)
        self._queued += len(header)
        if payload is not None:
            self._queue.append(payload)
            self._queued += len(payload)
        elif self._queued > defaults.SEND_QUEUE_BYTES + defaults.UNREAD_CONTROL_BYTES:
            # Data waits for room, so only answers that the peer provokes and does not read come this far.
            self._queue.clear()
            self._queued = 0
            self.stop("the peer does not read")
            return
        if self._idle.is_set():
            self._idle = trio.Event()
        self._queue_filled.set()

    async def _write_queue(self, scope: trio.CancelScope) -> None:
        try:
            while True:
                if not self._queue:
                    self._idle.set()
                    self._queue_filled = trio.Event()
                    await self._queue_filled.wait()
                pieces, self._queue = self._queue, []
                self._queued = 0
                self.write_round += 1
                waiting = max(1, self._room.statistics().tasks_waiting)
                fair = max(defaults.SEND_QUEUE_BYTES // waiting, defaults.MIN_STREAM_SHARE_BYTES)
                self.write_share = min(fair, defaults.STREAM_SHARE_BYTES)
                self._room.set()
                self._room = trio.Event()
                await self._channel.send_pieces(pieces)
        except NetworkError as e:
            self.stop(str(e))
            scope.cancel()

    # --- incoming

    async def _read_frames(self) -> None:
        while chunks := await self._channel.receive_chunks():
            for chunk in chunks:
                for event in self._parser.feed(chunk):
                    if isinstance(event, Payload):
                        self._handle_payload(event)
                    else:
                        self._handle_header(event)

    def _handle_payload(self, payload: Payload) -> None:
        if self._receiving is None:
            return
        self._receiving.deliver(payload.data)
        if not payload.remaining:
            self._end_of_frame(self._receiving, self._receiving_flags)
            self._receiving = None

    def _handle_header(self, header: Header) -> None:
        if header.type == PING:
            self._handle_ping(header)
        elif header.type == GO_AWAY:
            self._peer_leaves = True
            if header.length != NORMAL_TERMINATION:
                raise RemoteError(f"yamux: the peer left with code {header.length}")
        else:
            self._handle_stream_frame(header)

    def _handle_ping(self, header: Header) -> None:
        if header.flags & SYN:
            self.send_frame(PING, ACK, 0, header.length)
        elif header.flags & ACK and (answered := self._pings.get(header.length)) is not None:
            answered.set()

    def _handle_stream_frame(self, header: Header) -> None:
        stream = self._inbound_stream(header.stream_id) if header.flags & SYN else None
        if stream is None:
            stream = self._streams.get(header.stream_id)
        if stream is None:
            # Frames in flight when this side reset or forgot the stream; refused streams.
            if header.type == DATA and header.length > _MAX_DISCARDED_FRAME:
                raise RemoteError(f"yamux: frame of {header.length} bytes for a stream that is not open")
            self._receiving = None
            return
        self._acknowledge(stream)
        if header.type == WINDOW_UPDATE:
            stream.add_send_credit(header.length)
            self._end_of_frame(stream, header.flags)
            return
        stream.expect(header.length)
        if header.length:
            self._receiving, self._receiving_flags = stream, header.flags
        else:
            self._end_of_frame(stream, header.flags)

    @staticmethod
    def _end_of_frame(stream: YamuxStream, flags: int) -> None:
        if flags & RST:
            stream.end()
        elif flags & FIN:
            stream.peer_finished()

    def _inbound_stream(self, stream_id: int) -> YamuxStream | None:
        if stream_id == 0 or stream_id % 2 == (1 if self.initiator else 0) or stream_id in self._streams:
            raise RemoteError(f"yamux: the peer cannot open stream {stream_id}")
        if self._inbound >= defaults.MAX_INBOUND_STREAMS or self._stopping.is_set():
            self.send_frame(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = YamuxStream(self, stream_id, outbound=False)
        self._streams[stream_id] = stream
        self._inbound += 1
        self._accept(stream)
        return stream
