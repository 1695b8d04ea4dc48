"""Ping: 32 bytes come back as they are. Source: libp2p ping specification."""

from __future__ import annotations

import os

import trio

from kwaainet_bridge.defaults import PING_IDLE_SECONDS
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.peer_id import PeerId

PING = "/ipfs/ping/1.0.0"

_SIZE = 32


async def answer_pings(stream: Stream) -> None:
    """Serve one stream until the peer closes it or pings no more."""
    with trio.move_on_after(PING_IDLE_SECONDS) as idle:
        while data := await stream.read(_SIZE):
            await stream.write(data)
            await trio.lowlevel.checkpoint()  # thousands may have come at once
            idle.deadline = trio.current_time() + PING_IDLE_SECONDS


async def ping(host: Host, peer: PeerId) -> float:
    """Return the seconds of one round trip to ``peer``.

    Raises what ``open_stream`` raises, and RemoteError if something else comes back. The caller brings
    the deadline.
    """
    stream = await host.open_stream(peer, PING)
    try:
        sent = os.urandom(_SIZE)
        start = trio.current_time()
        await stream.write(sent)
        received = b""
        while len(received) < _SIZE:
            data = await stream.read(_SIZE - len(received))
            if not data:
                raise RemoteError(f"ping: {peer} closed the stream")
            received += data
        if received != sent:
            raise RemoteError(f"ping: {peer} sent back other bytes")
        return trio.current_time() - start
    finally:
        await stream.reset()
