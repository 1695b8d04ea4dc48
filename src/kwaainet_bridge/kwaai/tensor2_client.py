"""``/kwaai/tensor/2.0.0``, the sending side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.adaptive import TensorInfo
from kwaainet_bridge.compression.codec import Buffer
from kwaainet_bridge.compression.encoded import NAMES
from kwaainet_bridge.errors import (
    CompressionError,
    DeadlineExceeded,
    NetworkError,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    TensorRefused,
)
from kwaainet_bridge.kwaai.tensor2 import READ_BYTES
from kwaainet_bridge.kwaai.tensor2_errors import end_error, not_supported, over, refusal
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.wire.fields import total
from kwaainet_bridge.wire.kwaai_tensor2 import (
    PROTOCOL,
    Ack,
    Code,
    End,
    Message,
    Offer,
    encode_end,
    encode_offer,
    encode_part,
    frame_decoder,
    read_message,
    slices,
)
from kwaainet_bridge.wire.kwaai_tensor2_values import TOP_K, Compression, compression_of, encode_values
from kwaainet_bridge.wire.peer_id import PeerId

Chosen: TypeAlias = int | str | Callable[[TensorInfo], int]
"""A Compression, its name, or what chooses one for each tensor, as in ``compression.adaptive``; keys are names."""

_AT_ONCE_BYTES: Final = 64 * defaults.KIB
"""Tensors up to this are encoded on the loop: a worker thread costs as much."""


async def send_tensors(
    host: Host,
    peer: PeerId,
    tensors: Mapping[str, torch.Tensor],
    *,
    compression: Chosen = Compression.NONE,
    top_k: float = TOP_K,
    metadata: Mapping[str, str] | None = None,
    timeout: float,
) -> None:
    """Send tensors over a stream of their own; return once the peer has taken all of them.

    ``metadata`` goes with each. Raises TensorRefused for the first that the peer did not take, in the order of
    ``tensors``, once it has answered all; and what ``open_tensor_stream`` and ``TensorSender.send`` raise.
    DeadlineExceeded after ``timeout`` seconds for all together. Cancelled: the stream is reset.
    """
    refused: dict[str, TensorRefused] = {}
    failures: list[Exception] = []

    async def finish(sender: TensorSender, offered: Offered, scope: trio.CancelScope) -> None:
        try:
            await sender.finish(offered)
        except TensorRefused as e:
            refused[offered.name] = e
        except Exception as e:  # kept one by one: out of a nursery they would come in a group
            failures.append(e)
            scope.cancel()

    with trio.move_on_after(timeout) as limit:
        async with open_tensor_stream(host, peer, open_timeout=timeout) as sender:
            async with trio.open_nursery() as nursery:
                try:
                    for name, tensor in tensors.items():
                        offered = await sender.offer(
                            name, tensor, compression=compression, top_k=top_k, metadata=metadata
                        )
                        nursery.start_soon(finish, sender, offered, nursery.cancel_scope)
                except Exception as e:
                    failures.append(e)
                    nursery.cancel_scope.cancel()
            if failures:
                raise failures[0]
    if limit.cancelled_caught:
        raise DeadlineExceeded(f"{PROTOCOL} at {peer}: not all tensors were taken within {timeout:g} s")
    for name in tensors:
        if name in refused:
            raise refused[name]


@asynccontextmanager
async def open_tensor_stream(host: Host, peer: PeerId, *, open_timeout: float) -> AsyncIterator[TensorSender]:
    """A stream for tensors to ``peer`` for the length of the block.

    Raises what Host.open_stream raises, DeadlineExceeded after ``open_timeout`` seconds. A peer without this version
    of the protocol raises ProtocolNotSupported, here or from the first ``send``.
    """
    try:
        with trio.move_on_after(open_timeout) as limit:
            stream = await host.open_stream(peer, PROTOCOL)
    except ProtocolNotSupported as e:
        raise not_supported(peer) from e
    if limit.cancelled_caught:
        raise DeadlineExceeded(f"{PROTOCOL} at {peer}: no stream within {open_timeout:g} s")
    sender = TensorSender(stream)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            try:
                yield sender
            except Exception as e:  # out of a nursery it would come in a group
                failure = e
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await sender.aclose()
    if failure is not None:
        raise failure


@dataclass(slots=True, eq=False)
class Offered:
    """A tensor that was offered; ``TensorSender.finish`` sends the rest of it."""

    name: str
    number: int
    bytes: int
    values: list[Buffer]
    whole: bool
    answer: Ack | None = None
    """What the peer said last."""
    answered: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    turn: trio.Event = field(default_factory=trio.Event)
    """All values of those before it were sent or refused."""
    sent: bool = False

    @property
    def settled(self) -> bool:
        return self.answer is not None and self.answer.code != Code.ACCEPTED


class TensorSender:
    """Sends tensors, some at a time. Any number of tasks may do so. Made by :func:`open_tensor_stream`."""

    def __init__(self, stream: Stream) -> None:
        self.peer = stream.remote
        self._stream = stream
        self._places = trio.Semaphore(defaults.KWAAI_TENSOR2_IN_FLIGHT)
        self._writing = trio.Lock()
        self._number = 0
        self._under_way: dict[int, Offered] = {}
        self._order: deque[Offered] = deque()  # those whose values are to be sent, one after the other
        self._failure: Exception | None = None
        self._over = trio.Event()

    async def send(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        compression: Chosen = Compression.NONE,
        top_k: float = TOP_K,
        metadata: Mapping[str, str] | None = None,
        timeout: float = math.inf,
    ) -> None:
        """Send ``tensor``, of any shape and device; return once the peer has taken it.

        With NONE the tensor's own memory is sent: leave it alone until then. ``top_k`` is the fraction of values
        that KWAAI_TOP_K keeps. Raises TensorRefused, after which the stream goes on; CompressionError and ValueError
        for what cannot be sent, likewise; ProtocolNotSupported, StreamClosed, RemoteError, DeadlineExceeded once
        the stream is over. Cancelled, or after ``timeout`` seconds: the stream is over.
        """
        with trio.move_on_after(timeout) as limit:
            await self.finish(
                await self.offer(name, tensor, compression=compression, top_k=top_k, metadata=metadata)
            )
        if limit.cancelled_caught:
            raise DeadlineExceeded(
                f"{PROTOCOL} at {self.peer}: {name:.100} was not taken within {timeout:g} s"
            )

    async def offer(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        compression: Chosen = Compression.NONE,
        top_k: float = TOP_K,
        metadata: Mapping[str, str] | None = None,
    ) -> Offered:
        """The first half of ``send``, for whoever wants to offer several in a certain order. Call ``finish`` then.

        Waits while ``defaults.KWAAI_TENSOR2_IN_FLIGHT`` are under way.
        """
        await self._places.acquire()
        try:
            self._check()
            chosen = _choose(compression, name, tensor)
            values = await _encode(tensor, chosen, top_k)
            async with self._writing:
                self._check()
                return await self._offer(name, tensor, chosen, values, metadata or {})
        except BaseException:
            self._places.release()
            raise

    async def _offer(
        self,
        name: str,
        tensor: torch.Tensor,
        compression: Compression,
        values: list[Buffer],
        metadata: Mapping[str, str],
    ) -> Offered:
        count = total(values)
        inline = count <= defaults.MAX_TENSOR2_INLINE_BYTES
        frame = encode_offer(
            Offer(
                number=self._number + 1,
                name=name,
                dtype=NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
                compression=compression,
                bytes=count,
                metadata=metadata,
                data=b"".join(values) if inline else b"",
            )
        )
        self._number += 1
        offered = Offered(name, self._number, count, [] if inline else values, whole=inline, sent=inline)
        self._under_way[offered.number] = offered
        if not inline:
            self._order.append(offered)
            self._order[0].turn.set()
        await self._write(frame)
        return offered

    async def finish(self, offered: Offered) -> None:
        """The second half of ``send``."""
        try:
            await offered.answered.wait()
            self._check(offered)
            if not offered.whole:
                if not offered.settled:
                    await self._send_values(offered)
                self._settle(offered)
            await offered.done.wait()
            self._check(offered)
        except BaseException as e:
            await self._give_up(e)
            raise
        finally:
            self._under_way.pop(offered.number, None)
            self._places.release()
        assert offered.answer is not None
        if offered.answer.code != Code.RECEIVED:
            raise refusal(self.peer, offered.name, offered.answer)

    async def _send_values(self, offered: Offered) -> None:
        await offered.turn.wait()
        offset = 0
        for piece in slices(offered.values, defaults.KWAAI_TENSOR2_PART_BYTES):
            async with self._writing:
                self._check()
                count = total(piece)
                # before it is written: the receipt may be here before the write returns
                offered.sent = offset + count == offered.bytes
                await self._write(encode_part(offered.number, offset, piece))
            offset += count
        offered.values = []

    def _settle(self, offered: Offered) -> None:
        """Its values were sent, or are not wanted."""
        self._order.remove(offered)
        if self._order:
            self._order[0].turn.set()

    async def _write(self, frame: bytes) -> None:
        try:
            await self._stream.write(frame)
        except NetworkError as e:
            # what the peer said before it ended the stream tells more
            with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS):
                await self._over.wait()
            await self._give_up(e)
            self._check()
            raise
        except BaseException as e:
            await self._give_up(e)
            raise

    def _check(self, offered: Offered | None = None) -> None:
        """Raise what ended the stream, unless ``offered`` was answered before."""
        if self._failure is not None and not (offered is not None and offered.settled):
            raise over(self._failure) from self._failure

    async def _give_up(self, error: BaseException) -> None:
        if self._failure is None:
            text = str(error) if isinstance(error, Exception) else "the sending of a tensor was cancelled"
            self._failure = StreamClosed(f"{PROTOCOL} at {self.peer}: {text}")
        with trio.CancelScope(shield=True):
            await self._stream.reset()
        self._wake()

    def _wake(self) -> None:
        self._over.set()
        for offered in self._under_way.values():
            offered.answered.set()
            offered.done.set()
            offered.turn.set()

    async def run(self) -> None:
        """Read what the peer says until the stream is over; then whoever waits for an answer gets the reason."""
        failure: Exception | None = None
        try:
            failure = await self._read()
        except ProtocolNotSupported:
            failure = not_supported(self.peer)
        except (NetworkError, RemoteError) as e:
            failure = e
        if self._failure is None:
            self._failure = failure
        await self._stream.reset()  # a write may wait for a window that nobody opens any more
        self._wake()

    async def _read(self) -> Exception:
        decoder = frame_decoder()
        while data := await self._stream.read(READ_BYTES):
            for frame in decoder.feed(data):
                message = read_message(frame)
                if isinstance(message, End):
                    return end_error(self.peer, message)
                self._take_answer(message)
            decoder.feed(b"")  # raises what was wrong behind the last good frame
        decoder.finish()
        return StreamClosed(f"{PROTOCOL} at {self.peer}: the peer closed the stream")

    def _take_answer(self, message: Message) -> None:
        if not isinstance(message, Ack):
            raise RemoteError(
                f"{PROTOCOL} at {self.peer}: {type(message).__name__} from the side that receives"
            )
        offered = self._under_way.get(message.number)
        if offered is None or offered.done.is_set():
            raise RemoteError(
                f"{PROTOCOL} at {self.peer}: an ack of tensor {message.number}, which is not under way"
            )
        accepted = offered.answer is not None
        fits = {
            Code.OK: False,
            Code.ACCEPTED: not accepted and not offered.whole,
            Code.RECEIVED: offered.sent and message.bytes == offered.bytes,
        }.get(message.code, offered.sent or not accepted)  # type: ignore[call-overload]
        if not fits:
            raise RemoteError(
                f"{PROTOCOL} at {self.peer}: ack {message.code} of {message.bytes} bytes is out of turn "
                f"for tensor {offered.number} of {offered.bytes}"
            )
        offered.answer = message
        offered.answered.set()
        if message.code != Code.ACCEPTED:
            offered.done.set()

    async def aclose(self) -> None:
        """Close the stream, or reset it if anything is half done."""
        if self._failure is None and not self._under_way:
            with trio.move_on_after(defaults.CLOSE_GRACE_SECONDS) as limit:
                try:
                    await self._stream.write(encode_end(End()))
                except NetworkError:
                    limit.cancel()
            if not limit.cancelled_caught:
                await self._stream.close()
                return
        await self._stream.reset()


def _choose(compression: Chosen, name: str, tensor: torch.Tensor) -> Compression:
    if callable(compression):
        compression = compression(TensorInfo(tensor.numel(), key=name))
    if tensor.dtype not in NAMES:
        raise CompressionError(f"{tensor.dtype} tensors do not travel")
    return compression_of(compression)


async def _encode(tensor: torch.Tensor, compression: Compression, top_k: float) -> list[Buffer]:
    if tensor.nbytes <= _AT_ONCE_BYTES:
        return encode_values(tensor, compression, top_k=top_k)
    return await trio.to_thread.run_sync(lambda: encode_values(tensor, compression, top_k=top_k))
