"""An inbox that records, and a peer that speaks /kwaai/tensor/2.0.0 by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
import trio
from kwaai_world import World, bare_server, peer

from kwaainet_bridge.errors import Refusal
from kwaainet_bridge.kwaai.server import KwaaiProtocols, KwaaiServer
from kwaainet_bridge.kwaai.tensor2 import TensorExchange, TensorInbox
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire import kwaai_tensor2 as wire
from kwaainet_bridge.wire.peer_id import PeerId


@dataclass
class Inbox:
    """Refuses names that begin with ``no``, late those with ``late``, fails with ``bug``."""

    taken: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    asked: list[wire.Offer] = field(default_factory=list)
    peers: list[PeerId] = field(default_factory=list)
    gate: trio.Event | None = None

    async def want(self, _sender: PeerId, offer: wire.Offer) -> None:
        self.asked.append(offer)
        if offer.name.startswith("no"):
            raise Refusal("not wanted")

    async def take(self, sender: PeerId, offer: wire.Offer, tensor: torch.Tensor) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if offer.name.startswith("late"):
            raise Refusal("not after all")
        if offer.name.startswith("bug"):
            raise KeyError("a bug")
        self.peers.append(sender)
        self.taken.append((offer.name, tensor))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.taken]


@dataclass
class Receiver:
    world: World
    server: KwaaiServer
    peer: PeerId
    inbox: Inbox

    @property
    def exchange(self) -> TensorExchange:
        return self.server._exchange

    async def check_nothing_held(self) -> None:
        """Once every stream is over; threads may still decode."""
        with trio.fail_after(30):
            while self.exchange.streams.used:  # noqa: ASYNC110 - pools have no event
                await trio.sleep(0.001)
        assert self.exchange.memory.used == 0
        assert self.exchange._under_way == 0
        assert self.exchange.streams.used == 0

    async def stream(self, number: int = 100) -> ByHand:
        return ByHand(await self.world.host(number).open_stream(self.peer, wire.PROTOCOL))


@asynccontextmanager
async def receiver(**options: object) -> AsyncIterator[Receiver]:
    inbox = Inbox()
    inner = TensorInbox(take=inbox.take, want=inbox.want, **options)
    async with bare_server(KwaaiProtocols(tensor2=inner)) as (world, server, address):
        yield Receiver(world, server, address, inbox)


class ByHand:
    """One end of a stream, frame by frame."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._bytes = b""

    async def write(self, *frames: bytes) -> None:
        await self.stream.write(b"".join(frames))

    async def frame(self) -> bytes:
        """The next frame, or nothing at the end."""
        with trio.fail_after(1000):
            while len(self._bytes) < 9 or len(self._bytes) < 9 + int.from_bytes(self._bytes[:8], "big"):
                data = await self.stream.read(1 << 20)
                if not data:
                    assert not self._bytes
                    return b""
                self._bytes += data
        length = 9 + int.from_bytes(self._bytes[:8], "big")
        frame, self._bytes = self._bytes[:length], self._bytes[length:]
        return frame

    async def message(self) -> wire.Message:
        [frame] = wire.frame_decoder().feed(await self.frame())
        return wire.read_message(frame)


@asynccontextmanager
async def pretended(handler) -> AsyncIterator[tuple[World, PeerId]]:
    """A peer whose streams ``handler(ByHand)`` serves."""
    async with bare_server(KwaaiProtocols()) as (world, _, address):

        async def serve(stream: Stream) -> None:
            await handler(ByHand(stream))

        world.network.hosts[address].serve(wire.PROTOCOL, serve)
        yield world, address


__all__ = ["ByHand", "Inbox", "Receiver", "peer", "pretended", "receiver"]
