"""The frames of ``/kwaai/tensor/1.0.0``: a length (u32, big-endian) and bincode 1.x with fixed-width integers."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sim_envelope import BrokenRules

DATA, ACK, REQUEST = 0, 1, 2
BLOCK = 64
MAX_FRAME = 64 * 1024 * 1024


@dataclass(frozen=True)
class QuantisedTensor:
    """``data`` int8, one float16 scale for each ``block_size`` values."""

    data: np.ndarray
    scales: np.ndarray
    shape: tuple[int, ...]
    block_size: int

    @classmethod
    def of(cls, values: np.ndarray, block_size: int = BLOCK) -> QuantisedTensor:
        """Quantise: the scale is absmax / 127 (1 for a block of zeros), values round half away from zero."""
        flat = values.astype(np.float32).ravel()
        data, scales = np.empty(flat.size, np.int8), []
        for start in range(0, flat.size, block_size):
            block = flat[start : start + block_size]
            largest = np.abs(block).max()
            scale = np.float32(1) if largest == 0 else np.float32(largest / np.float32(127))
            ratio = block / scale
            rounded = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))
            data[start : start + block_size] = np.clip(rounded, -127, 127)
            scales.append(scale)
        return cls(data, np.array(scales, "<f2"), values.shape, block_size)

    def values(self) -> np.ndarray:
        """float32 in the tensor's shape."""
        scales = np.repeat(self.scales.astype(np.float32), self.block_size)[: self.data.size]
        return (self.data.astype(np.float32) * scales).reshape(self.shape)

    def encode(self) -> bytes:
        return b"".join((
            _u64(self.data.size), self.data.tobytes(),
            _u64(self.scales.size), self.scales.astype("<f2").tobytes(),
            _list(self.shape), _u64(self.block_size),
        ))  # fmt: skip


@dataclass(frozen=True)
class TensorFrame:
    kind: int
    name: str
    tensor: QuantisedTensor | None
    shape: tuple[int, ...]
    metadata: str

    def encode(self) -> bytes:
        """With its length."""
        body = b"".join((
            struct.pack("<I", self.kind),
            _string(self.name),
            b"\0" if self.tensor is None else b"\1" + self.tensor.encode(),
            _list(self.shape),
            _string(self.metadata),
        ))  # fmt: skip
        return struct.pack(">I", len(body)) + body

    @classmethod
    def decode(cls, body: bytes) -> TensorFrame:
        """Without its length. BrokenRules for anything that is not exactly one frame."""
        cursor = _Cursor(body)
        kind = struct.unpack("<I", cursor.take(4))[0]
        if kind not in (DATA, ACK, REQUEST):
            raise BrokenRules(f"tensor message type {kind}")
        name = cursor.string()
        tag = cursor.take(1)
        if tag not in (b"\0", b"\1"):
            raise BrokenRules(f"option tag {tag.hex()}")
        frame = cls(kind, name, _tensor(cursor) if tag == b"\1" else None, cursor.sizes(), cursor.string())
        if cursor.left():
            raise BrokenRules(f"{cursor.left()} bytes after a tensor frame")
        return frame


def acknowledge(name: str) -> TensorFrame:
    """The reply to a frame."""
    return TensorFrame(ACK, name, None, (), "received")


def _tensor(cursor: _Cursor) -> QuantisedTensor:
    data = np.frombuffer(cursor.take(cursor.u64()), np.int8)
    scales = np.frombuffer(cursor.take(2 * cursor.u64()), "<f2")
    shape, block_size = cursor.sizes(), cursor.u64()
    if block_size == 0 or scales.size != -(-data.size // block_size) or math.prod(shape) != data.size:
        raise BrokenRules(
            f"{data.size} values, {scales.size} scales, shape {shape} and blocks of {block_size} do not fit"
        )
    if not np.isfinite(scales).all():
        raise BrokenRules("a scale that is not finite")
    return QuantisedTensor(data, scales, shape, block_size)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _list(values: Sequence[int]) -> bytes:
    return _u64(len(values)) + struct.pack(f"<{len(values)}Q", *values)


def _string(text: str) -> bytes:
    data = text.encode()
    return _u64(len(data)) + data


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise BrokenRules(f"{count} bytes where {self.left()} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def sizes(self) -> tuple[int, ...]:
        count = self.u64()
        return struct.unpack(f"<{count}Q", self.take(8 * count))

    def string(self) -> str:
        try:
            return self.take(self.u64()).decode()
        except UnicodeDecodeError as e:
            raise BrokenRules("text that is not UTF-8") from e
