"""``/kwaai/tensor/2.0.0``, the receiving side. docs/protocols/kwaai-tensor.md is the protocol's specification.

A stream is served by one task, so whatever takes its time here (a callback, decoding, memory that others have)
stops the reading, and the stream's window stops the sender.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, Refusal, RemoteError, StreamClosed
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.kwaai_tensor2 import (
    Ack,
    Code,
    End,
    IncomingTensor,
    Message,
    Offer,
    Part,
    encode_ack,
    encode_end,
    frame_decoder,
    read_message,
)
from kwaainet_bridge.wire.kwaai_tensor2_values import UnsupportedValues, check_values, memory_needed
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

READ_BYTES: Final = 256 * defaults.KIB
_AT_ONCE_BYTES: Final = defaults.MIB
"""Tensors up to this are decoded on the loop: a worker thread costs as much."""

Want: TypeAlias = Callable[[PeerId, Offer], Awaitable[None]]
"""Decides about a tensor of which name, shape, dtype, metadata and bytes are known. Raises Refusal not to take it."""

Take: TypeAlias = Callable[[PeerId, Offer, torch.Tensor], Awaitable[None]]
"""Takes a tensor: on the CPU, contiguous, its own. The sender learns of it once this has returned.

Raises Refusal if it is not wanted after all. The tensor counts as memory of the peer's until this returns.
"""


async def _anything(_peer: PeerId, _offer: Offer) -> None:
    await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInbox:
    """Who takes tensors. What a callback raises beside Refusal is logged, and the sender learns that it FAILED."""

    take: Take
    want: Want = _anything
    max_tensor_bytes: int = defaults.KWAAI_TENSOR2_PEER_BYTES
    """Memory for one tensor, encoded and decoded; never more than ``defaults.KWAAI_TENSOR2_PEER_BYTES``."""


class TensorExchange:
    """Serves streams, a bounded number and with bounded memory, of all peers and of each."""

    def __init__(self, inbox: TensorInbox) -> None:
        self.inbox = inbox
        self.streams = FairPool(
            defaults.KWAAI_TENSOR2_STREAMS, per_peer=defaults.KWAAI_TENSOR2_STREAMS_PER_PEER
        )
        self.memory = FairPool(
            defaults.KWAAI_TENSOR2_BYTES,
            per_peer=min(defaults.KWAAI_TENSOR2_PEER_BYTES, defaults.KWAAI_TENSOR2_BYTES),
        )
        self.stopping = False
        self._under_way = 0
        self._changed = trio.Event()

    def begin(self) -> None:
        """A tensor was accepted."""
        self._under_way += 1

    def done(self) -> None:
        """It was taken, or will not be."""
        self._under_way -= 1
        self._changed.set()
        self._changed = trio.Event()

    async def stop(self) -> None:
        """Accept nothing new, and return once what was accepted is over."""
        self.stopping = True
        while self._under_way:
            await self._changed.wait()

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until its peer ends it, breaks the protocol or is silent for too long."""
        peer = stream.remote
        if not self.streams.reserve(peer, 1):
            await self._end(stream, End(Code.BUSY, "too many streams: use one for several tensors"))
            return
        session = _Session(self, stream)
        try:
            await self._serve(session, stream)
        finally:
            session.release()
            self.streams.release(peer, 1)

    async def _serve(self, session: _Session, stream: Stream) -> None:
        try:
            await session.run()
        except _Ended as e:
            await self._end(stream, e.end)
        except RemoteError as e:
            await self._end(stream, End(Code.PROTOCOL, str(e)))
        except NetworkError as e:
            log.debug("tensors of %s: %s", stream.remote, e)
            await stream.reset()

    async def _end(self, stream: Stream, end: End) -> None:
        log.debug("tensors of %s: ended: %s, %.200s", stream.remote, Code(end.code).name, end.text)
        with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS) as limit:
            try:
                await stream.write(encode_end(end))
            except NetworkError:
                await stream.reset()
                return
        await (stream.reset() if limit.cancelled_caught else stream.close())


