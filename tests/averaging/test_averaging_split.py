"""The split that all members compute alone: equal to stock peers', part by part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.averaging.split import part_elements, partition, share_elements

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind.json").read_text())["averaging"]
BALANCE = json.loads((Path(__file__).parents[1] / "vectors" / "hivemind-balance.json").read_text())
STOCK_NAMES = {"NoCompression": CompressionType.NONE, "Float16Compression": CompressionType.FLOAT16}


@pytest.mark.parametrize("vector", GOLDEN["partition"])
def test_parts_are_those_of_stock_peers(vector: dict) -> None:
    tensors = [torch.zeros(shape) for shape in vector["shapes"]]
    compression = STOCK_NAMES[vector["compression"]]
    parts = partition(tensors, vector["fractions"], compression, vector["part_size_bytes"])
    assert [[part.length for part in member] for member in parts] == vector["parts_by_peer"]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
    st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
    st.integers(4, 64),
)
def test_every_element_belongs_to_one_member(sizes: list[int], weights: list[int], part_bytes: int) -> None:
    tensors = [torch.zeros(size) for size in sizes]
    parts = [part for member in partition(tensors, weights, part_bytes=part_bytes) for part in member]
    assert sorted((p.tensor, p.start) for p in parts) == [(p.tensor, p.start) for p in parts]
    for number, size in enumerate(sizes):
        assert sum(part.length for part in parts if part.tensor == number) == size
    assert all(part.length * 4 <= part_bytes for part in parts)


def test_unspecified_bandwidths_share_alike() -> None:
    assert share_elements(1000, [None, None, None]) == (334, 333, 333)
    assert share_elements(1000, [None, 0.0, None]) == (500, 0, 500)
    assert share_elements(5, [0, None]) == (0, 5)


@pytest.mark.parametrize("vector", BALANCE, ids=lambda vector: str(vector["bandwidths"])[:60])
def test_given_bandwidths_are_balanced_as_stock_peers_do_it(vector: dict) -> None:
    """Made by ``load_balance_peers`` of hivemind 1.1.12; some have no solution.

    Shares of millions differ by one element between processors with AVX2 and with AVX-512, for stock peers as well:
    the program is solved with the kernels of the linear algebra that the processor has.
    """
    shares = list(share_elements(vector["total"], vector["bandwidths"]))
    assert sum(shares) == sum(vector["shares"])
    assert shares == pytest.approx(vector["shares"], rel=0, abs=vector["total"] * 1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1e150, allow_subnormal=False), min_size=2, max_size=6).filter(any))
def test_any_bandwidths_share_all_elements(bandwidths: list[float | None]) -> None:
    shares = share_elements(1000, bandwidths)
    assert sum(shares) == 1000
    assert min(shares) >= 0


def test_bandwidths_beyond_computing_are_the_peers_mistake() -> None:
    with pytest.raises(RemoteError, match="bandwidths"):
        share_elements(1000, [5e-324, None])


def test_a_group_in_which_nobody_averages_is_refused() -> None:
    with pytest.raises(RemoteError, match="nobody in the group averages"):
        share_elements(1000, [0.0, 0])


@pytest.mark.parametrize(
    ("dtype", "compression", "elements"),
    [
        (torch.float32, CompressionType.NONE, 131072),
        (torch.float32, CompressionType.FLOAT16, 262144),
        (torch.float32, CompressionType.MEANSTD_16BIT, 262144),
        (torch.float32, CompressionType.BLOCKWISE_8BIT, 524288),
        (torch.float16, CompressionType.FLOAT16, 262144),
        (torch.float64, CompressionType.NONE, 65536),
    ],
)
def test_parts_are_as_long_as_stock_peers_make_them(
    dtype: torch.dtype, compression: CompressionType, elements: int
) -> None:
    assert part_elements(dtype, compression, 1 << 19) == elements


@pytest.mark.parametrize("none", [-1.0, float("nan")])
def test_what_is_no_bandwidth_averages_nothing_unless_others_are_given(none: float) -> None:
    """As with stock peers: the first group averages, the second fails at every member."""
    assert share_elements(1000, [None, none, None]) == (500, 0, 500)
    with pytest.raises(RemoteError, match="at least 0"):
        share_elements(1000, [None, none, 10.0])
    with pytest.raises(RemoteError, match="nobody in the group averages"):
        share_elements(1000, [none, 0])
