"""Tensors as messages, and messages too large for one frame in parts.

Source: hivemind 1.1.12, ``compression/base.py``, ``compression/serialization.py``, ``utils/streaming.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType, codec
from kwaainet_bridge.compression.codec import Buffer
from kwaainet_bridge.compression.encoded import DTYPES, NAMES, checked_shape
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire.pb import expert_pb2

__all__ = ["DTYPES", "TensorJoiner", "decode_tensor", "encode_tensor", "split_tensor", "values_to_send"]


def encode_tensor(
    tensor: torch.Tensor, compression: int = CompressionType.NONE, *, legacy_bfloat16: bool = False
) -> expert_pb2.Tensor:
    """A message that carries ``tensor``, of any shape, strides and device.

    bfloat16 values go as two bytes each, as between Petals peers. With ``legacy_bfloat16`` they go as
    float32, which Hivemind peers do by default (USE_LEGACY_BFLOAT16); both kinds of peers read both. Raises
    CompressionError if this compression cannot carry this tensor.
    """
    name, parts = values_to_send(tensor, compression, legacy_bfloat16=legacy_bfloat16)
    return expert_pb2.Tensor(
        buffer=b"".join(parts),
        size=tensor.shape,
        requires_grad=tensor.requires_grad,
        dtype=name,
        compression=compression,  # type: ignore[arg-type]  # the stubs want their own enum's members
    )


def values_to_send(
    tensor: torch.Tensor, compression: int, *, legacy_bfloat16: bool
) -> tuple[str, list[Buffer]]:
    """The name of the dtype and the values, as buffers that may share the tensor's memory. See encode_tensor."""
    name = NAMES.get(tensor.dtype)
    if name is None:
        raise CompressionError(f"{tensor.dtype} tensors do not travel")
    widen = legacy_bfloat16 and compression == CompressionType.NONE and tensor.dtype == torch.bfloat16
    return name, codec(compression).parts(tensor.to(torch.float32) if widen else tensor)


def decode_tensor(message: expert_pb2.Tensor, *, name: str = "tensor") -> torch.Tensor:
    """The tensor that a message carries: new, contiguous, writable, on the CPU, sharing nothing with it.

    It requires grad if the sender's did. Raises RemoteError that begins with ``name`` and the field that is
    wrong; nothing is allocated before the length of the buffer was found to fit shape, dtype and compression.
    """
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise RemoteError(f"{name}: dtype {message.dtype!r:.40} does not travel")
    try:
        tensor = codec(message.compression).decompress(message.buffer, checked_shape(message.size), dtype)
    except (CompressionError, RemoteError) as e:
        raise RemoteError(f"{name}: {e}") from e
    if message.requires_grad:
        if not dtype.is_floating_point:
            raise RemoteError(f"{name}: requires_grad is set for {dtype}, which has no gradients")
        tensor.requires_grad_()
    return tensor


def split_tensor(
    message: expert_pb2.Tensor, part_bytes: int = defaults.STREAM_PART_BYTES
) -> Iterator[expert_pb2.Tensor]:
    """The same tensor in parts whose buffers have at most ``part_bytes``.

    The first part has all fields and in ``chunks`` the number of parts; the others have a buffer only. An
    empty tensor is one part with ``chunks`` 0.
    """
    if part_bytes < 1:
        raise ValueError(f"parts of {part_bytes} bytes")
    buffer = memoryview(message.buffer)
    starts = range(0, len(buffer), part_bytes)
    yield expert_pb2.Tensor(
        buffer=bytes(buffer[:part_bytes]),
        size=message.size,
        requires_grad=message.requires_grad,
        dtype=message.dtype,
        compression=message.compression,
        chunks=len(starts),
    )
    for start in starts[1:]:
        yield expert_pb2.Tensor(buffer=bytes(buffer[start : start + part_bytes]))


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
        self._first: expert_pb2.Tensor | None = None
        self._parts = 0
        self._buffer = bytearray()

    def feed(self, part: expert_pb2.Tensor) -> list[expert_pb2.Tensor]:
        """Take the next part; return the tensors that it completes, none to two of them.

        Raises RemoteError if it cannot be the next part or the stream has grown too long.
        """
        self._bytes += part.ByteSize()
        if self._bytes > self._max_bytes:
            raise RemoteError(f"tensor parts: more than {self._max_bytes} bytes")
        done: list[expert_pb2.Tensor] = []
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

    def finish(self) -> list[expert_pb2.Tensor]:
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

    def _begin(self, part: expert_pb2.Tensor) -> None:
        if part.chunks < 0:
            raise RemoteError(f"tensor part: chunks is {part.chunks}")
        self._tensors += 1
        if self._tensors > self._max_tensors:
            raise RemoteError(f"tensor parts: more than {self._max_tensors} tensors")
        self._first = part
        self._parts = 1

    def _take(self) -> expert_pb2.Tensor:
        whole = self._first
        if whole is None:
            raise RuntimeError("no tensor has begun")
        self._first = None
        if self._parts > 1:
            buffer, self._buffer = bytes(self._buffer), bytearray()
            whole = expert_pb2.Tensor(
                buffer=buffer,
                size=whole.size,
                requires_grad=whole.requires_grad,
                dtype=whole.dtype,
                compression=whole.compression,
            )
        return whole
