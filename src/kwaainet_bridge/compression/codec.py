"""What every codec is, and the few things they share."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, NoReturn, TypeAlias

import numpy as np
import torch

from kwaainet_bridge.errors import CompressionError, RemoteError

Buffer: TypeAlias = bytes | memoryview
"""Bytes to send or bytes received: one dimension, one byte per item."""

TILE: Final = 1 << 18
"""Values worked on at a time: what one step writes is still in the processor's cache for the next, and the calls
themselves, some 2 us each, do not count."""

_HUGE: Final = 1 << 22


class CompressionType(enum.IntEnum):
    """How a tensor's values become bytes. Source of the numbers: hivemind 1.1.12, ``proto/runtime.proto``."""

    NONE = 0
    MEANSTD_16BIT = 1
    FLOAT16 = 2
    QUANTILE_8BIT = 3
    UNIFORM_8BIT = 4
    BLOCKWISE_8BIT = 5


class Codec(abc.ABC):
    """One way to turn a tensor's values into bytes. All numbers are little-endian, all values in C order.

    Shape and dtype travel beside the bytes. A codec has no state and may be used from any thread.
    """

    compression: ClassVar[CompressionType]

    @abc.abstractmethod
    def parts(self, tensor: torch.Tensor) -> list[Buffer]:
        """The values of ``tensor``, of any shape, layout and device, as buffers to send one after the other.

        They may share memory with the tensor: send or join them before it changes. The tensor is not changed.
        Raises CompressionError if this codec cannot carry it.
        """

    def compress(self, tensor: torch.Tensor) -> bytes:
        """What ``parts`` gives, joined: a copy of its own."""
        return b"".join(self.parts(tensor))

    @abc.abstractmethod
    def decompress(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous, writable CPU tensor of ``shape`` and ``dtype`` that shares nothing with ``buffer``.

        ``shape`` must have been checked by the caller; the buffer's length is checked here before anything is
        allocated. Raises RemoteError if the buffer does not fit.
        """

    @abc.abstractmethod
    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The bytes that a tensor of ``shape`` and ``dtype`` becomes, by arithmetic alone."""

    def refuse(self, what: object) -> NoReturn:
        raise CompressionError(f"{self.compression.name} does not support {what}")

    def require_floats(self, dtype: torch.dtype) -> None:
        """For codecs whose stock encoders take floats only: no peer sends anything else."""
        if not dtype.is_floating_point:
            raise RemoteError(f"dtype {dtype} cannot come as {self.compression.name}")

    def require_length(self, buffer: Buffer, shape: Sequence[int], dtype: torch.dtype) -> None:
        expected = self.size(shape, dtype)
        if len(buffer) != expected:
            raise RemoteError(
                f"buffer has {len(buffer)} bytes; {self.compression.name} needs {expected} "
                f"for {dtype} of shape {list(shape)}"
            )


def host_values(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory and off the autograd graph; itself if it is there already."""
    return tensor.detach().cpu()


def new_values(count: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised one-dimensional CPU tensor.

    Large ones come from numpy, which asks the kernel for huge pages: at 64 MB the page faults of an ordinary
    allocation cost several times what writing the values does.
    """
    size = count * dtype.itemsize
    if size < _HUGE:
        return torch.empty(count, dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype)


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor in C order; its own memory if they lie so already."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.view(torch.int16)
    return memoryview(tensor.contiguous().numpy()).cast("B") if tensor.numel() else memoryview(b"")


def view_array(buffer: Buffer, offset: int, count: int, dtype: type[np.generic]) -> np.ndarray:
    """``count`` values from ``offset`` on where they lie, perhaps unaligned: to read from, not to write to."""
    return np.frombuffer(buffer, dtype, count, offset) if count else np.empty(0, dtype)


def from_bytes(buffer: Buffer, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` values from ``offset`` on, as a new one-dimensional tensor: copied once."""
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(view_array(buffer, offset, count * dtype.itemsize, np.uint8).copy()).view(dtype)


def tiles(count: int, tile: int = TILE) -> Iterator[slice]:
    """``range(count)`` in pieces of ``tile``, the last one shorter."""
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


def elements(shape: Sequence[int]) -> int:
    return math.prod(shape)