class _Ended(Exception):
    """This side ends the stream."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.end = End(code, text)


class _Answered(Exception):
    """What an offer is answered with instead of a receipt."""

    def __init__(self, code: Code, text: str, count: int = 0) -> None:
        super().__init__(text)
        self.code, self.text, self.count = code, text, count


@dataclass(slots=True)
class _Accepted:
    tensor: IncomingTensor
    reserved: int
    deadline: float = math.inf


class _Session:
    """One stream: offers that wait for their answer, and accepted tensors of which the first is coming."""

    def __init__(self, exchange: TensorExchange, stream: Stream) -> None:
        self._exchange = exchange
        self._stream = stream
        self._peer = stream.remote
        self._offers = 0
        self._waiting: deque[Offer] = deque()
        self._accepted: deque[_Accepted] = deque()

    def release(self) -> None:
        """Give back what tensors hold that will not come."""
        while self._accepted:
            self._give_back(self._accepted.popleft())

    def _give_back(self, accepted: _Accepted) -> None:
        if accepted.reserved:
            self._exchange.memory.release(self._peer, accepted.reserved)
        self._exchange.done()

    async def run(self) -> None:
        decoder = frame_decoder()
        while True:
            decoder.feed(b"")  # raises what was wrong behind the last good frame
            data = await self._read()
            if not data:
                decoder.finish()
                self._over()
                return
            for frame in decoder.feed(data):
                if not await self._handle(read_message(frame)):
                    return

    async def _read(self) -> bytes:
        deadline = trio.current_time() + defaults.KWAAI_TENSOR2_IDLE_SECONDS
        if self._accepted:
            deadline = self._accepted[0].deadline
        with trio.move_on_at(deadline) as limit:
            data = await self._stream.read(READ_BYTES)
        if not limit.cancelled_caught:
            return data
        if not self._accepted:
            raise _Ended(Code.OK, "nothing was offered for a while")
        offer = self._accepted[0].tensor.offer
        raise _Ended(Code.TIMEOUT, f"tensor {offer.number} of {offer.bytes} bytes came too slowly")

    async def _handle(self, message: Message) -> bool:
        """Whether the stream goes on."""
        if isinstance(message, Offer):
            self._offers += 1
            if message.number != self._offers:
                raise RemoteError(f"offer {message.number} where {self._offers} is due")
            if len(self._waiting) + len(self._accepted) >= defaults.KWAAI_TENSOR2_OFFERS:
                raise RemoteError(f"more than {defaults.KWAAI_TENSOR2_OFFERS} offers that are not done with")
            self._waiting.append(message)
            await self._answer_waiting()
        elif isinstance(message, Part):
            await self._take_part(message)
        elif isinstance(message, End):
            if message.code != Code.OK:
                log.debug("tensors of %s: ended by it: %d, %.200s", self._peer, message.code, message.text)
            self._over()
            return False
        else:
            raise RemoteError("an ack from the side that offers")
        return True

    def _over(self) -> None:
        if self._accepted:
            offer = self._accepted[0].tensor.offer
            raise StreamClosed(f"{self._peer} left within tensor {offer.number} of {offer.bytes} bytes")

    async def _answer_waiting(self) -> None:
        """Answer offers in their order, until one has to wait for the memory of those before it."""
        while self._waiting:
            offer = self._waiting[0]
            try:
                accepted = await self._accept(offer)
            except _Answered as e:
                await self._send(Ack(offer.number, e.code, e.text, e.count))
            else:
                if accepted is None:
                    return
                if offer.whole:
                    await self._finish(accepted)
                else:
                    self._accepted.append(accepted)
                    self._begin_first()
                    await self._send(Ack(offer.number, Code.ACCEPTED))
            self._waiting.popleft()

    async def _accept(self, offer: Offer) -> _Accepted | None:
        """None if it has to wait. Raises _Answered if it is not to come."""
        inbox, memory = self._exchange.inbox, self._exchange.memory
        try:
            needed = memory_needed(
                *check_values(offer.dtype, offer.shape, offer.compression, offer.bytes), offer.bytes
            )
        except UnsupportedValues as e:
            raise _Answered(Code.UNSUPPORTED, str(e)) from e
        except RemoteError as e:
            raise _Answered(Code.INVALID, str(e)) from e
        if self._exchange.stopping:
            raise _Answered(Code.STOPPING, "the node stops")
        largest = min(inbox.max_tensor_bytes, memory.per_peer)
        if needed > largest:
            raise _Answered(Code.TOO_LARGE, f"it takes {needed} bytes of memory, {largest} at most", largest)
        if needed and not memory.reserve(self._peer, needed):
            if self._accepted:
                return None
            raise _Answered(Code.BUSY, "no memory is free for it now")
        self._exchange.begin()
        try:
            await _call(inbox.want(self._peer, offer), offer, self._peer)
            return _Accepted(IncomingTensor(offer), needed)
        except BaseException:
            if needed:
                memory.release(self._peer, needed)
            self._exchange.done()
            raise

    def _begin_first(self) -> None:
        """The time of the first accepted tensor runs from when it is the first."""
        if self._accepted and self._accepted[0].deadline == math.inf:
            size = self._accepted[0].tensor.offer.bytes
            seconds = defaults.KWAAI_TENSOR2_SECONDS + size / defaults.KWAAI_TENSOR2_BYTES_PER_SECOND
            self._accepted[0].deadline = trio.current_time() + seconds

    async def _take_part(self, part: Part) -> None:
        if not self._accepted:
            raise RemoteError(f"part of tensor {part.number}: no tensor is under way")
        first = self._accepted[0]
        first.tensor.add(part)
        if first.tensor.complete:
            self._accepted.popleft()
            await self._finish(first)
            self._begin_first()
            await self._answer_waiting()

    async def _finish(self, accepted: _Accepted) -> None:
        """Decode a tensor that is complete, hand it over and say so."""
        offer = accepted.tensor.offer
        try:
            await self._hand_over(accepted)
        except _Answered as e:
            ack = Ack(offer.number, e.code, e.text)
        else:
            ack = Ack(offer.number, Code.RECEIVED, bytes=offer.bytes)
        finally:
            self._give_back(accepted)
        await self._send(ack)

    async def _hand_over(self, accepted: _Accepted) -> None:
        offer = accepted.tensor.offer
        try:
            if accepted.reserved <= _AT_ONCE_BYTES:
                tensor = accepted.tensor.tensor()
            else:
                tensor = await trio.to_thread.run_sync(accepted.tensor.tensor)
        except RemoteError as e:
            raise _Answered(Code.INVALID, str(e)) from e
        await _call(self._exchange.inbox.take(self._peer, offer, tensor), offer, self._peer)

    async def _send(self, ack: Ack) -> None:
        with trio.move_on_after(defaults.SEND_SECONDS) as limit:
            await self._stream.write(encode_ack(ack))
        if limit.cancelled_caught:
            raise StreamClosed(f"{self._peer} reads nothing of its answers")


async def _call(callback: Awaitable[None], offer: Offer, peer: PeerId) -> None:
    """Raises _Answered for what a callback raises."""
    try:
        await callback
    except Refusal as e:
        raise _Answered(Code.REFUSED, e.text) from e
    except Exception as e:
        log.exception("tensor %.100r of %s could not be taken", offer.name, peer)
        raise _Answered(Code.FAILED, "an error of the receiver's") from e
