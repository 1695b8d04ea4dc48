"""Messages of KwaaiNet's protocols."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgpack

from fuzz.wire_targets import expect, same_however_cut
from kwaainet_bridge.compression.kwaai import dequantise_blocks
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import kwaai_mux as mux
from kwaainet_bridge.wire import kwaai_tensor
from kwaainet_bridge.wire.fields import BytesMessage
from kwaainet_bridge.wire.kwaai_hello import Hello
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, InferenceResponse, PayloadType
from kwaainet_bridge.wire.kwaai_lease import LeaseReply, LeaseRequest
from kwaainet_bridge.wire.kwaai_octets import read_octets

_MAX_FRAME: Final = 1 << 20


def _again(message: BytesMessage) -> None:
    """What was read is written and read again, and the library reads it as one value."""
    written = b"".join(message.parts())
    expect(type(message).read(written) == message, "round trip")
    expect(msgpack.packb(msgpack.unpackb(written)) == written, "the library writes something else")


def inference_request(data: bytes) -> None:
    request = InferenceRequest.read(data)
    _again(request)
    expect(1 <= request.tokens <= len(data), "more tokens than bytes")
    if request.payload_type == PayloadType.TOKEN_IDS:
        ids = request.token_ids()
        expect(tuple(ids.shape) == request.shape and int(ids.min()) >= 0, "token ids")
    else:
        expect(tuple(request.hidden_states().shape) == request.shape, "hidden states")


def inference_response(data: bytes) -> None:
    response = InferenceResponse.read(data)
    _again(response)
    if response.error is None:
        values = response.values()
        expect(tuple(values.shape) == response.shape, "values")
        expect(values.nbytes <= 2 * len(data), "more values than bytes")


def lease(data: bytes) -> None:
    """As a request and as a reply."""
    try:
        _again(LeaseRequest.read(data))
    except RemoteError:
        _again(LeaseReply.read(data))


def hello(data: bytes) -> None:
    expect(b"".join(Hello.read(data).parts()) == data, "round trip")


def octets(data: bytes) -> None:
    """Two bytes for the number of items, then the items; against the library, which reads them one by one."""
    count, items = int.from_bytes(data[:2], "big"), data[2:]
    read, end = read_octets(memoryview(items), 0, count, "data")
    expect(len(read) == count <= end <= 2 * count, "length")
    unpacker = msgpack.Unpacker()
    unpacker.feed(items[:end])
    expect(bytes(list(unpacker)) == read, "the library reads something else")


def mux_stream(data: bytes) -> None:
    messages, error = same_however_cut(lambda: mux.MuxDecoder(_MAX_FRAME), data)
    for message in messages:
        if not isinstance(message, mux.MuxUnknown):
            frame = mux.encode_frame(message)
            expect(mux.MuxDecoder().feed(frame) == [message], "round trip")
    if error is not None:
        raise RemoteError(error)


class _Frames(kwaai_tensor.KwaaiTensorDecoder):
    """Gives each message as its frame again: tensors cannot be compared in one word."""

    def _build(self, tag: int, body: bytes) -> bytes:  # type: ignore[override]
        message = super()._build(tag, body)
        if message.tensor is not None:
            values = dequantise_blocks(message.tensor)
            expect(tuple(values.shape) == message.shape and values.nbytes <= 4 * len(body), "values")
        return kwaai_tensor.encode_frame(message)


def tensor_stream(data: bytes) -> None:
    frames, error = same_however_cut(lambda: _Frames(_MAX_FRAME), data)
    again = b"".join(frames)
    expect(data.startswith(again), "round trip")
    expect(error is not None or again == data, "bytes were lost")
    if error is not None:
        raise RemoteError(error)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "kwaai-inference-request": inference_request,
    "kwaai-inference-response": inference_response,
    "kwaai-lease": lease,
    "kwaai-hello": hello,
    "kwaai-octets": octets,
    "kwaai-mux": mux_stream,
    "kwaai-tensor": tensor_stream,
}
