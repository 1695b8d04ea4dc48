from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.compression import CompressionType, Encoded, codec, decode, encode
from kwaainet_bridge.compression.encoded import DTYPES
from kwaainet_bridge.errors import CompressionError, RemoteError

FLOATS = [torch.float32, torch.float16, torch.float64]


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (3, 5), (4099,)])
def test_round_trip(compression, dtype, shape):
    if shape == () and compression == CompressionType.MEANSTD_16BIT:
        return
    tensor = torch.rand(shape).to(dtype)
    for encoded in (encode(tensor, compression), encode(tensor, compression.name)):
        back = decode(encoded)
        assert (back.dtype, back.shape) == (dtype, tensor.shape)
        assert torch.allclose(back.float(), tensor.float(), atol=0.2)
        assert len(encoded.buffer) == codec(compression).size(shape, dtype)
        assert torch.equal(decode(Encoded.from_bytes(encoded.to_bytes())), back)


def test_blockwise_is_what_one_gets():
    assert encode(torch.ones(3)).compression is CompressionType.BLOCKWISE_8BIT


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_in_bytes(dtype):
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    encoded = encode(tensor, "NONE")
    assert torch.equal(decode(Encoded.from_bytes(encoded.to_bytes())), tensor)
    if dtype != torch.bool:
        assert torch.equal(decode(encode(tensor, "BLOCKWISE_8BIT")), tensor)


@pytest.mark.parametrize("compression", ["NONE", "UNIFORM_8BIT", "QUANTILE_8BIT", "BLOCKWISE_8BIT"])
def test_bfloat16_both_ways(compression):
    tensor = torch.rand(700).to(torch.bfloat16)
    back = decode(encode(tensor, compression))
    assert back.dtype == torch.bfloat16
    assert torch.allclose(back.float(), tensor.float(), atol=0.3)


def test_golden_bytes():
    data = encode(torch.tensor([[1.0], [2.0]]), "FLOAT16").to_bytes()
    assert data.hex() == "01020002" + "0200000000000000" + "0100000000000000" + "003c0040"


def test_what_is_refused():
    with pytest.raises(CompressionError, match="there is no compression 'ZIP', only NONE"):
        encode(torch.ones(1), "ZIP")
    with pytest.raises(CompressionError, match="there is no compression 9"):
        encode(torch.ones(1), 9)
    with pytest.raises(CompressionError, match="complex64 tensors do not travel"):
        encode(torch.ones(1, dtype=torch.complex64))


GOOD = encode(torch.ones(2, 3), "NONE").to_bytes()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x01\x00", "2 bytes, its header has 4"),
        (b"\x02" + GOOD[1:], "version is 2"),
        (b"\x01\x06" + GOOD[2:], "no compression 6"),
        (b"\x01\x00\x0a" + GOOD[3:], "no dtype 10"),
        (GOOD[:3] + b"\xff" + GOOD[4:], "255 dimensions"),
        (GOOD[:12], "2 dimensions in 12 bytes"),
        (GOOD[:4] + b"\xff" * 16 + GOOD[20:], "more than 2147483648 elements"),
        (GOOD[:-1], "buffer has 23 bytes; NONE needs 24"),
    ],
)
def test_bad_bytes(data, complaint):
    with pytest.raises(RemoteError, match=complaint):
        decode(Encoded.from_bytes(data))


@given(st.binary(max_size=80))
def test_any_bytes(tail):
    for data in (tail, GOOD[:3] + tail):
        try:
            decode(Encoded.from_bytes(data))
        except RemoteError:
            continue


@pytest.mark.parametrize("compression", list(CompressionType))
def test_sizes_beyond_2_to_the_31_by_arithmetic(compression):
    huge = codec(compression).size((2**20, 2**12), torch.float32)
    per_value = {"NONE": 4, "FLOAT16": 2, "MEANSTD_16BIT": 2}.get(compression.name, 1)
    beside = {"MEANSTD_16BIT": 8 << 20, "BLOCKWISE_8BIT": 16 + 1024 + 4 * 2**20}
    beside |= {"UNIFORM_8BIT": 1032, "QUANTILE_8BIT": 1032}
    assert huge == per_value * 2**32 + beside.get(compression.name, 0)
    for shape in ((2**31 + 1,), (2**16, 2**16), (2**62, 2**62), (-1,)):
        with pytest.raises(RemoteError, match=r"more than 2147483648 elements|negative"):
            decode(Encoded(compression, torch.float32, shape, b""))
