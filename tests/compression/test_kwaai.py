"""KwaaiNet's forms against values that its own serialiser made, and against the errors that the codecs state."""

from __future__ import annotations

import math

import pytest
import torch

from kwaainet_bridge.compression import CompressionType, decode, encode
from kwaainet_bridge.compression.kwaai import (
    QuantisedBlocks,
    SparseValues,
    dequantise_blocks,
    from_kwaai,
    keep_largest,
    quantise_blocks,
    spread_out,
    to_kwaai,
)
from kwaainet_bridge.errors import CompressionError, RemoteError


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def test_golden():
    quantised = quantise_blocks(torch.tensor([0, 1, -2, 0.5]))
    assert quantised.data.tolist() == [0, 64, -127, 32]
    assert quantised.data.numpy().tobytes().hex() == "00408120"
    assert quantised.scales.numpy().tobytes().hex() == "0824"
    assert (quantised.shape, quantised.block_size) == ((4,), 64)


def test_rule_one_value_at_a_time():
    values = randn(5, 77)
    quantised = quantise_blocks(values)
    flat = values.reshape(-1)
    for start in range(0, 385, 64):
        block = flat[start : start + 64]
        scale = block.abs().max() / 127
        assert quantised.scales[start // 64] == scale.half()
        for value, code in zip(block, quantised.data[start : start + 64], strict=True):
            quotient = float(value / scale)
            away = math.copysign(math.floor(abs(quotient) + 0.5), quotient)
            assert int(code) == max(-127, min(127, int(away)))


def test_halves_go_away_from_zero_and_less_does_not():
    values = torch.tensor([127.0, 0.5, -0.5, 2.5, -2.5, 0.49999997, -0.49999997])
    assert quantise_blocks(values).data.tolist() == [127, 1, -1, 3, -3, 0, 0]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (63,), (64,), (65,), (4, 4097)])
@pytest.mark.parametrize("block_size", [1, 64, 2**40])
def test_round_trip_error(shape, block_size):
    values = randn(*shape)
    quantised = quantise_blocks(values, block_size)
    back = dequantise_blocks(quantised)
    assert back.shape == values.shape
    if values.numel():
        scale = values.abs().max() / 127
        assert (back - values).abs().max() <= scale * (0.5 + 127 * 2**-11) * 1.001


def test_zero_blocks_and_the_smallest():
    quantised = quantise_blocks(
        torch.cat([torch.zeros(64), torch.full((64,), 3.7e-6), torch.tensor([1e-45])])
    )
    assert quantised.scales.tolist() == [1, 0, 0]
    assert not dequantise_blocks(quantised).any()
    assert dequantise_blocks(quantise_blocks(torch.full((3,), 1e-4))).tolist() == pytest.approx(
        [1e-4] * 3, rel=0.04
    )


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 8.4e6])
def test_values_that_scales_cannot_hold(bad):
    with pytest.raises(CompressionError, match="not finite or above"):
        quantise_blocks(torch.tensor([1.0, bad]))
    with pytest.raises(CompressionError, match="blocks of 0"):
        quantise_blocks(torch.ones(1), 0)


def test_views_and_dtypes():
    values = randn(8, 9)
    assert torch.equal(quantise_blocks(values.T).data, quantise_blocks(values.T.contiguous()).data)
    assert dequantise_blocks(quantise_blocks(values.bfloat16()), torch.bfloat16).dtype == torch.bfloat16


def quantised(data=128, scales=2, shape=(2, 64), block_size=64, scale=1.0):
    return QuantisedBlocks(
        torch.zeros(data, dtype=torch.int8),
        torch.full((scales,), scale, dtype=torch.float16),
        shape,
        block_size,
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"data": 127}, r"data has 127 values, shape \[2, 64\] 128"),
        ({"scales": 3}, "scales has 3 values for 2 blocks of 64"),
        ({"block_size": 2**63}, "scales has 2 values for 1 blocks"),
        ({"scale": float("inf")}, "not finite"),
        ({"scale": float("nan")}, "not finite"),
        ({"shape": (2**40, 2**40)}, "more than 2147483648 elements"),
        ({"shape": (2**64 - 1, 0)}, "more than 2147483648 elements"),
        ({"shape": (1,) * 17}, "17 dimensions"),
    ],
)
def test_bad_blocks(fields, complaint):
    assert not dequantise_blocks(quantised()).any()
    with pytest.raises(RemoteError, match=complaint):
        dequantise_blocks(quantised(**fields))


