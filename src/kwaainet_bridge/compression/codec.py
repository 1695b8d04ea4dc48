"""What every codec is, and the few things they share."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import torch

from kwaainet_bridge.errors import CompressionError, RemoteError


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
    def compress(self, tensor: torch.Tensor) -> bytes:
        """The values of ``tensor``, of any shape, layout and device; it is not changed.

        Raises CompressionError if this codec cannot carry it.
        """

    @abc.abstractmethod
    def decompress(self, buffer: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous, writable CPU tensor of ``shape`` and ``dtype`` that shares nothing with ``buffer``.

        ``shape`` must have been checked by the caller; the buffer's length is checked here before anything is
        allocated. Raises RemoteError if the buffer does not fit.
        """

    def refuse(self, what: object) -> NoReturn:
        raise CompressionError(f"{self.compression.name} does not support {what}")

    def require_floats(self, dtype: torch.dtype) -> None:
        """For codecs whose stock encoders take floats only: no peer sends anything else."""
        if not dtype.is_floating_point:
            raise RemoteError(f"dtype {dtype} cannot come as {self.compression.name}")

    def require_length(self, buffer: bytes, expected: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        if len(buffer) != expected:
            raise RemoteError(
                f"buffer has {len(buffer)} bytes; {self.compression.name} needs {expected} "
                f"for {dtype} of shape {list(shape)}"
            )


def host_values(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory and off the autograd graph; itself if it is there already."""
    return tensor.detach().cpu()


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a CPU tensor in C order, whatever its strides."""
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.view(torch.int16)
    data: bytes = tensor.numpy().tobytes()
    return data


def from_bytes(buffer: bytes, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` values from ``offset`` on, as a new one-dimensional tensor.

    They are copied once: bytes are read-only, which a tensor cannot be, and offsets need not be aligned.
    """
    if count == 0:
        return torch.empty(0, dtype=dtype)
    end = offset + count * dtype.itemsize
    return torch.frombuffer(bytearray(memoryview(buffer)[offset:end]), dtype=dtype)


def elements(shape: Sequence[int]) -> int:
    return math.prod(shape)
