"""KwaaiNet's quantised tensor as bytes: bincode 1.x with its default options.

``[u64 count][i8 data *][u64 count][float16 scale *][u64 count][u64 dimension *][u64 block_size]``, little-endian.
Source: KwaaiNet v0.6.2, and bytes made by the serialiser that it uses.
"""

from __future__ import annotations

import struct

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression.codec import Buffer, from_bytes, view_bytes
from kwaainet_bridge.compression.kwaai import QuantisedBlocks
from kwaainet_bridge.errors import RemoteError

_COUNT_BYTES = 8


def encode_quantised(quantised: QuantisedBlocks) -> bytes:
    """The bytes of a quantised tensor."""
    shape = quantised.shape
    return b"".join(
        [
            quantised.data.numel().to_bytes(_COUNT_BYTES, "little"),
            view_bytes(quantised.data),
            quantised.scales.numel().to_bytes(_COUNT_BYTES, "little"),
            view_bytes(quantised.scales),
            struct.pack(f"<Q{len(shape)}QQ", len(shape), *shape, quantised.block_size),
        ]
    )


def read_quantised(data: Buffer) -> QuantisedBlocks:
    """Read all of ``data`` as one quantised tensor.

    Raises RemoteError naming the field that does not fit into the bytes; what the fields say of each other is
    checked by ``dequantise_blocks``.
    """
    codes, at = _list(data, 0, "data", 1)
    scales, at = _list(data, at, "scales", 2)
    dimensions, at = _list(data, at, "shape", 8)
    if dimensions[1] > defaults.MAX_TENSOR_DIMENSIONS:
        raise RemoteError(
            f"quantised tensor: shape has {dimensions[1]} dimensions, "
            f"at most {defaults.MAX_TENSOR_DIMENSIONS} are accepted"
        )
    block_size, at = _number(data, at, "block_size")
    if at != len(data):
        raise RemoteError(f"quantised tensor: {len(data) - at} bytes behind block_size")
    return QuantisedBlocks(
        from_bytes(data, *codes, torch.int8),
        from_bytes(data, *scales, torch.float16),
        struct.unpack_from(f"<{dimensions[1]}Q", data, dimensions[0]),
        block_size,
    )


def _number(data: Buffer, at: int, field: str) -> tuple[int, int]:
    if len(data) - at < _COUNT_BYTES:
        raise RemoteError(f"quantised tensor: {field} ends early")
    return int.from_bytes(data[at : at + _COUNT_BYTES], "little"), at + _COUNT_BYTES


def _list(data: Buffer, at: int, field: str, item_bytes: int) -> tuple[tuple[int, int], int]:
    """Where a list's items begin and how many there are, and where it ends."""
    count, at = _number(data, at, field)
    end = at + count * item_bytes
    if end > len(data):
        raise RemoteError(f"quantised tensor: {field} announces {count} items in {len(data) - at} bytes")
    return (at, count), end
