"""BLOCKWISE_8BIT: one byte per value on a scale of its own for every 4096 values.

Source: the layout is hivemind 1.1.12's, ``compression/quantization.py``; codebook and rounding are those of
bitsandbytes 0.45.5 on a CPU, taken from its outputs, which this encoder equals bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
import torch

from kwaainet_bridge.compression.codec import (
    TILE,
    Buffer,
    Codec,
    CompressionType,
    elements,
    from_bytes,
    new_values,
    tiles,
    view_array,
    view_bytes,
)
from kwaainet_bridge.compression.lookup import NearestCode, cell_keys, look_up
from kwaainet_bridge.errors import RemoteError

BLOCK: Final = 4096
_CODES: Final = 256
_COUNTS_BYTES: Final = 16
_CODE_BYTES: Final = 4 * _CODES
_DEVICE_TILE: Final = 1 << 24


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


@cache
def _code_bytes() -> bytes:
    return bytes(view_bytes(codebook()))


@cache
def _nearest() -> NearestCode:
    return NearestCode(codebook())


@cache
def _pairs() -> torch.Tensor:
    """The two float32 values of two codes that follow each other, as one int64, by those codes as a uint16."""
    code = codebook()
    return torch.stack([code.repeat(_CODES), code.repeat_interleave(_CODES)], dim=1).view(torch.int64)[:, 0]


class Blockwise8(Codec):
    """``[int64 blocks][int64 256][float32 absmax * blocks][float32 codebook * 256][uint8 code * values]``.

    Tensors of any dtype, through float32, quantised on the device where they are. A block's values are divided
    by its largest magnitude and take the nearest code. A block of zeros has absmax 0 and decodes to zeros; a
    tensor with infinities or NaN is refused (bitsandbytes crashes on both). The decoder uses the codebook that
    came with the tensor.
    """

    compression = CompressionType.BLOCKWISE_8BIT

    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        values = tensor.detach().reshape(-1)
        blocks = _blocks(values.numel())
        absmax = torch.empty(blocks, dtype=torch.float32, device=values.device)
        codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
        if blocks:
            _quantise(values, absmax, codes)
        absmax = absmax.cpu()
        if blocks and not math.isfinite(absmax.max()):
            self.refuse("tensors with values that are not finite in float32")
        counts = blocks.to_bytes(8, "little") + _CODES.to_bytes(8, "little")
        return [counts, view_bytes(absmax), _code_bytes(), view_bytes(codes.cpu())]

    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require_length(buffer, shape, dtype)
        count = elements(shape)
        blocks = _blocks(count)
        announced_blocks = int.from_bytes(buffer[:8], "little", signed=True)
        announced_codes = int.from_bytes(buffer[8:_COUNTS_BYTES], "little", signed=True)
        if announced_blocks != blocks:
            raise RemoteError(f"buffer announces {announced_blocks} blocks, {count} values make {blocks}")
        if announced_codes != _CODES:
            raise RemoteError(f"buffer announces a codebook of {announced_codes} entries, not {_CODES}")
        absmax = from_bytes(buffer, _COUNTS_BYTES, blocks, torch.float32)
        codebook_at = _COUNTS_BYTES + 4 * blocks
        codes_at = codebook_at + _CODE_BYTES
        values = new_values(count, torch.float32)
        looked_up = 0
        if buffer[codebook_at:codes_at] == _code_bytes():  # nobody is known to send another
            looked_up = count // 2 * 2
            pairs = view_array(buffer, codes_at, count // 2, np.uint16)
            look_up(_pairs(), pairs, values[:looked_up].view(torch.int64))
        code = from_bytes(buffer, codebook_at, _CODES, torch.float32)
        look_up(
            code, view_array(buffer, codes_at + looked_up, count - looked_up, np.uint8), values[looked_up:]
        )
        whole = count // BLOCK
        values[: whole * BLOCK].view(-1, BLOCK).mul_(absmax[:whole, None])
        if whole < blocks:
            values[whole * BLOCK :].mul_(absmax[-1])
        return values.to(dtype).reshape(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:  # noqa: ARG002 - the same for all
        count = elements(shape)
        return _COUNTS_BYTES + 4 * _blocks(count) + _CODE_BYTES + count


def _quantise(values: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor) -> None:
    """Fill in the largest magnitude of each block and the code of each of the ``values``, all on one device."""
    device, count = values.device, values.numel()
    at_a_time = min(len(absmax), (TILE if device.type == "cpu" else _DEVICE_TILE) // BLOCK)
    table = _nearest().table(device)
    scaled = torch.empty((at_a_time, BLOCK), dtype=torch.float32, device=device)
    keys = torch.empty(at_a_time * BLOCK, dtype=torch.int32, device=device)
    entries = torch.empty_like(keys)
    for blocks in tiles(len(absmax), at_a_time):
        start, stop = blocks.start * BLOCK, min(blocks.stop * BLOCK, count)
        rows = blocks.stop - blocks.start
        part, largest, used = values[start:stop].to(torch.float32), absmax[blocks], rows * BLOCK
        if stop - start < used:
            part = torch.nn.functional.pad(part, (0, used - (stop - start)))
        part = part.view(rows, BLOCK)
        quotients = scaled[:rows]
        torch.amax(torch.abs(part, out=quotients), dim=1, out=largest)
        torch.div(part, largest.where(largest > 0, 1.0)[:, None], out=quotients)
        bits = quotients.view(-1).view(torch.int32)
        found = torch.index_select(table, 0, cell_keys(bits, keys[:used]), out=entries[:used])
        codes[start:stop] = found.add_(bits).bitwise_right_shift_(16).abs_()[: stop - start]


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
