from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from kwaainet_bridge.compression import Codec, CompressionType, codec
from kwaainet_bridge.compression.blockwise import BLOCK, codebook
from kwaainet_bridge.compression.codebook import _chunk_size
from kwaainet_bridge.errors import CompressionError, RemoteError

RECORDED = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())
EIGHT_BIT = [CompressionType.UNIFORM_8BIT, CompressionType.QUANTILE_8BIT, CompressionType.BLOCKWISE_8BIT]
INF, NAN = float("inf"), float("nan")


def round_trip(compression: CompressionType, tensor: torch.Tensor) -> torch.Tensor:
    chosen = codec(compression)
    return chosen.decompress(chosen.compress(tensor), tensor.shape, tensor.dtype)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_type_has_its_codec():
    for compression in CompressionType:
        assert isinstance(codec(compression), Codec)
        assert codec(compression).compression is compression
        assert codec(int(compression)) is codec(compression)
    with pytest.raises(CompressionError, match="no compression 6"):
        codec(6)


ROOT_MEAN_SQUARE_ERROR = {
    CompressionType.NONE: 0,
    CompressionType.FLOAT16: 3e-4,
    CompressionType.MEANSTD_16BIT: 3e-4,
    CompressionType.UNIFORM_8BIT: 0.03,
    CompressionType.QUANTILE_8BIT: 0.04,
    CompressionType.BLOCKWISE_8BIT: 0.03,
}
BYTES_PER_VALUE = {CompressionType.NONE: 4, CompressionType.FLOAT16: 2, CompressionType.MEANSTD_16BIT: 2}


@pytest.mark.parametrize("compression", list(CompressionType))
def test_error_and_size(compression):
    tensor = randn(8, 1000)
    error = (round_trip(compression, tensor) - tensor).square().mean().sqrt()
    assert error <= ROOT_MEAN_SQUARE_ERROR[compression]
    size = len(codec(compression).compress(tensor))
    assert 0 <= size - tensor.numel() * BYTES_PER_VALUE.get(compression, 1) <= 1100


def test_blockwise_codebook_is_the_recorded_one():
    data = codebook().numpy().tobytes()
    assert data.hex() == RECORDED["blockwise_code_cpu_fp32_hex"]
    assert hashlib.sha256(data).hexdigest() == RECORDED["blockwise_code_sha256"]
    assert codebook()[127] == 0


def blockwise_codes(data: bytes) -> bytes:
    blocks = int.from_bytes(data[:8], "little")
    return data[16 + 4 * blocks + 1024 :]


@pytest.mark.parametrize("count", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blockwise_takes_the_nearest_code(count):
    """The rule one value at a time: the lower neighbour unless the upper one is strictly nearer, in float32."""
    values = randn(count, seed=count).numpy()
    code = codebook().numpy()
    expected = bytearray()
    for start in range(0, count, BLOCK):
        block = values[start : start + BLOCK]
        for z in block / np.abs(block).max():
            i = int(np.searchsorted(code, z, side="right")) - 1
            expected.append(i + (i < 255 and abs(z - code[i + 1]) < abs(z - code[i])))
    data = codec(CompressionType.BLOCKWISE_8BIT).compress(torch.from_numpy(values))
    assert int.from_bytes(data[:8], "little") == math.ceil(count / BLOCK)
    assert blockwise_codes(data) == bytes(expected)


def test_blockwise_ties_go_down():
    code = codebook()
    between = (code[200] + code[201]) / 2
    assert (between - code[200]) == (code[201] - between)
    data = codec(CompressionType.BLOCKWISE_8BIT).compress(torch.stack([torch.tensor(1.0), between]))
    assert blockwise_codes(data) == bytes([255, 200])


def test_blockwise_blocks_of_zeros():
    tensor = torch.cat([randn(BLOCK), torch.zeros(BLOCK), randn(10)])
    data = codec(CompressionType.BLOCKWISE_8BIT).compress(tensor)
    absmax = np.frombuffer(data, np.float32, count=3, offset=16)
    assert absmax[1] == 0
    assert blockwise_codes(data)[BLOCK : 2 * BLOCK] == bytes([127]) * BLOCK
    assert torch.equal(
        round_trip(CompressionType.BLOCKWISE_8BIT, tensor)[BLOCK : 2 * BLOCK], torch.zeros(BLOCK)
    )
    assert torch.equal(round_trip(CompressionType.BLOCKWISE_8BIT, torch.zeros(3, 4)), torch.zeros(3, 4))


def test_blockwise_decodes_with_the_codebook_that_came():
    chosen = codec(CompressionType.BLOCKWISE_8BIT)
    data = bytearray(chosen.compress(torch.tensor([2.0, -2.0])))
    data[20 : 20 + 1024] = np.arange(256, dtype=np.float32).tobytes()
    assert chosen.decompress(bytes(data), (2,), torch.float32).tolist() == [510.0, 0.0]


def test_blockwise_smallest_numbers():
    tensor = torch.tensor([1e-45, -3e-45, 0.0])
    assert torch.equal(round_trip(CompressionType.BLOCKWISE_8BIT, tensor).sign(), tensor.sign())


@pytest.mark.parametrize("compression", EIGHT_BIT)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_eight_bit_codecs_refuse_what_is_not_finite(compression, bad):
    tensor = randn(2, 3000)
    tensor[1, 7] = bad
    with pytest.raises(
        ValueError, match=f"{compression.name} does not support tensors with values that are not"
    ):
        codec(compression).compress(tensor)


def test_uniform_refuses_what_float32_cannot_sum():
    with pytest.raises(CompressionError, match="squares overflow"):
        codec(CompressionType.UNIFORM_8BIT).compress(torch.tensor([1e30, -1e30]))


def test_float16_saturates():
    got = round_trip(
        CompressionType.FLOAT16, torch.tensor([INF, -INF, 1e5, -1e300, NAN], dtype=torch.float64)
    )
    assert got[:4].tolist() == [65504, -65504, 65504, -65504]
    assert got[4].isnan()
    assert got.dtype == torch.float64


def test_meanstd_loses_only_the_row_that_is_not_finite():
    tensor = randn(4, 50)
    whole = round_trip(CompressionType.MEANSTD_16BIT, tensor)
    tensor[1, 3], tensor[2, 4] = INF, NAN
    got = round_trip(CompressionType.MEANSTD_16BIT, tensor)
    assert got[1].isnan().all()
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 3]], whole[[0, 3]])


