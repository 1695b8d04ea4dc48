"""Hand-written protobuf against the protobuf library."""

from __future__ import annotations

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertResponse, Tensor
from kwaainet_bridge.wire.tensor_bytes import field_header, read_tensor, tensor_parts
from kwaainet_bridge.wire.tensors import decode_tensor, encode_tensor


def tensors():
    for shape in ((), (1,), (0,), (2, 0), (3, 5), (1, 300, 17)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for gradient in (False, True):
                yield torch.randn(shape).to(dtype).requires_grad_(gradient)
    yield torch.tensor([True, False])
    yield torch.arange(9).reshape(3, 3).T


@pytest.mark.parametrize("compression", ["NONE", "UNIFORM_8BIT", "BLOCKWISE_8BIT"])
@pytest.mark.parametrize("legacy", [False, True])
def test_equal_to_the_library(compression, legacy):
    chosen = CompressionType[compression]
    for tensor in tensors():
        if chosen == CompressionType.UNIFORM_8BIT and not tensor.dtype.is_floating_point:
            continue
        message = encode_tensor(tensor, chosen, legacy_bfloat16=legacy)
        data = b"".join(tensor_parts(tensor, chosen, legacy_bfloat16=legacy))
        assert data == message.SerializeToString()
        got, expected = read_tensor(data), decode_tensor(message)
        assert (got.dtype, got.requires_grad) == (expected.dtype, expected.requires_grad)
        assert torch.equal(got, expected)


def test_inside_another_message():
    parts = tensor_parts(torch.ones(4))
    data = b"".join([field_header(2, sum(map(len, parts))), *parts])
    assert data == ExpertResponse(tensors=[encode_tensor(torch.ones(4))]).SerializeToString()


def test_values_are_not_copied_before_they_are_joined():
    tensor = torch.zeros(4)
    parts = tensor_parts(tensor)
    tensor.fill_(1)
    assert torch.equal(read_tensor(b"".join(parts)), torch.ones(4))


GOOD = encode_tensor(torch.ones(2, 3)).SerializeToString()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "dtype b'' does not travel"),
        (GOOD[:-1], "dtype ends after 6 of 7 bytes"),
        (GOOD[:10], "buffer ends after 8 of 24 bytes"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "buffer ends after 0 of 18446744073709551615 bytes"),
        (b"\x0a" + b"\xff" * 10, "buffer: varint: does not end"),
        (b"\x0a", "buffer ends early"),
        (b"\x08\x01", "buffer has wire type 0"),
        (b"\x22\x01\xff", "dtype b'.xff' does not travel"),
        (b"\x00\x01", "field 0 has wire type 0"),
        (b"\x3b", "field 7 has wire type 3"),
        (b"\x3d\x00", "field 7 ends after 1 of 4 bytes"),
        (GOOD + b"\x28\x06", "no compression 6"),
        (GOOD + b"\x28" + b"\xff" * 9 + b"\x01", "no compression 18446744073709551615"),
        (GOOD + b"\x10\x02", "buffer has 24 bytes; NONE needs 48"),
        (GOOD + b"\x12\x10" + b"\x01" * 16, "size has more than the 16 dimensions"),
        (GOOD + b"\x12\x0a" + b"\xff" * 9 + b"\x01", "more than 2147483648 elements"),
        (GOOD + b"\x22\x05int32\x18\x01", "requires_grad is set for torch.int32"),
    ],
)
def test_bad_bytes(data, complaint):
    with pytest.raises(RemoteError, match=f"^hidden states: .*{complaint}"):
        read_tensor(data, name="hidden states")


def test_unknown_fields_and_any_order():
    buffer, rest = GOOD[:26], GOOD[26:]
    later = b"\x3a\x02zz" + b"\x41" + bytes(8) + b"\x4d" + bytes(4) + b"\x50\x07" + b"\x30\x05"
    for data in (rest + buffer, later + GOOD + later, b"\x0a\x01z" + GOOD):
        assert torch.equal(read_tensor(data), torch.ones(2, 3))


@given(st.binary(max_size=30), st.integers(0, 2000), st.integers(0, 255))
def test_any_bytes(tail, position, byte):
    data = bytearray(GOOD + tail)
    data[position % len(data)] = byte
    try:
        got = read_tensor(bytes(data))
    except RemoteError:
        return
    try:
        expected = decode_tensor(Tensor.FromString(bytes(data)))
    except (DecodeError, RemoteError):  # a number too long for its field: the library cuts it, we need not
        return
    assert torch.equal(got, expected)
