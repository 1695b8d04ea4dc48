"""``/kwaai/tensor/1.0.0``: one tensor in 8 bits per stream, and its receipt.

Source: KwaaiNet v0.6.2, its example of two machines; no node of it serves this protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.kwaai import BLOCK, quantise_blocks
from kwaainet_bridge.errors import DeadlineExceeded, NetworkError, RemoteError, StreamClosed
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.host import Host
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.budget import ReceiveBudget
from kwaainet_bridge.wire.kwaai_tensor import (
    PROTOCOL,
    RECEIVED,
    KwaaiTensorDecoder,
    KwaaiTensorMessage,
    TensorMessageType,
    encode_frame,
    receipt,
    tensor_message,
)
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)

TensorTaker: TypeAlias = Callable[[PeerId, KwaaiTensorMessage], Awaitable[None]]
"""Takes a tensor that was checked: ``compression.kwaai.dequantise_blocks`` makes values of it.

The receipt is sent once it has returned. A NetworkError or RemoteError that it raises resets the sender's stream.
"""

_READ_BYTES: Final = 256 * defaults.KIB
_RECEIPT_BYTES: Final = 2 * defaults.MAX_TENSOR_TEXT_BYTES + defaults.KIB


class TensorReceiver:
    """Serves streams with one tensor each, a bounded number at a time, of all peers and of each."""

    def __init__(self, take: TensorTaker) -> None:
        self._take = take
        self._streams = FairPool(
            defaults.KWAAI_TENSOR_STREAMS, per_peer=defaults.KWAAI_TENSOR_STREAMS_PER_PEER
        )
        self._budget = ReceiveBudget(
            per_peer=defaults.KWAAI_TENSOR_PEER_BYTES, in_all=defaults.KWAAI_TENSOR_BYTES
        )

    async def serve(self, stream: Stream) -> None:
        """Receive one tensor. A stream beyond the limits, or that breaks the protocol, is reset."""
        peer = stream.remote
        if not self._streams.reserve(peer, 1):
            log.debug("%s: too many tensors at a time", peer)
            await stream.reset()
            return
        try:
            await self._receive(stream)
        except (NetworkError, RemoteError) as e:
            log.debug("tensor of %s: %.200s", peer, e)
            await stream.reset()
        finally:
            self._streams.release(peer, 1)

    async def _receive(self, stream: Stream) -> None:
        with self._budget.account(stream.remote) as account:
            with trio.move_on_after(defaults.KWAAI_TENSOR_SECONDS) as limit:
                message = await _read(stream, defaults.MAX_TENSOR_FRAME_BYTES, account.add)
            if limit.cancelled_caught:
                raise StreamClosed(f"no whole tensor within {defaults.KWAAI_TENSOR_SECONDS:g} s")
            if message.type != TensorMessageType.DATA:
                raise RemoteError(f"a tensor message of type {message.type.name}: only DATA is taken here")
            await self._take(stream.remote, message)
        with trio.move_on_after(defaults.SEND_SECONDS):
            await stream.write(encode_frame(receipt(message)))


async def send_tensor(
    host: Host,
    peer: PeerId,
    name: str,
    tensor: torch.Tensor,
    *,
    metadata: str = "",
    block_size: int = BLOCK,
    timeout: float,
) -> None:
    """Send ``tensor``, of any shape and dtype, quantised to 8 bits, and wait for its receipt.

    Quantised in a worker thread. Raises CompressionError for values that are not finite, ValueError for a name,
    metadata or frame beyond the limits, DeadlineExceeded after ``timeout`` seconds, RemoteError for anything but the
    receipt, and what Host.open_stream raises. Cancelled: the stream is reset.
    """

    def encode() -> bytes:
        return encode_frame(tensor_message(name, quantise_blocks(tensor, block_size), metadata=metadata))

    frame = await trio.to_thread.run_sync(encode)
    with trio.move_on_after(timeout) as limit:
        stream = await host.open_stream(peer, PROTOCOL)
        try:
            await stream.write(frame)
            answer = await _read(stream, _RECEIPT_BYTES, lambda _count: None)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise
        await stream.close()
    if limit.cancelled_caught:
        raise DeadlineExceeded(f"{PROTOCOL} at {peer}: no receipt within {timeout:g} s")
    if (answer.type, answer.name, answer.metadata) != (TensorMessageType.ACK, name, RECEIVED):
        raise RemoteError(f"{PROTOCOL} at {peer}: {answer.type.name} of {answer.name!r:.60} is no receipt")


async def _read(stream: Stream, max_bytes: int, on_read: Callable[[int], None]) -> KwaaiTensorMessage:
    """The one message of a stream; what follows it is ignored."""
    decoder = KwaaiTensorDecoder(max_bytes)
    while True:
        data = await stream.read(_READ_BYTES)
        if not data:
            decoder.finish()
            raise StreamClosed(f"{stream.protocol}: {stream.remote} closed the stream without a message")
        on_read(len(data))
        if messages := decoder.feed(data):
            return messages[0]
