"""BLOCKWISE_8BIT: one byte per value on a scale of its own for every 4096 values.

Source: the layout is hivemind 1.1.12's, ``compression/quantization.py``; codebook and rounding are those of
bitsandbytes 0.45.5 on a CPU, taken from its outputs, which this encoder equals bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import torch

from kwaainet_bridge.compression.codec import (
    Codec,
    CompressionType,
    elements,
    from_bytes,
    host_values,
    to_bytes,
)
from kwaainet_bridge.errors import RemoteError

BLOCK: Final = 4096
_CODES: Final = 256
_ZERO_CODE: Final = 127
_COUNTS_BYTES: Final = 16


@cache
def codebook() -> torch.Tensor:
    """The 256 values between -1 and 1 that a byte stands for, ascending, float32. Do not change them.

    Seven decades, from 1e-6 up, where decade i has 2**i values of each sign, in the middle of equal steps;
    then zero and one. The lowest is moved to -1.
    """
    halves = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        halves.append((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6))
    positive = torch.cat(halves)
    values, _ = torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort()
    values[0] = -1.0
    return values


class Blockwise8(Codec):
    """``[int64 blocks][int64 256][float32 absmax * blocks][float32 codebook * 256][uint8 code * values]``.

    Tensors of any dtype, through float32. A block's values are divided by its largest magnitude and take the
    nearest code. A block of zeros has absmax 0 and decodes to zeros; a tensor with infinities or NaN is
    refused (bitsandbytes crashes on both). The decoder uses the codebook that came with the tensor.
    """

    compression = CompressionType.BLOCKWISE_8BIT

    def compress(self, tensor: torch.Tensor) -> bytes:
        values = host_values(tensor).to(torch.float32).reshape(-1)
        count = values.numel()
        blocks = _blocks(count)
        padded = (
            values
            if count == blocks * BLOCK
            else torch.nn.functional.pad(values, (0, blocks * BLOCK - count))
        )
        padded = padded.view(blocks, BLOCK)
        absmax = padded.abs().amax(dim=1)
        if not torch.isfinite(absmax).all():
            self.refuse("tensors with values that are not finite in float32")
        # 0 / 1 is 0, whose code is _ZERO_CODE
        scaled = (padded / absmax.where(absmax > 0, 1.0)[:, None]).view(-1)[:count]
        code = codebook()
        below = torch.bucketize(scaled, code, out_int32=True, right=True).sub_(1)
        above = (below + 1).clamp_max_(_CODES - 1)
        to_below = (scaled - code.index_select(0, below)).abs_()
        to_above = (scaled - code.index_select(0, above)).abs_()
        codes = below.add_(to_above < to_below).to(torch.uint8)
        counts = blocks.to_bytes(8, "little") + _CODES.to_bytes(8, "little")
        return counts + to_bytes(absmax) + to_bytes(code) + to_bytes(codes)

    def decompress(self, buffer: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = elements(shape)
        blocks = _blocks(count)
        codebook_at = _COUNTS_BYTES + 4 * blocks
        codes_at = codebook_at + 4 * _CODES
        self.require_length(buffer, codes_at + count, shape, dtype)
        announced_blocks = int.from_bytes(buffer[:8], "little", signed=True)
        announced_codes = int.from_bytes(buffer[8:_COUNTS_BYTES], "little", signed=True)
        if announced_blocks != blocks:
            raise RemoteError(f"buffer announces {announced_blocks} blocks, {count} values make {blocks}")
        if announced_codes != _CODES:
            raise RemoteError(f"buffer announces a codebook of {announced_codes} entries, not {_CODES}")
        absmax = from_bytes(buffer, _COUNTS_BYTES, blocks, torch.float32)
        code = from_bytes(buffer, codebook_at, _CODES, torch.float32)
        codes = from_bytes(buffer, codes_at, count, torch.uint8)
        values = code.index_select(0, codes.to(torch.int32))
        whole = count // BLOCK * BLOCK
        values[:whole].view(-1, BLOCK).mul_(absmax[: count // BLOCK, None])
        if whole < count:
            values[whole:].mul_(absmax[-1])
        return values.to(dtype).reshape(tuple(shape))


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
