"""The streams that peers open: how many are served at one time, and how much memory they are promised."""

from __future__ import annotations

from collections.abc import Callable

from kwaainet_bridge import defaults
from kwaainet_bridge.net.connections import Connection
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

    def __init__(self, limits: Limits) -> None:
        self._all = FairPool(limits.streams, per_peer=limits.streams_per_peer)

    @property
    def running(self) -> int:
        """Handlers that run, or wait for a protocol."""
        return self._all.used

    def begin(self, connection: Connection, stream: YamuxStream) -> Callable[[], None] | None:
        """Count a new stream; return what must be called when its handler has ended, or None to refuse it."""
        places = self._all.share(stream.remote)
        if not places.reserve(1):
            return None
        if not connection.promise_window(stream):
            places.release(1)
            return None

        def end() -> None:
            connection.withdraw_window(stream)
            places.release(1)

        return end


def limited(handler: StreamHandler) -> StreamHandler:
    """``handler``, which resets streams beyond the limits of one protocol."""
    pool = FairPool(defaults.MAX_STREAMS_PER_PROTOCOL, per_peer=defaults.MAX_STREAMS_PER_PROTOCOL_AND_PEER)

    async def serve(stream: Stream) -> None:
        places = pool.share(stream.remote)
        if not places.reserve(1):
            await stream.reset()
            return
        try:
            await handler(stream)
        finally:
            places.release(1)

    return serve