def test_largest_values_and_ties():
    sparse = keep_largest(torch.tensor([[1.0, -3.0, 3.0], [0.0, 2.0, -3.0]]), 0.5)
    assert sparse.indices.tolist() == [1, 2, 5]
    assert sparse.values.tolist() == [-3, 3, -3]
    assert (sparse.original_size, sparse.shape) == (6, (2, 3))
    assert spread_out(sparse).tolist() == [[0, -3, 3], [0, 0, -3]]


@pytest.mark.parametrize(
    ("count", "fraction", "kept"), [(1, 0, 1), (10, 0.05, 1), (10, 0.39, 3), (10, 1, 10)]
)
def test_how_many_are_kept(count, fraction, kept):
    values = randn(count)
    sparse = keep_largest(values, fraction)
    assert len(sparse.indices) == len(sparse.values) == kept
    if fraction == 1:
        assert torch.equal(spread_out(sparse), values)


def test_sparse_refusals_of_what_is_sent():
    with pytest.raises(CompressionError, match=r"fraction of 1\.5"):
        keep_largest(torch.ones(2), 1.5)
    with pytest.raises(CompressionError, match="tensors of 0 values"):
        keep_largest(torch.empty(0), 0.5)
    with pytest.raises(CompressionError, match="NaN"):
        keep_largest(torch.tensor([1, float("nan")]), 0.5)


@pytest.mark.parametrize(
    ("indices", "values", "size", "shape", "complaint"),
    [
        ([0], [1.0], 5, (2, 3), "original_size is 5"),
        ([0, 1], [1.0], 6, (2, 3), "values has 1 items, indices 2"),
        ([0, 6], [1.0, 1.0], 6, (2, 3), "index beyond 6"),
        ([-1], [1.0], 6, (2, 3), "index beyond 6"),
        ([0, 0, 0], [1.0] * 3, 2, (2,), "3 indices for 2"),
        ([0], [float("inf")], 6, (2, 3), "not finite"),
        ([0], [1.0], 2**62, (2**31, 2**31), "more than 2147483648"),
    ],
)
def test_bad_sparse(indices, values, size, shape, complaint):
    with pytest.raises(RemoteError, match=complaint):
        spread_out(SparseValues(torch.tensor(indices), torch.tensor(values), size, shape))


ADDED = {"NONE": 0, "FLOAT16": 2**-11, "MEANSTD_16BIT": 2**-9, "BLOCKWISE_8BIT": 0.0071}


@pytest.mark.parametrize("compression", ADDED)
def test_error_of_both_directions(compression):
    """Relative to the largest magnitude: within 4096 values for BLOCKWISE_8BIT, anywhere for the others."""
    values = randn(3, 4096) * torch.tensor([[1.0], [100.0], [0.01]])
    largest = values.abs().amax(dim=1, keepdim=True)
    if compression != "BLOCKWISE_8BIT":
        largest = largest.max()
    sent = quantise_blocks(values)
    received = dequantise_blocks(sent)
    crossed = from_kwaai(sent, compression)
    assert ((decode(crossed) - received).abs() <= ADDED[compression] * largest * 1.0001).all()
    stock = encode(values, CompressionType[compression])
    through = dequantise_blocks(to_kwaai(stock))
    scale = decode(stock).reshape(-1, 64).abs().amax(dim=1, keepdim=True) / 127
    bound = scale * (0.5 + 127 * 2**-11) * 1.001
    assert ((through - decode(stock)).reshape(-1, 64).abs() <= bound).all()
