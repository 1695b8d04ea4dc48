from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.compression.kwaai import dequantise_blocks, quantise_blocks
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.kwaai_tensor import encode_quantised, read_quantised

GOLDEN = bytes.fromhex(
    "04000000000000000040812001000000000000000824010000000000000004000000000000004000000000000000"
)


def test_golden():
    values = torch.tensor([0, 1, -2, 0.5])
    assert encode_quantised(quantise_blocks(values)) == GOLDEN
    got = read_quantised(memoryview(GOLDEN))
    assert (got.shape, got.block_size) == ((4,), 64)
    assert torch.equal(dequantise_blocks(got), dequantise_blocks(quantise_blocks(values)))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 65)])
def test_round_trip(shape):
    sent = quantise_blocks(torch.randn(shape))
    assert torch.equal(dequantise_blocks(read_quantised(encode_quantised(sent))), dequantise_blocks(sent))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "data ends early"),
        (b"\xff" * 8, "data announces 18446744073709551615 items in 0 bytes"),
        (GOLDEN[:12], "scales ends early"),
        (GOLDEN[:21], "scales announces 1 items in 1 bytes"),
        (GOLDEN[:30], "shape announces 1 items in 0 bytes"),
        (GOLDEN[:-1], "block_size ends early"),
        (GOLDEN + b"\x00", "1 bytes behind block_size"),
        (GOLDEN[:-8] + bytes(8), "block_size is 0"),
        (GOLDEN[:20] + b"\x00\x7c" + GOLDEN[22:], "not finite"),
        (GOLDEN[:22] + b"\x11" + bytes(7 + 17 * 8) + GOLDEN[-8:], "17 dimensions"),
    ],
)
def test_bad_bytes(data, complaint):
    with pytest.raises(RemoteError, match=f"quantised tensor: .*{complaint}"):
        dequantise_blocks(read_quantised(data))


@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 255))
def test_any_bytes(tail, position, byte):
    data = bytearray(GOLDEN + tail)
    data[position % len(data)] = byte
    try:
        dequantise_blocks(read_quantised(bytes(data)))
    except RemoteError:
        return
