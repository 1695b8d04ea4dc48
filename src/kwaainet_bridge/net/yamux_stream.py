"""One yamux stream: buffers, windows, and the ways it can end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import trio

from kwaainet_bridge.defaults import ABANDONED_WRITE_SECONDS, MAX_STREAM_WINDOW_BYTES
from kwaainet_bridge.errors import (
    NetworkError,
    PeerUnreachable,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    StreamReset,
)
from kwaainet_bridge.net.multistream import ENDED_EARLY, Proposal
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.yamux_frames import (
    ACK,
    DATA,
    FIN,
    INITIAL_WINDOW,
    MAX_WINDOW,
    RST,
    SYN,
    WINDOW_UPDATE,
)

if TYPE_CHECKING:
    from kwaainet_bridge.net.yamux import YamuxConnection

_MERGED_CHUNK = 1024
"""Chunks that together are no longer are kept as one."""

_ANSWER_BYTES = 4096
"""One read of the answer to a proposal, which may come in one packet with what follows it."""

_FAST_ROUND_TRIPS = 4
"""A window that empties within this many round trips is what limits the stream, so it is doubled (as
go-yamux)."""


class YamuxStream(Stream):
    """A stream of a :class:`YamuxConnection`; made by it only.

    ``protocol`` is empty until one was proposed or agreed on. The peer hears of an outbound stream with the
    first bytes on it.
    """

    def __init__(self, connection: YamuxConnection, stream_id: int, *, outbound: bool) -> None:
        self.remote = connection.remote
        self.protocol = ""
        self.connection = connection
        self.stream_id = stream_id
        self.outbound = outbound
        self.acknowledged = False  # the peer has answered our SYN
        self.closed_at: float | None = None  # when this side closed, in the trio clock's seconds

        self._announced = False
        self._opening = b""  # a proposal that leaves with the first write
        self._proposal: Proposal | None = None  # one that the peer has not answered yet
        self._unread = b""
        self._chunks: deque[bytes | memoryview] = deque()
        self._buffered = 0
        self._window = INITIAL_WINDOW
        self._credit = INITIAL_WINDOW  # what the peer may still send
        self._granted_at = -math.inf
        self._send_credit = INITIAL_WINDOW  # what we may still send
        self._round = 0  # of the connection's writes, the one that our latest data leaves with
        self._share = 0  # bytes of ours in it

        self._finished = False  # we sent FIN
        self._peer_finished = False
        self._was_reset = False  # by either side, or by the end of the connection
        self._readable = trio.Event()
        self._watcher: Callable[[], object] | None = None
        self._writable = trio.Event()
        self._ended = trio.Event()

    # --- agreeing on a protocol

    def propose(self, protocol: str) -> None:
        """Propose ``protocol`` with the first write, or before the first read or the close, whichever comes
        first.

        The first read checks the answer: it raises ProtocolNotSupported if the peer refuses, PeerUnreachable
        if it speaks no multistream, and the stream is then reset.
        """
        self.protocol = protocol
        self._proposal = Proposal(protocol)
        self._opening = self._proposal.opening

    async def agreed(self) -> None:
        """Wait for the peer's answer to :meth:`propose`; raises as the first read would.

        Cancelled: nothing is lost.
        """
        self._send_opening()
        while self._proposal is not None:
            data = await self._read(_ANSWER_BYTES)
            if not data:
                raise StreamReset(f"{self.remote}: {self.protocol}: {ENDED_EARLY}")
            self._take_answer(data)

    def _send_opening(self) -> None:
        # Outside the write's waits for credit and room: a new stream has credit, and this is the size of a header.
        if self._opening:
            opening, self._opening = self._opening, b""
            self._send_credit -= len(opening)
            self._send(DATA, 0, len(opening), memoryview(opening))

    def _take_answer(self, data: bytes) -> None:
        proposal, self._proposal = self._proposal, None
        assert proposal is not None
        try:
            rest = self._check_answer(proposal, data)
        except NetworkError:
            self.reset_now()
            raise
        if rest is None:
            self._proposal = proposal
        elif rest:
            self.unread(rest)

    def _check_answer(self, proposal: Proposal, data: bytes) -> bytes | None:
        try:
            return proposal.feed(data)
        except ProtocolNotSupported as e:
            raise ProtocolNotSupported(f"{self.remote} does not serve {self.protocol}") from e
        except RemoteError as e:
            raise PeerUnreachable(f"{self.remote}: {self.protocol}: {e}", hop="protocol") from e

    # --- the user's side

    async def receive_some(self, max_bytes: int) -> bytes:
        """:meth:`read`, under the name that protocol negotiation uses."""
        return await self.read(max_bytes)

    async def read(self, max_bytes: int) -> bytes:
        if self._proposal is not None:
            await self.agreed()
        return await self._read(max_bytes)

    async def read_pieces(self, max_bytes: int) -> list[bytes | memoryview]:
        if self._proposal is not None:
            await self.agreed()
        return await self._read_pieces(max_bytes)

    async def _read(self, max_bytes: int) -> bytes:
        pieces = await self._read_pieces(max_bytes)
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    async def _read_pieces(self, max_bytes: int) -> list[bytes | memoryview]:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self.closed_at is not None:
                raise StreamClosed("read after close")
            if self._unread:
                data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
                return [data]
            if self._chunks:
                return self._take(max_bytes)
            if self._peer_finished:
                return []
            if self._was_reset:
                raise StreamReset(f"{self.remote} or the connection to it reset the stream")
            self._readable = trio.Event()
            await self._readable.wait()

    def unread(self, data: bytes) -> None:
        """Put ``data`` back: the next read returns it first."""
        self._unread = data + self._unread

    def _take(self, max_bytes: int) -> list[bytes | memoryview]:
        if self._buffered <= max_bytes:
            pieces, taken = list(self._chunks), self._buffered
            self._chunks.clear()
        else:
            pieces, taken = [], 0
            while taken < max_bytes:
                chunk = self._chunks.popleft()
                if len(chunk) > max_bytes - taken:
                    view = memoryview(chunk)
                    self._chunks.appendleft(view[max_bytes - taken :])
                    chunk = view[: max_bytes - taken]
                pieces.append(chunk)
                taken += len(chunk)
        self._buffered -= taken
        self._grant()
        return pieces

    def _grant(self) -> None:
        """Let the peer send on once half of the window has been read."""
        grant = self._window - self._credit - self._buffered
        if grant < self._window // 2 or self._peer_finished or self._was_reset:
            return
        now = trio.current_time()
        if now - self._granted_at < _FAST_ROUND_TRIPS * self.connection.round_trip_seconds:
            larger = min(2 * self._window, MAX_STREAM_WINDOW_BYTES)
            if self.connection.reserve_window(larger - self._window):
                grant += larger - self._window
                self._window = larger
        self._granted_at = now
        self._credit += grant
        self._send(WINDOW_UPDATE, 0, grant)

    async def send_all(self, data: bytes) -> None:
        """:meth:`write`, under the name that protocol negotiation uses."""
        await self.write(data)

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._opening:
            data, self._opening = self._opening + data, b""
        # The queue holds on to what it is given: a caller may reuse a bytearray.
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        while True:
            if self._finished:
                raise StreamClosed("write after close")
            if self._was_reset:
                if self._proposal is not None and self._chunks:
                    # A peer that refuses resets at the payload. The answer stays where it is, for the reader.
                    self._check_answer(copy(self._proposal), b"".join(self._chunks))
                raise StreamReset(f"{self.remote} or the connection to it reset the stream")
            if not view:
                return
            if self._round != self.connection.write_round:
                self._round, self._share = self.connection.write_round, 0
            if self.connection.congested or self._share >= self.connection.write_share:
                await self.connection.wait_for_room()
            elif not self._send_credit:
                await self._wait_for_credit()
            else:
                size = min(len(view), self._send_credit, self.connection.write_share - self._share)
                self._send_credit -= size
                self._share += size
                self._send(DATA, 0, size, view[:size])
                view = view[size:]

    async def _wait_for_credit(self) -> None:
        # A slow reader may take as long as it likes. One that has closed its side has most likely
        # forgotten the stream (stock daemons close both directions at once) and will never grant anything.
        self._writable = trio.Event()
        with trio.move_on_after(ABANDONED_WRITE_SECONDS if self._peer_finished else math.inf) as waiting:
            await self._writable.wait()
        if waiting.cancelled_caught:
            await self.reset()
            raise StreamReset(f"{self.remote} closed the stream and reads no more")

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def watch(self, notify: Callable[[], object] | None) -> None:
        self._watcher = notify
        if self._unread or self._chunks or self._ended.is_set():
            self._wake_reader()

    def _wake_reader(self) -> None:
        self._readable.set()
        if self._watcher is not None:
            notify, self._watcher = self._watcher, None
            notify()

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """:meth:`close`, which waits for nothing."""
        self.finish()
        if self.closed_at is None:
            self.closed_at = trio.current_time()
            self._chunks.clear()
            self._buffered = 0
            self._readable.set()
        self._forget_if_over()

    def finish(self) -> None:
        """Send the end of our data and go on reading: a half-close, which stock daemons take for a close."""
        if not self._finished:
            self._finished = True
            if not self._was_reset:
                self._send_opening()
                self._send(WINDOW_UPDATE, FIN, 0)
            self._writable.set()
            self._forget_if_over()

    async def reset(self) -> None:
        self.reset_now()

    def reset_now(self) -> None:
        """:meth:`reset`, which waits for nothing."""
        over = self._was_reset or (self._finished and self._peer_finished)
        self.closed_at = trio.current_time() if self.closed_at is None else self.closed_at
        self._chunks.clear()
        self._buffered = 0
        if not over and (self._announced or not self.outbound):  # else the peer never hears of it
            self._send(WINDOW_UPDATE, RST, 0)
        self.end()

    # --- the connection's side

    @property
    def window_growth(self) -> int:
        """Bytes of the connection's budget that the window has taken."""
        return self._window - INITIAL_WINDOW

    def announce(self) -> None:
        """Send our SYN or ACK now, without data."""
        self._send(WINDOW_UPDATE, 0, 0)

    def expect(self, length: int) -> None:
        """Account for a data frame before its payload arrives. RemoteError if it overruns the window."""
        if length > self._credit:
            raise RemoteError(
                f"yamux: {length} bytes on stream {self.stream_id}, whose window has {self._credit} left"
            )
        self._credit -= length
        if self.closed_at is not None and not self._credit:
            self.reset_now()  # nobody reads any more, and a peer that still writes would wait for ever

    def deliver(self, data: bytes | memoryview) -> None:
        """Keep payload for the reader."""
        if self.closed_at is None and not self._was_reset:
            if self._chunks and len(self._chunks[-1]) + len(data) <= _MERGED_CHUNK:
                self._chunks[-1] = b"".join((self._chunks[-1], data))  # a chunk of two bytes would take forty
            else:
                self._chunks.append(data)
            self._buffered += len(data)
            self._wake_reader()

    def add_send_credit(self, increment: int) -> None:
        """Take the peer's window update."""
        if self._send_credit + increment > MAX_WINDOW:
            raise RemoteError(f"yamux: window of stream {self.stream_id} exceeds 32 bits")
        self._send_credit += increment
        self._writable.set()

    def peer_finished(self) -> None:
        """Take the peer's FIN: reads end after what has arrived."""
        self._peer_finished = True
        self._ended.set()
        self._wake_reader()
        self._writable.set()
        self._forget_if_over()

    def end(self) -> None:
        """Take the peer's RST, or the connection's end. What has arrived can still be read.

        Stock daemons end about 0.3 % of finished streams with RST after their last byte (hivemind
        1.1.12's p2pd: its copy loops reset what the other has closed), so dropping the data would
        truncate good answers.
        """
        if not (self._finished and self._peer_finished):
            self._was_reset = True
        self._opening = b""
        self._ended.set()
        self._wake_reader()
        self._writable.set()
        self.connection.forget(self)

    def _forget_if_over(self) -> None:
        if self._finished and self._peer_finished:
            self.connection.forget(self)

    def _send(self, type_: int, flags: int, length: int, payload: memoryview | None = None) -> None:
        if not self._announced:
            self._announced = True
            flags |= SYN if self.outbound else ACK
        self.connection.send_frame(type_, flags, self.stream_id, length, payload)