def test_meanstd_loses_a_row_whose_squares_overflow():
    values = torch.tensor([[1e20, -1e20], [1.0, 2.0]])
    result = round_trip(CompressionType.MEANSTD_16BIT, values)
    assert result[0].isnan().all()
    assert torch.equal(result[1], values[1])


def test_meanstd_of_equal_values():
    data = codec(CompressionType.MEANSTD_16BIT).compress(torch.zeros(1, 2))
    assert data.hex() == "00000000" + "00000000" + "00000034"


@pytest.mark.parametrize("compression", [CompressionType.FLOAT16, CompressionType.MEANSTD_16BIT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_sixteen_bit_codecs_refuse_as_stock_does(compression, dtype):
    with pytest.raises(CompressionError, match=f"{compression.name} does not support {dtype} tensors"):
        codec(compression).compress(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("compression", EIGHT_BIT[:2])
def test_codebook_codecs_refuse_integers(compression):
    with pytest.raises(CompressionError, match=f"{compression.name} does not support torch.int8 tensors"):
        codec(compression).compress(torch.zeros(4, dtype=torch.int8))


def test_meanstd_refuses_scalars():
    with pytest.raises(CompressionError, match="MEANSTD_16BIT does not support scalars"):
        codec(CompressionType.MEANSTD_16BIT).compress(torch.tensor(1.0))


@pytest.mark.parametrize("compression", list(CompressionType))
def test_constant_and_single_values_come_back(compression):
    for tensor in (torch.full((3, 5), 0.5), torch.tensor([0.5]), torch.zeros(7)):
        assert torch.equal(round_trip(compression, tensor), tensor)


def test_uniform_puts_equal_values_where_stock_does():
    data = codec(CompressionType.UNIFORM_8BIT).compress(torch.zeros(5))
    assert data[-5:] == b"\xff" * 5
    steep = codec(CompressionType.UNIFORM_8BIT).compress(torch.tensor([1e-40, 0.0, 0.0]))
    assert steep[-3:] == bytes([255, 0, 0])


@pytest.mark.parametrize("count", [2, 7, 33, 10_007])
def test_uniform_rounds_as_torch_does(count):
    """Against torch's own quantizer, which is on its way out and therefore not what we call."""
    values = torch.cat([randn(count, seed=count), torch.arange(-8, 8) / 8.0])
    centered = values - values.mean()
    scale = 6 * (centered.norm() / math.sqrt(len(values) - 1)) / 256
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.quantize_per_tensor(centered, scale, 128, torch.quint8).int_repr()
    assert codec(CompressionType.UNIFORM_8BIT).compress(values)[-len(values) :] == expected.numpy().tobytes()


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (1, 100_000),
        (100_000, 100_000),
        (100_001, 100_001),
        (199_999, 199_999),
        (200_000, 100_000),
        (250_000, 125_000),
    ],
)
def test_quantile_chunks(count, size):
    assert _chunk_size(count) == size


def test_quantile_buckets_are_about_equal():
    tensor = randn(250_000)
    codes = codec(CompressionType.QUANTILE_8BIT).compress(tensor)[8 + 1024 :]
    counts = np.bincount(np.frombuffer(codes, np.uint8), minlength=256)
    assert 0.9 * len(tensor) / 256 < counts.min() <= counts.max() < 1.1 * len(tensor) / 256


@pytest.mark.parametrize("compression", list(CompressionType))
def test_wrong_lengths(compression):
    chosen = codec(compression)
    data = chosen.compress(randn(2, 8))
    for shape in ((2, 9), (1, 8), (2**31,), (0,)):
        with pytest.raises(RemoteError, match=f"buffer has {len(data)} bytes; {compression.name} needs"):
            chosen.decompress(data, shape, torch.float32)


@pytest.mark.parametrize("compression", list(CompressionType))
def test_result_can_be_written_to(compression):
    for shape in ((3, 4), (2, 0, 64), (1,)):
        chosen = codec(compression)
        data = chosen.compress(randn(*shape))
        kept = bytes(bytearray(data))
        chosen.decompress(data, shape, torch.float32).add_(1)
        assert data == kept
