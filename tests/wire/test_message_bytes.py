"""Hand-written protobuf against the protobuf library, whose classes of ``expert.proto`` are the truth here."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.pb import expert_pb2 as pb
from kwaainet_bridge.wire.tensors import TensorMessage, decode_tensor, encode_tensor


def joined(message) -> bytes:
    return b"".join(message.parts())


def tensor_of_library(message: TensorMessage) -> pb.Tensor:
    return pb.Tensor(
        buffer=bytes(message.buffer),
        size=message.size,
        requires_grad=message.requires_grad,
        dtype=message.dtype,
        compression=message.compression,
        chunks=message.chunks,
    )


def tensors():
    for shape in ((), (1,), (0,), (2, 0), (3, 5), (1, 300, 17)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for gradient in (False, True):
                yield torch.randn(shape).to(dtype).requires_grad_(gradient)
    yield torch.tensor([True, False])
    yield torch.arange(9).reshape(3, 3).T


@pytest.mark.parametrize("compression", ["NONE", "UNIFORM_8BIT", "BLOCKWISE_8BIT"])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_equal_those_of_the_library(compression, legacy):
    chosen = CompressionType[compression]
    for tensor in tensors():
        if chosen == CompressionType.UNIFORM_8BIT and not tensor.dtype.is_floating_point:
            continue
        message = encode_tensor(tensor, chosen, legacy_bfloat16=legacy)
        message.chunks = tensor.ndim
        data = joined(message)
        assert data == tensor_of_library(message).SerializeToString()
        assert message.length() == len(data)
        read = TensorMessage.read(data)
        assert joined(read) == data
        assert (read.size, read.chunks) == (list(tensor.shape), tensor.ndim)


def test_values_are_not_copied_before_they_are_joined():
    tensor = torch.zeros(4)
    request = ExpertRequest(tensors=[encode_tensor(tensor)])
    tensor.fill_(1)
    data = joined(request)
    read = ExpertRequest.read(data)
    assert read.tensors[0].buffer.obj is data
    assert torch.equal(decode_tensor(read.tensors[0]), torch.ones(4))


def test_a_megabyte_is_copied_once_into_a_frame_and_once_out_of_its_payload():
    tensor = torch.zeros(1 << 18)
    response = ExpertResponse(tensors=[encode_tensor(tensor)])
    tracemalloc.start()
    frame = frames.encode_message(*response.parts())
    of_writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    (message,) = ExpertResponse.read(
        frame[frames.HEADER_BYTES :]
    ).tensors  # the slice is the received payload
    of_reading = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert (round(of_writing / tensor.nbytes, 2), round(of_reading / tensor.nbytes, 2)) == (1.0, 1.0)
    assert torch.equal(decode_tensor(message), tensor)


REQUESTS = [
    {},
    {"uid": "tiny.0 tiny.1"},
    {"uid": "ü" * 100, "metadata": bytes(200)},
    {"tensors": [torch.ones(2, 3), torch.empty(0)], "metadata": b"\x80"},
    {"uid": "a", "tensors": [torch.tensor(1.0)]},
]


@pytest.mark.parametrize("fields", REQUESTS)
def test_requests_and_responses_equal_those_of_the_library(fields):
    own = [encode_tensor(t) for t in fields.get("tensors", ())]
    theirs = [tensor_of_library(t) for t in own]
    rest = {"metadata": fields.get("metadata", b"")}
    pairs = [(ExpertResponse(tensors=own, **rest), pb.ExpertResponse(tensors=theirs, **rest))]
    rest["uid"] = fields.get("uid", "")
    pairs.append((ExpertRequest(tensors=own, **rest), pb.ExpertRequest(tensors=theirs, **rest)))
    for message, of_library in pairs:
        data = of_library.SerializeToString()
        assert joined(message) == data
        assert message.length() == len(data)
        read = type(message).read(data)
        assert joined(read) == data
        assert read.metadata == rest["metadata"]
    assert (type(read.metadata), read.uid) == (bytes, rest["uid"])


GOOD = joined(encode_tensor(torch.ones(2, 3)))
FULL = joined(ExpertRequest(uid="u", tensors=[encode_tensor(torch.ones(2, 3))], metadata=b"m"))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (GOOD[:-1], "dtype ends after 6 of 7 bytes"),
        (GOOD[:10], "buffer ends after 8 of 24 bytes"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "buffer ends after 0 of 18446744073709551615 bytes"),
        (b"\x0a" + b"\xff" * 10, "buffer: varint: does not end"),
        (b"\x0a", "buffer ends early"),
        (b"\x80", "field number ends early"),
        (b"\x08\x01", "buffer has wire type 0"),
        (b"\x15" + bytes(4), "size has wire type 5"),
        (b"\x2a\x00", "compression has wire type 2"),
        (b"\x00\x01", "field 0 has wire type 0"),
        (b"\x3b", "field 7 has wire type 3"),
        (b"\x3d\x00", "field 7 ends after 1 of 4 bytes"),
        (b"\x3a\x05z", "field 7 ends after 1 of 5 bytes"),
        (GOOD + b"\x12\x10" + b"\x01" * 16, "size has more than the 16 dimensions"),
        (b"\x10\x01" * 17, "size has more than the 16 dimensions"),
        (b"\x12\x01\x80", "size ends early"),
        (b"\x38\x00" * (defaults.MAX_MESSAGE_FIELDS + 1), "more than 64 fields"),
    ],
)
def test_bytes_that_are_no_tensor(data, complaint):
    with pytest.raises(RemoteError, match=f"^{complaint}"):
        TensorMessage.read(data)
    with pytest.raises(RemoteError, match=f"^tensors: {complaint}"):
        ExpertResponse.read(joined(ExpertResponse()) + b"\x12" + _varint(len(data)) + data)


def _varint(n: int) -> bytes:
    return bytes([n & 0x7F | 0x80, n >> 7])


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x0a\x01\xff", "uid is not UTF-8"),
        (b"\x0a\x05a", "uid ends after 1 of 5 bytes"),
        (b"\x08\x01", "uid has wire type 0"),
        (b"\x10\x01", "tensors has wire type 0"),
        (b"\x1d" + bytes(4), "metadata has wire type 5"),
        (b"\x12\x00" * (defaults.MAX_MESSAGE_FIELDS + 1), "more than 64 fields"),
    ],
)
def test_bytes_that_are_no_request(data, complaint):
    with pytest.raises(RemoteError, match=f"^{complaint}"):
        ExpertRequest.read(data)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "dtype '' does not travel"),
        (b"\x22\x01\xff", "dtype '\ufffd' does not travel"),
        (GOOD + b"\x28\x06", "no compression 6"),
        (GOOD + b"\x28" + b"\xff" * 9 + b"\x01", "no compression 18446744073709551615"),
        (GOOD + b"\x10\x02", "buffer has 24 bytes; NONE needs 48"),
        (GOOD + b"\x12\x0a" + b"\xff" * 9 + b"\x01", "more than 2147483648 elements"),
        (GOOD + b"\x22\x05int32\x18\x01", "requires_grad is set for torch.int32"),
    ],
)
def test_messages_that_are_no_tensor(data, complaint):
    with pytest.raises(RemoteError, match=f"^hidden states: .*{complaint}"):
        decode_tensor(TensorMessage.read(data), name="hidden states")


@pytest.mark.parametrize(
    ("kind", "data", "complaint"),
    [
        (TensorMessage, b"\x22\x41" + b"\xff" * 65, "dtype has 65 bytes, at most 64"),
        (ExpertRequest, b"\x0a\x81\x80\x10" + b"a" * 262145, "uid has 262145 bytes, at most 262144"),
    ],
)
def test_text_is_bounded(kind, data, complaint):
    """Half a gigabyte of bad UTF-8 takes the loop for seconds, and text up to four times the memory of its bytes."""
    with pytest.raises(RemoteError, match=f"^{complaint}"):
        kind.read(data)


UNKNOWN = b"\x3a\x02zz" + b"\x41" + bytes(8) + b"\x4d" + bytes(4) + b"\x50\x07"


def test_unknown_fields_any_order_and_the_last_counts():
    buffer, rest = GOOD[:26], GOOD[26:]
    for data in (rest + buffer, UNKNOWN + GOOD + UNKNOWN + b"\x30\x05", b"\x0a\x01z" + GOOD):
        assert torch.equal(decode_tensor(TensorMessage.read(data)), torch.ones(2, 3))
    read = ExpertRequest.read(b"\x1a\x02no" + UNKNOWN + FULL[3:] + FULL[:3] + UNKNOWN)
    assert joined(read) == FULL


def test_a_response_with_a_uid_is_read_without_it():
    assert joined(ExpertResponse.read(FULL)) == FULL[3:]
    assert joined(ExpertResponse.read(b"\x08\x01" + FULL)) == FULL[3:]


@QUICK
@given(st.binary(max_size=30), st.integers(0, 2000), st.integers(0, 255))
def test_any_tensor_is_read_as_by_the_library(tail, position, byte):
    data = bytearray(GOOD + tail)
    data[position % len(data)] = byte
    try:
        got = decode_tensor(TensorMessage.read(bytes(data)))
    except RemoteError:
        return
    try:
        expected = pb.Tensor.FromString(bytes(data))
    except DecodeError:  # a varint too long for the library, say
        return
    assert got.shape == tuple(expected.size)
    assert (expected.dtype, expected.requires_grad) == (str(got.dtype)[6:], got.requires_grad)
    if not expected.compression:
        assert expected.buffer == bytes(encode_tensor(got).buffer)


@QUICK
@given(st.binary(max_size=30), st.integers(0, 2000), st.integers(0, 255))
def test_any_request_is_read_as_by_the_library(tail, position, byte):
    data = bytearray(FULL + tail)
    data[position % len(data)] = byte
    try:
        got = ExpertRequest.read(bytes(data))
    except RemoteError:
        return
    try:
        expected = pb.ExpertRequest.FromString(bytes(data))
    except DecodeError:
        return
    assert (got.uid, got.metadata) == (expected.uid, expected.metadata)
    assert [bytes(t.buffer) for t in got.tensors] == [t.buffer for t in expected.tensors]
