from __future__ import annotations

import numpy as np
import pytest
import torch

from kwaainet_bridge.compression import codec
from kwaainet_bridge.compression.blockwise import _nearest, _quantise, _quantise_on_device, codebook
from kwaainet_bridge.compression.lookup import CELLS, Buckets


def float_of(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def by_search(values: torch.Tensor) -> torch.Tensor:
    code = codebook()
    below = (torch.bucketize(values, code, right=True) - 1).clamp_min(0)
    above = (below + 1).clamp_max(255)
    return below + ((values - code[above]).abs() < (values - code[below]).abs())


def find_by_numpy(values: torch.Tensor) -> torch.Tensor:
    out, scratch = np.empty(len(values), np.uint8), np.empty((2, len(values)), np.int32)
    _nearest().find(values.numpy(), out, *scratch)
    return torch.from_numpy(out)


def find_by_torch(values: torch.Tensor) -> torch.Tensor:
    """What is done on a GPU, here."""
    out = torch.empty(len(values), dtype=torch.uint8)
    _nearest().find_on_device(values, out)
    return out


@pytest.mark.parametrize("find", [find_by_numpy, find_by_torch])
def test_nearest_code_in_every_cell(find):
    """The rule is monotone, so a cell is right if its ends are and both sides of each of the 255 borders."""
    keys = torch.arange(CELLS)
    bits = (torch.where(keys < CELLS // 2, keys, keys - CELLS) << 16)[:, None] + torch.tensor(
        [0, 1, 0x7FFF, 0xFFFF]
    )
    code = codebook().double()
    middles = ((code[:-1] + code[1:]) / 2).float().view(torch.int32).to(torch.int64)
    bits = torch.cat([bits.reshape(-1), (middles[:, None] + torch.arange(-40, 41)).reshape(-1)])
    values = float_of(bits)
    values = values[values.abs() <= 1]
    found = find(values)
    assert torch.equal(found.int(), by_search(values).int())
    assert found.unique().tolist() == list(range(256))

    nans = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert find(nans).tolist() == [codebook().tolist().index(0.0)] * 4


def test_blockwise_codes_of_a_million_values():
    generator = torch.Generator().manual_seed(3)
    for power in (1, 3, 9):
        values = torch.randn(1 << 20, generator=generator) ** power
        blocks = values.view(-1, 4096)
        expected = by_search((blocks / blocks.abs().amax(1, keepdim=True)).reshape(-1)).to(torch.uint8)
        data = codec(5).compress(values)
        assert data[-len(values) :] == expected.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 4096, 4097, (1 << 18) + 5])
def test_blocks_are_quantised_alike_on_the_cpu_and_on_a_device(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values[: count // 3] = 0
    absmax, codes = _quantise_on_device(values)
    for ours, theirs in zip(_quantise(values), (absmax, codes), strict=True):
        assert ours.tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize(
    "borders",
    [
        torch.linspace(-3, 3, 255),
        torch.full((255,), 0.5),
        torch.zeros(255),
        -torch.zeros(255),
        torch.tensor([-1.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3e38]),
        torch.linspace(1, 1.0001, 255),
        torch.randn(255, generator=torch.Generator().manual_seed(1)).pow(7).sort()[0],
    ],
)
def test_buckets_count_as_bucketize_does(borders):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    bits = torch.cat([borders, -borders]).view(torch.int32)
    near = torch.cat([(bits + i).view(torch.float32) for i in (-1, 0, 1)])
    values = torch.cat([values, values**5, near[near.isfinite()], torch.tensor([0.0, -0.0, 3.4e38, -3.4e38])])
    assert torch.equal(Buckets(borders).count_below(values).long(), torch.bucketize(values, borders))
