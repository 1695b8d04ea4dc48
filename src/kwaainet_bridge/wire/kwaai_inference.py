"""Requests and responses of ``/kwaai/inference/1.0.0``: one step of a session through the blocks of one server.

Unary calls in Hivemind's envelope, msgpack within (see kwaai_msgpack). The batch is 1. The holder of block 0 takes
token ids; the others take hidden states; the holder of the last block answers with logits of the last token.

Values travel as float16, little-endian. Those beyond its range, infinities too, become its largest (65504), so that
the next block gets no infinity that this end has made; NaN stays NaN. A float16 tensor goes as it is. What comes is
not looked at: it may hold infinities and NaN.

Source: KwaaiNet v0.6.2, ``kwaai-cli/src/block_rpc.rs``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

import numpy as np
import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType, codec
from kwaainet_bridge.compression.codec import host_values, view_array, view_bytes
from kwaainet_bridge.errors import CompressionError, RemoteError
from kwaainet_bridge.wire.fields import Buffer, BytesMessage
from kwaainet_bridge.wire.kwaai_msgpack import Cursor, check_unsigned, map_parts, required

PROTOCOL: Final = "/kwaai/inference/1.0.0"

WARMING_UP: Final = "node warming up — model loading in background"
"""The error of a KwaaiNet server whose model is not loaded yet, session 0."""

_ID_BYTES: Final = 4
_VALUE_BYTES: Final = 2


class PayloadType(enum.StrEnum):
    """What the data of a request are."""

    TOKEN_IDS = "token_ids"  # noqa: S105 - no password
    HIDDEN_STATES = "hidden_states"


class ResponseType(enum.StrEnum):
    """What the data of a response are."""

    HIDDEN_STATES = "hidden_states"
    LOGITS = "logits"


@dataclass(slots=True, kw_only=True)
class InferenceRequest(BytesMessage):
    """The next tokens of a session.

    ``seq_pos`` is the absolute position of the first of them; 0 begins the session. ``shape`` is ``(n,)`` for token
    ids, u32 little-endian in ``data``, and ``(1, n, hidden)`` for hidden states. Peers choose ``session_id``: keep
    sessions by the peer and that number. Raises ValueError for numbers that their fields cannot hold.
    """

    session_id: int
    seq_pos: int
    payload_type: PayloadType
    shape: tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        check_unsigned("session_id", self.session_id, 64)
        check_unsigned("seq_pos", self.seq_pos, 32)

    @classmethod
    def of_token_ids(cls, session_id: int, seq_pos: int, ids: Sequence[int]) -> Self:
        """A request with token ids. Raises ValueError for none and for those beyond 32 bits."""
        for token in ids:
            check_unsigned("a token id", token, 32)
        if not ids:
            raise ValueError("no token ids")
        return cls(
            session_id=session_id,
            seq_pos=seq_pos,
            payload_type=PayloadType.TOKEN_IDS,
            shape=(len(ids),),
            data=np.array(ids, "<u4").tobytes(),
        )

    @classmethod
    def of_hidden_states(cls, session_id: int, seq_pos: int, hidden: torch.Tensor) -> Self:
        """A request with hidden states ``[1, n, hidden]`` of any float dtype, layout and device.

        It may share the memory of a float16 tensor. Raises ValueError for another shape, CompressionError for
        another dtype.
        """
        return cls(
            session_id=session_id,
            seq_pos=seq_pos,
            payload_type=PayloadType.HIDDEN_STATES,
            shape=_own_shape(hidden),
            data=_halves(hidden),
        )

    @property
    def tokens(self) -> int:
        """How many tokens it is about."""
        return self.shape[-1] if self.payload_type == PayloadType.TOKEN_IDS else self.shape[1]

    def token_ids(self) -> torch.Tensor:
        """The ids of a request that carries them: int64 ``[n]``, new, each below 2**32."""
        if self.payload_type != PayloadType.TOKEN_IDS:
            raise ValueError(f"a request with {self.payload_type} has no token ids")
        ids = view_array(self.data, 0, self.shape[0], np.uint32)
        return torch.from_numpy(ids.astype(np.int64))

    def hidden_states(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The hidden states of a request that carries them: ``[1, n, hidden]``, new, on the CPU."""
        if self.payload_type != PayloadType.HIDDEN_STATES:
            raise ValueError(f"a request with {self.payload_type} has no hidden states")
        return _tensor(self.data, self.shape, dtype)

    def parts(self) -> list[Buffer]:
        return map_parts(
            {
                "session_id": self.session_id,
                "seq_pos": self.seq_pos,
                "payload_type": self.payload_type.value,
                "shape": self.shape,
                "data": self.data,
            }
        )

    @classmethod
    def read(cls, data: Buffer) -> Self:
        cursor = Cursor(data)
        found = cursor.entries(
            "the request",
            {
                "session_id": cursor.u64,
                "seq_pos": cursor.u32,
                "payload_type": partial(cursor.choice, among=PayloadType),
                "shape": cursor.shape,
                "data": cursor.octets,
            },
        )
        cursor.end()
        session_id, seq_pos, kind, shape, octets = required(
            found, "session_id", "seq_pos", "payload_type", "shape", "data"
        )
        if kind == PayloadType.TOKEN_IDS:
            _check(kind, shape, octets, rank=1, item_bytes=_ID_BYTES)
        else:
            _check(kind, shape, octets, rank=3, item_bytes=_VALUE_BYTES)
        request = cls(session_id=session_id, seq_pos=seq_pos, payload_type=kind, shape=shape, data=octets)
        if seq_pos + request.tokens > 1 << 32:
            raise RemoteError(f"seq_pos is {seq_pos}, too much for {request.tokens} tokens")
        return request


