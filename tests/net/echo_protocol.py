"""The protocol that most tests of this room speak."""

from __future__ import annotations

from kwaainet_bridge.net import Stream


async def echo(stream: Stream) -> None:
    while data := await stream.read(1 << 20):
        await stream.write(data)
