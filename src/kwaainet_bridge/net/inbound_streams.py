"""The streams that peers open: how many are served at one time, and how much memory they are promised."""

from __future__ import annotations

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.counting import Refusals
from kwaainet_bridge.net.connection import Connection
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.host import StreamHandler
from kwaainet_bridge.net.limits import Limits
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.net.yamux_stream import YamuxStream


class InboundStreams:
    """Counts streams from the moment a peer opens them until their handler has ended.

    Not until the stream has: a peer that resets a stream makes room on its connection at once, while what the
    stream started here may take a while to end.
    """

    def __init__(self, limits: Limits, refused: Refusals | None = None) -> None:
        self._refused = refused or Refusals()
        self._places = FairPool(limits.streams, per_peer=limits.streams_per_peer)

    @property
    def limit(self) -> int:
        """How many there may be at one time."""
        return self._places.limit

    def set_limits(self, limits: Limits) -> None:
        """Hold to these from now on; streams that are open stay."""
        self._places.limit, self._places.per_peer = limits.streams, limits.streams_per_peer

    @property
    def running(self) -> int:
        """Handlers that run, or wait for a protocol."""
        return self._places.used

    def begin(self, connection: Connection, stream: YamuxStream) -> bool:
        """Count a new stream of ``connection``, until :meth:`end`; False to refuse it."""
        if self._places.reserve(stream.remote, 1):
            if connection.promise_window(stream):
                return True
            self._places.release(stream.remote, 1)
        self._refused.note("streams", str(stream.remote), "too many streams at one time", trio.current_time())
        return False

    def end(self, connection: Connection, stream: YamuxStream) -> None:
        """Note that the handler has ended."""
        connection.withdraw_window(stream)
        self._places.release(stream.remote, 1)


def limited(handler: StreamHandler, refused: Refusals) -> StreamHandler:
    """``handler``, which resets, and counts as ``refused``, streams beyond the limits of one protocol."""
    pool = FairPool(defaults.MAX_STREAMS_PER_PROTOCOL, per_peer=defaults.MAX_STREAMS_PER_PROTOCOL_AND_PEER)

    async def serve(stream: Stream) -> None:
        if not pool.reserve(stream.remote, 1):
            reason = f"too many streams of {stream.protocol} at one time"
            refused.note("protocol", str(stream.remote), reason, trio.current_time())
            await stream.reset()
            return
        try:
            await handler(stream)
        finally:
            pool.release(stream.remote, 1)

    return serve