@dataclass(slots=True, kw_only=True)
class InferenceResponse(BytesMessage):
    """What the blocks made of a request: ``shape`` is ``(1, n, hidden)``, or ``(1, 1, vocabulary)`` for logits.

    With an ``error`` there is no data: the type says nothing, and shape and data are empty. KwaaiNet's servers
    answer session 0 then.
    """

    session_id: int
    response_type: ResponseType
    shape: tuple[int, ...] = ()
    data: Buffer = b""
    error: str | None = None

    def __post_init__(self) -> None:
        check_unsigned("session_id", self.session_id, 64)

    @classmethod
    def of_values(cls, session_id: int, response_type: ResponseType, values: torch.Tensor) -> Self:
        """A response with hidden states or logits; as InferenceRequest.of_hidden_states."""
        shape = _own_shape(values)
        if response_type == ResponseType.LOGITS and shape[1] != 1:
            raise ValueError(f"logits of shape {list(shape)}: those of the last token alone travel")
        return cls(session_id=session_id, response_type=response_type, shape=shape, data=_halves(values))

    @classmethod
    def of_error(cls, session_id: int, text: str) -> Self:
        """A response that says why there are no values."""
        return cls(session_id=session_id, response_type=ResponseType.HIDDEN_STATES, error=text)

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The hidden states or logits, new, on the CPU. Raises ValueError if there is an error instead."""
        if self.error is not None:
            raise ValueError(f"a response with an error has no values: {self.error}")
        return _tensor(self.data, self.shape, dtype)

    def parts(self) -> list[Buffer]:
        error = self.error
        if error is not None:  # lone surrogates, as in texts of exceptions, go escaped
            error = error[: defaults.MAX_ERROR_CHARACTERS].encode("utf-8", "backslashreplace").decode()
        return map_parts(
            {
                "session_id": self.session_id,
                "response_type": self.response_type.value,
                "shape": self.shape,
                "data": self.data,
                "error": error,
            }
        )

    @classmethod
    def read(cls, data: Buffer) -> Self:
        cursor = Cursor(data)
        found = cursor.entries(
            "the response",
            {
                "session_id": cursor.u64,
                "response_type": partial(cursor.choice, among=ResponseType),
                "shape": cursor.shape,
                "data": cursor.octets,
                "error": partial(cursor.optional, reader=cursor.beginning),
            },
        )
        cursor.end()
        session_id, kind, shape, octets = required(found, "session_id", "response_type", "shape", "data")
        error: str | None = found.get("error")
        if error is not None:
            return cls(session_id=session_id, response_type=kind, error=error)
        _check(kind, shape, octets, rank=3, item_bytes=_VALUE_BYTES)
        if kind == ResponseType.LOGITS and shape[1] != 1:
            raise RemoteError(f"shape {list(shape)} is that of logits of {shape[1]} tokens, not of one")
        return cls(session_id=session_id, response_type=kind, shape=shape, data=octets)


def _check(kind: str, shape: tuple[int, ...], data: Buffer, *, rank: int, item_bytes: int) -> None:
    """Raises RemoteError unless data of this kind can have this shape and fill it."""
    if len(shape) != rank:
        raise RemoteError(f"shape {list(shape)} has {len(shape)} dimensions; {kind} have {rank}")
    if rank == 3 and shape[0] != 1:
        raise RemoteError(f"shape {list(shape)} has a batch of {shape[0]}; {kind} have 1")
    if 0 in shape:
        raise RemoteError(f"shape {list(shape)} has no values")
    needed = math.prod(shape) * item_bytes
    if len(data) != needed:
        raise RemoteError(f"data has {len(data)} bytes; {kind} of shape {list(shape)} have {needed}")


def _own_shape(values: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(values.shape)
    if len(shape) != 3 or shape[0] != 1 or 0 in shape:
        raise ValueError(f"values of shape {list(shape)}, not [1, tokens, width]")
    return shape


def _halves(values: torch.Tensor) -> Buffer:
    if not values.dtype.is_floating_point:
        raise CompressionError(f"values of {values.dtype} do not travel as float16")
    if values.dtype == torch.float16:
        return view_bytes(host_values(values))
    if values.dtype == torch.bfloat16:
        values = values.to(torch.float32)
    (halves,) = codec(CompressionType.FLOAT16).parts(values)
    return halves


def _tensor(data: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return codec(CompressionType.FLOAT16).decompress(data, shape, dtype)
