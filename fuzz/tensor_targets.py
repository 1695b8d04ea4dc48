"""Codecs, tensor messages, and expert requests with their metadata."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from fuzz.wire_targets import expect
from kwaainet_bridge import defaults
from kwaainet_bridge.compression import Codec, CompressionType, Encoded, codec, decode
from kwaainet_bridge.compression.encoded import DTYPES
from kwaainet_bridge.compression.kwaai import (
    QuantisedBlocks,
    SparseValues,
    dequantise_blocks,
    quantise_blocks,
    spread_out,
)
from kwaainet_bridge.errors import CompressionError, Refusal, RemoteError
from kwaainet_bridge.hivemind.client.calls import parse_traits
from kwaainet_bridge.hivemind.experts.records import ModelRecord, ServerInfo
from kwaainet_bridge.hivemind.experts.requests import Metadata
from kwaainet_bridge.wire.envelope import DelimitedDecoder
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.fields import Buffer, BytesMessage
from kwaainet_bridge.wire.msgpack import pack, unpack
from kwaainet_bridge.wire.pb import expert_pb2
from kwaainet_bridge.wire.tensors import (
    TensorJoiner,
    TensorMessage,
    decode_tensor,
    encode_tensor,
    split_tensor,
)

_DTYPES: Final = tuple(DTYPES)
_MAX_BYTES: Final = 1 << 20


def _check_tensor(tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, buffer: Buffer) -> None:
    expect(tuple(tensor.shape) == tuple(shape), "shape")
    expect(tensor.dtype == dtype, "dtype")
    expect(tensor.is_contiguous() and tensor.device.type == "cpu", "layout")
    expect(tensor.nbytes <= 8 * len(buffer), "more memory than the buffer accounts for")


def codec_layout(dtype: str, shape: Sequence[int], buffer: bytes) -> bytes:
    """The input of a codec's target: dtype, number of dimensions, two bytes for each, the buffer."""
    dims = b"".join(d.to_bytes(2, "big") for d in shape)
    return bytes([_DTYPES.index(dtype), len(shape)]) + dims + buffer


def _decompress(which: Codec, data: bytes) -> None:
    """The message goes through decode_tensor, whose checks of the shape are part of every codec's safety."""
    if len(data) < 2:
        return
    dtype, ndim = _DTYPES[data[0] % len(_DTYPES)], data[1] % 20
    dims = [int.from_bytes(data[2 + 2 * i : 4 + 2 * i], "big") for i in range(ndim)]
    shape = [d if d < 0xF000 else (d & 0xFFF) << 20 for d in dims]  # the highest stand for far larger ones
    buffer = data[2 + 2 * ndim :]
    message = TensorMessage(values=[buffer], size=shape, dtype=dtype, compression=which.compression)
    tensor = decode_tensor(message)
    _check_tensor(tensor, shape, DTYPES[dtype], buffer)
    # a peer's values, whatever they are, can be encoded again or are refused for a stated reason
    with contextlib.suppress(CompressionError):
        again = encode_tensor(tensor, which.compression)
        _check_tensor(decode_tensor(again), shape, DTYPES[dtype], again.buffer)


def tensor(data: bytes) -> None:
    message = _read(TensorMessage, expert_pb2.Tensor, data)
    decoded = decode_tensor(message)
    _check_tensor(decoded, message.size, DTYPES[message.dtype], message.buffer)
    again = decode_tensor(TensorMessage.read(_bytes(encode_tensor(decoded))))
    expect(decoded.requires_grad == again.requires_grad, "requires_grad differs")
    expect(torch.equal(_bits(decoded), _bits(again)), "round trip")


def _bytes(message: BytesMessage) -> bytes:
    return b"".join(message.parts())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


_Read = TypeVar("_Read", bound=BytesMessage)


def _read(kind: type[_Read], library: type[Message], data: bytes) -> _Read:
    """Our reader: it reads again what it writes, and what the protobuf library accepts too it reads alike."""
    message = kind.read(data)
    written = _bytes(message)
    expect(message.length() == len(written), "length")
    expect(_bytes(kind.read(written)) == written, "round trip")
    try:
        theirs = library.FromString(data)
    except DecodeError:  # a varint that is too long, text that is not UTF-8 and is not the last of its field
        return message
    theirs.DiscardUnknownFields()  # type: ignore[attr-defined]  # the stubs leave it out
    ours = library.FromString(
        written
    )  # what both write need not be equal: numbers may be too wide for their field
    expect(ours == theirs, "the library reads something else")
    return message


def encoded(data: bytes) -> None:
    read = Encoded.from_bytes(data)
    _check_tensor(decode(read), read.shape, read.dtype, bytes(read.buffer))
    expect(read.to_bytes() == data, "round trip")


