"""``/kwaai/tensor/2.0.0``: its messages, and tensors put together from parts."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

import torch

from fuzz.wire_targets import expect, pieces
from kwaainet_bridge.compression.encoded import DTYPES, checked_shape
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import kwaai_tensor2 as tensors
from kwaainet_bridge.wire.kwaai_tensor2_values import (
    Compression,
    check_values,
    decode_values,
    encode_values,
    memory_needed,
    new_buffer,
)
from kwaainet_bridge.wire.pb import kwaai_tensor_pb2 as pb

_MOST_BYTES: Final = 1 << 20
_DTYPES: Final = list(DTYPES)


def _written(message: tensors.Message) -> bytes:
    if isinstance(message, tensors.Offer):
        return tensors.encode_offer(message)
    if isinstance(message, tensors.Part):
        return tensors.encode_part(message.number, message.offset, [message.data])
    return tensors.encode_ack(message) if isinstance(message, tensors.Ack) else tensors.encode_end(message)


def _read_all(data: bytes, size: int) -> tuple[list[tensors.Message], str | None]:
    decoder, found = tensors.frame_decoder(), []
    try:
        for piece in pieces(data, size):
            for frame in decoder.feed(piece):
                message = tensors.read_message(frame)
                found.append(message)
                if size == len(data):
                    _again(frame, message)
        decoder.finish()
    except RemoteError as e:
        return found, str(e)
    return found, None


def _again(frame: tensors.Frame, message: tensors.Message) -> None:
    """What was read is written and read again, and the library reads the same part."""
    if isinstance(message, tensors.Ack | tensors.End) and len(message.text) > 100:
        return  # long texts are cut
    [again] = tensors.frame_decoder().feed(_written(message))
    try:
        same = tensors.read_message(again) == message
    except RemoteError:
        same = False
    expect(same, "round trip")
    if isinstance(message, tensors.Part):
        part = pb.Message.FromString(frame.payload).part
        expect(
            (part.number, part.offset, part.data) == (message.number, message.offset, bytes(message.data)),
            "the library reads something else",
        )


def messages(data: bytes) -> None:
    whole = _read_all(data, len(data) or 1)
    for size in (1, 7):
        expect(_read_all(data, size) == whole, f"pieces of {size} bytes end otherwise")
    found, error = whole
    coming: tensors.IncomingTensor | None = None
    for message in found:
        if isinstance(message, tensors.Offer):
            coming = _offered(message)
        elif isinstance(message, tensors.Part) and coming is not None:
            coming.add(message)
        if coming is not None and coming.complete:
            _complete(coming)
            coming = None
    if error is not None:
        raise RemoteError(error)


def _offered(offer: tensors.Offer) -> tensors.IncomingTensor:
    kind = check_values(offer.dtype, offer.shape, offer.compression, offer.bytes)
    if memory_needed(*kind, offer.bytes) > _MOST_BYTES:
        raise RemoteError("more than is accepted")
    return tensors.IncomingTensor(offer)


def _complete(coming: tensors.IncomingTensor) -> None:
    tensor = coming.tensor()
    expect(tuple(tensor.shape) == coming.offer.shape, "shape")
    expect(DTYPES[coming.offer.dtype] == tensor.dtype, "dtype")


def values(data: bytes) -> None:
    """One byte for the dtype, one for the compression, one for the dimensions, two for each, then the values."""
    if len(data) < 3:
        raise RemoteError("too short")
    dtype = _DTYPES[data[0] % len(_DTYPES)]
    dimensions = data[2] % 5
    shape = checked_shape(struct.unpack_from(f">{dimensions}H", data.ljust(16, b"\x00"), 3))
    content = data[3 + 2 * dimensions :]
    kind = check_values(dtype, shape, data[1], len(content))
    needed = memory_needed(*kind, len(content))
    if needed > _MOST_BYTES:
        raise RemoteError("more than is accepted")
    buffer = new_buffer(len(content))
    memoryview(buffer.numpy())[:] = content
    tensor = decode_values(buffer, *kind)
    expect(tuple(tensor.shape) == shape and tensor.dtype == kind[0], "shape and dtype")
    expect(tensor.nbytes + buffer.nbytes <= needed or kind[2] == Compression.NONE, "memory")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "kwaai-tensor2": messages,
    "kwaai-tensor2-values": values,
}


def seeds() -> Iterator[tuple[str, bytes]]:
    source = torch.tensor([[0.0, 1.0, -2.0], [0.5, 3.25, -1.0]])
    for compression in Compression:
        encoded = b"".join(encode_values(source, compression, top_k=0.5))
        shape = b"\x02" + struct.pack(">2H", *source.shape)
        yield "kwaai-tensor2-values", bytes([0, compression]) + shape + encoded
        offer = tensors.Offer(
            number=1,
            name="g",
            dtype="float32",
            shape=(2, 3),
            compression=compression,
            bytes=len(encoded),
            metadata={"step": "3"},
        )
        half = len(encoded) // 2
        yield (
            "kwaai-tensor2",
            tensors.encode_offer(offer)
            + tensors.encode_part(1, 0, [encoded[:half]])
            + tensors.encode_part(1, half, [encoded[half:]])
            + tensors.encode_end(tensors.End()),
        )
    for number, dtype in enumerate(_DTYPES):
        yield "kwaai-tensor2-values", bytes([number, 0, 1, 0, 2]) + bytes(2 * DTYPES[dtype].itemsize)
    small = tensors.Offer(number=2, name="scalar", dtype="bfloat16", bytes=2, data=b"\x80\x3f")
    empty = tensors.Offer(number=3, name="empty", dtype="int64", shape=(0, 4))
    yield "kwaai-tensor2", tensors.encode_offer(small) + tensors.encode_offer(empty)
    acks = (
        tensors.Ack(1, tensors.Code.ACCEPTED),
        tensors.Ack(1, tensors.Code.RECEIVED, bytes=24),
        tensors.Ack(2, tensors.Code.TOO_LARGE, "grüß dich", 1 << 40),
        tensors.Ack(3, 99),
    )
    yield "kwaai-tensor2", b"".join(map(tensors.encode_ack, acks))
    yield "kwaai-tensor2", tensors.encode_end(tensors.End(tensors.Code.PROTOCOL, "offer 3 where 2 is due"))
