"""How fast a connection is, measured by two hosts that both were told to.

The protocol is this project's own: ``[u64 bytes up][u64 bytes down]``, big-endian, and the bytes up; answered by the
number of bytes that came (u64) and the bytes down. Nobody serves it unless asked to, as any stranger could use it to
fill the link.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.peer_id import PeerId

PERF: Final = "/kwaainet-bridge/perf/1.0.0"

_SIZES: Final = struct.Struct(">QQ")
_COUNT: Final = struct.Struct(">Q")
_CHUNK: Final = bytes(256 * defaults.KIB)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Bytes per second in each direction."""

    up: float
    down: float


async def answer_measurement(stream: Stream) -> None:
    """Serve one measurement. Raises RemoteError if it asks for more than ``defaults.MAX_MEASURED_BYTES``."""
    up, down = _SIZES.unpack(await _read_exactly(stream, _SIZES.size))
    if max(up, down) > defaults.MAX_MEASURED_BYTES:
        raise RemoteError(f"perf: {max(up, down)} bytes (limit {defaults.MAX_MEASURED_BYTES})")
    await _discard(stream, up)
    await stream.write(_COUNT.pack(up))
    await _fill(stream, down)


async def measure(host: Host, peer: PeerId, size: int) -> Throughput:
    """Send ``size`` bytes to ``peer``, then receive as many.

    Raises what ``open_stream`` raises, and RemoteError if the peer counts other than was sent. The caller brings the
    deadline. Cancelled: the stream is reset.
    """
    stream = await host.open_stream(peer, PERF)
    try:
        began = trio.current_time()
        await stream.write(_SIZES.pack(size, size))
        await _fill(stream, size)
        (count,) = _COUNT.unpack(await _read_exactly(stream, _COUNT.size))
        if count != size:
            raise RemoteError(f"perf: {peer} says that {count} of {size} bytes came")
        sent = trio.current_time()
        await _discard(stream, size)
        return Throughput(size / (sent - began), size / (trio.current_time() - sent))
    finally:
        await stream.reset()


async def _fill(stream: Stream, size: int) -> None:
    for start in range(0, size, len(_CHUNK)):
        await stream.write(_CHUNK[: size - start])


async def _discard(stream: Stream, size: int) -> None:
    while size:
        size -= len(await _read_some(stream, min(size, len(_CHUNK))))


async def _read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await _read_some(stream, size - len(data))
    return data


async def _read_some(stream: Stream, max_bytes: int) -> bytes:
    data = await stream.read(max_bytes)
    if not data:
        raise RemoteError("perf: the peer closed the stream early")
    return data
