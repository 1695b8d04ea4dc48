"""Tensors as messages, and messages too large for one frame in parts.

Source: hivemind 1.1.12, ``compression/base.py``, ``compression/serialization.py``, ``utils/streaming.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Self

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType, codec
from kwaainet_bridge.compression.encoded import DTYPES, NAMES, checked_shape
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire.fields import (
    DELIMITED,
    VARINT,
    Buffer,
    BytesMessage,
    Known,
    bytes_field,
    field_header,
    number_field,
    read_fields,
    read_varint,
    total,
)
from kwaainet_bridge.wire.varint import encode_uvarint

_BUFFER, _SIZE, _DTYPE = (number << 3 | DELIMITED for number in (1, 2, 4))
_DIMENSION, _REQUIRES_GRAD, _COMPRESSION, _CHUNKS = (number << 3 | VARINT for number in (2, 3, 5, 6))
_KNOWN: Final[Known] = {
    _BUFFER: "buffer",
    _DIMENSION: "size",
    _SIZE: "size",
    _REQUIRES_GRAD: "requires_grad",
    _DTYPE: "dtype",
    _COMPRESSION: "compression",
    _CHUNKS: "chunks",
}

_MAX_NAME_BYTES: Final = 64  # of a dtype; bad UTF-8 takes seconds where there are hundreds of megabytes


@dataclass(slots=True, kw_only=True)
class TensorMessage(BytesMessage):
    """A tensor, or a part of one, as it travels: ``values`` one after the other are its encoded values.

    Nothing that was read has been checked but its form: see decode_tensor.
    """

    values: list[Buffer] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    requires_grad: bool = False
    dtype: str = ""
    compression: int = CompressionType.NONE
    chunks: int = 0

    @property
    def buffer(self) -> Buffer:
        """The values in one piece; a copy if they are not."""
        return self.values[0] if len(self.values) == 1 else b"".join(self.values)

    def parts(self) -> list[Buffer]:
        length = total(self.values)
        size = b"".join(map(encode_uvarint, self.size))
        tail = (
            bytes_field(_SIZE, size)
            + number_field(_REQUIRES_GRAD, self.requires_grad)
            + bytes_field(_DTYPE, self.dtype.encode())
            + number_field(_COMPRESSION, self.compression)
            + number_field(_CHUNKS, self.chunks)
        )
        return [field_header(_BUFFER, length), *self.values, tail] if length else [tail]

    @classmethod
    def read(cls, data: Buffer) -> Self:
        message = cls()
        for tag, value, content in read_fields(memoryview(data), _KNOWN):
            if tag == _BUFFER:
                message.values = [content]
            elif tag in (_SIZE, _DIMENSION):
                _add_dimensions(message.size, content)
            elif tag == _REQUIRES_GRAD:
                message.requires_grad = value != 0
            elif tag == _DTYPE:
                if len(content) > _MAX_NAME_BYTES:
                    raise RemoteError(
                        f"dtype has {len(content)} bytes, at most {_MAX_NAME_BYTES} are accepted"
                    )
                message.dtype = str(content, "utf-8", "replace")
            elif tag == _COMPRESSION:
                message.compression = value
            else:
                message.chunks = value
        return message


def _add_dimensions(size: list[int], content: memoryview) -> None:
    at = 0
    while at < len(content):
        if len(size) == defaults.MAX_TENSOR_DIMENSIONS:
            raise RemoteError(
                f"size has more than the {defaults.MAX_TENSOR_DIMENSIONS} dimensions that are accepted"
            )
        dimension, at = (content[at], at + 1) if content[at] < 0x80 else read_varint(content, at, "size")
        size.append(dimension)


def encode_tensor(
    tensor: torch.Tensor, compression: int = CompressionType.NONE, *, legacy_bfloat16: bool = False
) -> TensorMessage:
    """A message that carries ``tensor``, of any shape, strides and device.

    It may share the tensor's memory: join its parts before that changes. bfloat16 values go as two bytes each,
    as between Petals peers. With ``legacy_bfloat16`` they go as float32, which Hivemind peers do by default
    (USE_LEGACY_BFLOAT16); both kinds of peers read both. Raises CompressionError if this compression cannot
    carry this tensor.
    """
    name = NAMES.get(tensor.dtype)
    if name is None:
        raise CompressionError(f"{tensor.dtype} tensors do not travel")
    widen = legacy_bfloat16 and compression == CompressionType.NONE and tensor.dtype == torch.bfloat16
    return TensorMessage(
        values=codec(compression).parts(tensor.to(torch.float32) if widen else tensor),
        size=list(tensor.shape),
        requires_grad=tensor.requires_grad,
        dtype=name,
        compression=compression,
    )


def decode_tensor(message: TensorMessage, *, name: str = "tensor") -> torch.Tensor:
    """The tensor that a message carries: new, contiguous, writable, on the CPU, sharing nothing with it.

    It requires grad if the sender's did. Raises RemoteError that begins with ``name`` and the field that is
    wrong; nothing is allocated before the length of the buffer was found to fit shape, dtype and compression.
    """
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise RemoteError(f"{name}: dtype {message.dtype!r:.40} does not travel")
    if message.requires_grad and not dtype.is_floating_point:
        raise RemoteError(f"{name}: requires_grad is set for {dtype}, which has no gradients")
    try:
        tensor = codec(message.compression).decompress(message.buffer, checked_shape(message.size), dtype)
    except (CompressionError, RemoteError) as e:
        raise RemoteError(f"{name}: {e}") from e
    return tensor.requires_grad_() if message.requires_grad else tensor


def split_tensor(
    message: TensorMessage, part_bytes: int = defaults.STREAM_PART_BYTES
) -> Iterator[TensorMessage]:
    """The same tensor in parts whose buffers have at most ``part_bytes``.

    The first part has all fields and in ``chunks`` the number of parts; the others have a buffer only. An
    empty tensor is one part with ``chunks`` 0.
    """
    if part_bytes < 1:
        raise ValueError(f"parts of {part_bytes} bytes")
    buffer = memoryview(message.buffer)
    starts = range(0, len(buffer), part_bytes)
    yield replace(message, values=[buffer[:part_bytes]], chunks=len(starts))
    for start in starts[1:]:
        yield TensorMessage(values=[buffer[start : start + part_bytes]])


class TensorJoiner:
    """Puts the parts of a stream of tensors together again.

    A part with a dtype begins a tensor. The tensor is whole when ``chunks`` parts have come; peers that leave
    ``chunks`` out end it with the next one's beginning or the end of the stream, which stock receivers go by
    alone. All parts together may have ``max_bytes``.
    """

    def __init__(self, max_bytes: int, *, max_tensors: int = defaults.MAX_JOINED_TENSORS) -> None:
        self._max_bytes = max_bytes
        self._max_tensors = max_tensors
        self._bytes = 0
        self._tensors = 0
        self._first: TensorMessage | None = None
        self._parts = 0
        self._buffer = bytearray()

    def feed(self, part: TensorMessage) -> list[TensorMessage]:
        """Take the next part; return the tensors that it completes, none to two of them.

        Raises RemoteError if it cannot be the next part or the stream has grown too long.
        """
        self._bytes += part.length()
        if self._bytes > self._max_bytes:
            raise RemoteError(f"tensor parts: more than {self._max_bytes} bytes")
        done: list[TensorMessage] = []
        if part.dtype:
            done += self.finish()
            self._begin(part)
        elif self._first is None:
            raise RemoteError("tensor part: dtype is empty, and no tensor has begun")
        else:
            if not self._buffer:
                self._buffer += self._first.buffer
            self._buffer += part.buffer
            self._parts += 1
        if self._first is not None and self._parts == self._first.chunks:
            done.append(self._take())
        return done

    def finish(self) -> list[TensorMessage]:
        """The stream of parts has ended: the tensor that its end completes, if there is one.

        Raises RemoteError if parts of it are missing.
        """
        if self._first is None:
            return []
        if self._first.chunks > 0:
            raise RemoteError(
                f"tensor parts: {self._parts} came, {self._first.chunks} were announced in chunks"
            )
        return [self._take()]

    def _begin(self, part: TensorMessage) -> None:
        self._tensors += 1
        if self._tensors > self._max_tensors:
            raise RemoteError(f"tensor parts: more than {self._max_tensors} tensors")
        self._first = part
        self._parts = 1

    def _take(self) -> TensorMessage:
        whole = self._first
        if whole is None:
            raise RuntimeError("no tensor has begun")
        self._first = None
        if self._parts > 1:
            whole = replace(whole, values=[memoryview(self._buffer)], chunks=0)
            self._buffer = bytearray()
        return whole