def kwaai_blocks(data: bytes) -> None:
    """Numbers of two bytes each: block size, scales, dimensions; one byte: how many dimensions; codes, scales."""
    size, scales, ndim = (int.from_bytes(data[i : i + 2], "big", signed=True) for i in (0, 2, 4))
    ndim %= 20
    shape = tuple(int.from_bytes(data[6 + 2 * i : 8 + 2 * i], "big", signed=True) for i in range(ndim))
    rest = data[6 + 2 * ndim :]
    cut = min(max(0, scales), len(rest) // 2) * 2
    blocks = QuantisedBlocks(_tensor(rest[cut:], torch.int8), _tensor(rest[:cut], torch.float16), shape, size)
    whole = dequantise_blocks(blocks)
    _check_tensor(whole, shape, torch.float32, data)
    with contextlib.suppress(CompressionError):  # magnitudes that float16 scales do not reach
        again = quantise_blocks(whole, size)
        expect(bool(torch.isfinite(dequantise_blocks(again)).all()), "values that are not finite")


def kwaai_sparse(data: bytes) -> None:
    """Two bytes each: original size, indices, dimensions; then shape, indices of eight bytes, values of four."""
    original, kept, ndim = (int.from_bytes(data[i : i + 2], "big", signed=True) for i in (0, 2, 4))
    ndim %= 20
    shape = tuple(int.from_bytes(data[6 + 2 * i : 8 + 2 * i], "big", signed=True) for i in range(ndim))
    rest = data[6 + 2 * ndim :]
    cut = min(max(0, kept), len(rest) // 8) * 8
    values = rest[cut : len(rest) - (len(rest) - cut) % 4]
    sparse = SparseValues(_tensor(rest[:cut], torch.int64), _tensor(values, torch.float32), original, shape)
    whole = spread_out(sparse)
    expect(tuple(whole.shape) == shape, "shape")
    expect(int(whole.count_nonzero()) <= cut // 8, "more values than came")


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def parts(data: bytes) -> None:
    """A stream of delimited tensor parts."""
    joiner = TensorJoiner(_MAX_BYTES, max_tensors=64)
    whole: list[TensorMessage] = []
    for body in DelimitedDecoder(_MAX_BYTES).feed(data):
        whole += joiner.feed(TensorMessage.read(body))
    whole += joiner.finish()
    for message in whole:
        expect(len(message.buffer) <= len(data), "a buffer longer than what came")
        again = TensorJoiner(_MAX_BYTES)
        joined = [t for part in split_tensor(message, 64) for t in again.feed(part)] + again.finish()
        expect([t.buffer for t in joined] == [message.buffer], "split and joined")


_READERS: Final[tuple[Callable[[Metadata], object], ...]] = (
    Metadata.check_common,
    lambda m: m.session_id,
    lambda m: m.step_id,
    lambda m: m.pushed,
    lambda m: m.start_from_position,
    lambda m: m.max_length,
    lambda m: m.alloc_timeout,
    lambda m: m.output_compression(CompressionType.NONE, 2),
    lambda m: m.next_servers,
    lambda m: m.arrange([torch.empty(0)] * 3),
)


def metadata(data: bytes) -> None:
    """Every accessor on its own: what one refuses must not hide the next."""
    read = Metadata(data)
    for reader in _READERS:
        with contextlib.suppress(Refusal, RemoteError):
            reader(read)


def expert_request(data: bytes) -> None:
    request = _read(ExpertRequest, expert_pb2.ExpertRequest, data)
    _decode(request.tensors)
    metadata(request.metadata)


def expert_response(data: bytes) -> None:
    _decode(_read(ExpertResponse, expert_pb2.ExpertResponse, data).tensors)


def _decode(messages: Sequence[TensorMessage]) -> None:
    joiner = TensorJoiner(_MAX_BYTES)
    for part in messages:
        for whole in joiner.feed(part):
            decode_tensor(whole)
    for whole in joiner.finish():
        decode_tensor(whole)


def rpc_info(data: bytes) -> None:
    traits = parse_traits(data)
    expect(isinstance(traits.version, str), "version")
    expect(isinstance(traits.rolls_back, bool), "rolls_back")


def server_record(data: bytes) -> None:
    info = ServerInfo.from_value(unpack(data))
    expect(ServerInfo.from_value(unpack(pack(info.to_value()))) == info, "round trip")


def model_record(data: bytes) -> None:
    record = ModelRecord.from_value(unpack(data))
    expect(1 <= record.num_blocks <= defaults.MAX_MODEL_BLOCKS, "the number of blocks is bounded")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    **{
        "codec-" + kind.name.lower().replace("_", "-"): partial(_decompress, codec(kind))
        for kind in CompressionType
    },
    "tensor": tensor,
    "tensor-parts": parts,
    "encoded": encoded,
    "kwaai-blocks": kwaai_blocks,
    "kwaai-sparse": kwaai_sparse,
    "metadata": metadata,
    "expert-request": expert_request,
    "expert-response": expert_response,
    "rpc-info": rpc_info,
    "server-record": server_record,
    "model-record": model_record,
}
