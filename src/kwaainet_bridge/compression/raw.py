"""NONE: the values themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kwaainet_bridge.compression.codec import (
    Buffer,
    Codec,
    CompressionType,
    elements,
    from_bytes,
    host_values,
    view_bytes,
)


class Raw(Codec):
    """Any dtype, any value.

    bfloat16 comes in two forms, told apart by length: two bytes per value, or the four of a float32 from
    peers that still run with Hivemind's default setting USE_LEGACY_BFLOAT16=1 (hivemind 1.1.12,
    ``compression/base.py``). ``parts`` gives the values of the tensor that it is given.
    """

    compression = CompressionType.NONE

    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        return [view_bytes(host_values(tensor))]

    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = elements(shape)
        if dtype == torch.bfloat16 and count and len(buffer) == 4 * count:
            return from_bytes(buffer, 0, count, torch.float32).to(dtype).reshape(tuple(shape))
        self.require_length(buffer, shape, dtype)
        return from_bytes(buffer, 0, count, dtype).reshape(tuple(shape))

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        size: int = elements(shape) * dtype.itemsize
        return size
