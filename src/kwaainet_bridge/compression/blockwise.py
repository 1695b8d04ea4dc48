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
from kwaainet_bridge.compression.lookup import NearestCode, look_up
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
        if values.device.type == "cpu":
            absmax, codes = _quantise(values)
        else:
            absmax, codes = (found.cpu().numpy() for found in _quantise_on_device(values))
        if blocks and not math.isfinite(absmax.max()):
            self.refuse("tensors with values that are not finite in float32")
        counts = blocks.to_bytes(8, "little") + _CODES.to_bytes(8, "little")
        return [counts, absmax.view(np.uint8).data, _code_bytes(), codes.data]

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
        absmax = view_array(buffer, _COUNTS_BYTES, blocks, np.float32)
        codebook_at = _COUNTS_BYTES + 4 * blocks
        codes_at = codebook_at + _CODE_BYTES
        values = new_values(count, torch.float32)
        codes = view_array(buffer, codes_at, count, np.uint8)
        code_bytes = bytes(buffer[codebook_at:codes_at])
        if code_bytes == _code_bytes() and not count % 2:  # nobody is known to send another codebook
            look_up(_pairs(), codes.view(np.uint16), values.view(torch.int64))
        else:
            look_up(from_bytes(code_bytes, 0, _CODES, torch.float32), codes, values)
        whole = count // BLOCK
        by_block = values[: whole * BLOCK].view(whole, BLOCK)
        by_block.mul_(torch.from_numpy(absmax[:whole, None].copy()))
        if whole < blocks:
            values.numpy()[whole * BLOCK :] *= absmax[whole]
        return values.to(dtype).view(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:  # noqa: ARG002 - the same for all
        count = elements(shape)
        return _COUNTS_BYTES + 4 * _blocks(count) + _CODE_BYTES + count


def _quantise(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitude of each block, float32, and the code of each of the ``values``, uint8.

    By numpy, whose calls cost a fraction of torch's: at 18 KB they are most of the work.
    """
    absmax, codes = np.empty(_blocks(len(values)), np.float32), np.empty(len(values), np.uint8)
    size = min(len(absmax) * BLOCK, TILE)
    scaled = np.empty(size, np.float32)
    keys, entries = np.empty(size, np.int32), np.empty(size, np.int32)
    for part in tiles(len(values)):
        floats = values[part].to(torch.float32).numpy()
        if len(floats) % BLOCK:
            padded = np.zeros(_blocks(len(floats)) * BLOCK, np.float32)
            padded[: len(floats)] = floats
            floats = padded
        if len(floats) < size:
            size = len(floats)
            scaled, keys, entries = scaled[:size], keys[:size], entries[:size]
        by_block, quotients = floats.reshape(-1, BLOCK), scaled.reshape(-1, BLOCK)
        largest = absmax[part.start // BLOCK :][: len(by_block)]
        np.maximum.reduce(np.abs(by_block, out=quotients), axis=1, out=largest)
        with np.errstate(invalid="ignore"):  # in a block of zeros: NaN, which finds zero's code
            np.divide(by_block, largest[:, None], out=quotients)
        _nearest().find(scaled, codes[part], keys, entries)
    return absmax, codes


def _quantise_on_device(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``_quantise`` where the tensor is, by torch."""
    device = values.device
    absmax = torch.empty(_blocks(len(values)), dtype=torch.float32, device=device)
    codes = torch.empty(len(values), dtype=torch.uint8, device=device)
    for part in tiles(len(values), _DEVICE_TILE):
        floats = values[part].to(torch.float32)
        by_block = torch.nn.functional.pad(floats, (0, -len(floats) % BLOCK)).view(-1, BLOCK)
        largest = torch.amax(by_block.abs(), dim=1)
        absmax[part.start // BLOCK :][: len(by_block)] = largest
        _nearest().find_on_device((by_block / largest[:, None]).view(-1), codes[part])
    return absmax, codes


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
