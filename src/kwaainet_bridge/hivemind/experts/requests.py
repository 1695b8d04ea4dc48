"""Reading what a client sends: metadata and tensors of an expert call.

Source: Petals main ``server/handler.py``, ``utils/packaging.py``; hivemind 1.1.12
``compression/serialization.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import Refusal, RemoteError
from kwaainet_bridge.rpc import ServerStream
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.fields import total
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import (
    TensorJoiner,
    TensorMessage,
    decode_tensor,
    encode_tensor,
    split_tensor,
)

_TENSOR_MARK = b"__T"
_MAX_ID_CHARACTERS = 128  # stock ids are UUIDs of 36; a server remembers hundreds
_MAX_BLOCKS = 1024  # far above any model; bounds what one entry of next_servers makes us write


@dataclass(frozen=True, slots=True)
class NextServer:
    """Where a step goes after this server: an entry of ``next_servers``."""

    peer: PeerId
    session_id: str
    blocks: range


class Metadata:
    """The msgpack map of a request, read key by key with the type that each key must have.

    Every accessor raises Refusal when the value's type is wrong; absent keys give the documented default.
    """

    def __init__(self, data: bytes) -> None:
        raw = msgpack.unpack(data) if data else {}
        if not isinstance(raw, dict):
            raise RemoteError(f"metadata: expected a map, got {type(raw).__name__}")
        self.raw: dict[str, Any] = raw

    def _get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise Refusal(f"metadata: {key} has type {type(value).__name__}", kind="ValueError")
        return value

    def check_common(self) -> None:
        """Refuse what no request may carry: points that are no number."""
        self._get("points", (int, float))

    def adapter(self, known: Collection[str]) -> str | None:
        """The adapter that the caller asks for. Refuses one that is not loaded."""
        adapter: str | None = self._get("active_adapter", str) or None
        if adapter is not None and adapter not in known:
            raise Refusal(f"adapter {adapter[:200]} not found", kind="KeyError")
        return adapter

    def _identifier(self, key: str) -> str | None:
        value: str | None = self._get(key, str)
        if value is not None and len(value) > _MAX_ID_CHARACTERS:
            raise Refusal(f"metadata: {key} has {len(value)} characters", kind="ValueError")
        return value

    @property
    def session_id(self) -> str | None:
        return self._identifier("session_id")

    @property
    def step_id(self) -> str | None:
        return self._identifier("step_id")

    @property
    def pushed(self) -> bool:
        """Whether another server sent this step. A client that says so of its own harms only itself."""
        return self.raw.get("pushed") is True

    @property
    def start_from_position(self) -> int | None:
        value: int | None = self._get("start_from_position", int)
        return value

    @property
    def max_length(self) -> int:
        value = self.raw.get("max_length")
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refusal(f"rpc_inference metadata must contain int max_length, got {value!r}")
        return value

    @property
    def alloc_timeout(self) -> float:
        """Seconds to wait for cache memory, 0 when absent; capped."""
        seconds = float(self._get("alloc_timeout", (int, float), 0.0))
        if math.isnan(seconds):
            raise Refusal("metadata: alloc_timeout is not a number", kind="ValueError")
        return min(max(seconds, 0.0), defaults.MAX_ALLOC_TIMEOUT_SECONDS)

    def output_compression(self, default: CompressionType, count: int) -> list[CompressionType]:
        """The compression of each of ``count`` tensors of the answer."""
        asked = self._get("output_compression", (list, tuple))
        if asked is None:
            return [default] * count
        if len(asked) != count:
            raise Refusal(
                f"output_compression: expected {count} entries, got {len(asked)}", kind="ValueError"
            )
        try:
            return [CompressionType(item) for item in asked]
        except ValueError as e:
            raise Refusal(f"output_compression: {e}", kind="ValueError") from e

    @property
    def next_servers(self) -> list[NextServer]:
        """The rest of the chain, nearest first; empty when the client does not want pushes."""
        servers = []
        for entry in self._get("next_servers", (list, tuple), ()):
            try:
                peer, session_id, start, end = entry
                if not isinstance(session_id, str):
                    raise RemoteError("next_servers: the session id is no text")
                if not 0 <= start < end <= _MAX_BLOCKS:
                    raise RemoteError(f"next_servers: {start}:{end} are no blocks of a model")
                servers.append(NextServer(PeerId.parse(peer), session_id, range(start, end)))
            except (TypeError, ValueError, AttributeError) as e:
                raise RemoteError(f"next_servers: an entry is not (peer, session, start, end): {e}") from e
        return servers

    def arrange(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Put the tensors in the order of the call's positional arguments.

        ``args_structure`` is ``(args, kwargs)`` in which ``b"__T<n>"`` stands for the n-th tensor; without it
        the tensors are the arguments. Leaves that are no tensor become None; kwargs are ignored.
        """
        structure = self._get("args_structure", (list, tuple))
        if structure is None:
            return list(tensors)
        if not structure or not isinstance(structure[0], list | tuple):
            raise RemoteError("args_structure: expected (args, kwargs)")
        return [_leaf(item, tensors) for item in structure[0]]


def _leaf(item: Any, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if not isinstance(item, bytes) or not item.startswith(_TENSOR_MARK):
        return None
    digits = item[len(_TENSOR_MARK) :]
    if not digits.isdigit() or len(digits) > 4 or int(digits) >= len(tensors):
        raise RemoteError(f"args_structure: {item[:20]!r} names none of the {len(tensors)} tensors")
    return tensors[int(digits)]


def is_dummy(tensor: torch.Tensor | None) -> bool:
    """Stock clients send a tensor of size [0] for an argument that is not given."""
    return tensor is None or (tensor.dim() == 1 and tensor.numel() == 0)


def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if is_dummy(tensor) else tensor


async def decode_tensors(messages: Sequence[TensorMessage]) -> list[torch.Tensor]:
    """Decode tensors, large ones off the event loop. Raises RemoteError naming the field."""

    def decode() -> list[torch.Tensor]:
        # the codec restores the sender's requires_grad; no peer makes this node record graphs
        return [t.detach() if t.requires_grad else t for t in map(decode_tensor, messages)]

    if sum(len(m.buffer) for m in messages) <= _inline_bytes(m.compression for m in messages):
        return decode()
    return await trio.to_thread.run_sync(decode)


async def encode_tensors(
    tensors: Sequence[torch.Tensor], compression: Sequence[CompressionType]
) -> list[TensorMessage]:
    """Encode tensors, large ones off the event loop.

    Raises Refusal for a compression that the dtype does not allow (FLOAT16 of bfloat16, say).
    """

    def encode() -> list[TensorMessage]:
        try:
            return [encode_tensor(t, c) for t, c in zip(tensors, compression, strict=True)]
        except ValueError as e:
            raise Refusal(str(e), kind="ValueError") from e

    if sum(t.nbytes for t in tensors) <= _inline_bytes(compression):
        return encode()
    return await trio.to_thread.run_sync(encode)


def count_bytes(counts: Counter[str], tensors: Iterable[TensorMessage]) -> None:
    """Add the bytes of tensors that were encoded, or could be decoded, by the name of their compression."""
    for tensor in tensors:
        counts[CompressionType(tensor.compression).name] += total(tensor.values)


def _inline_bytes(compression: Iterable[int]) -> int:
    """How much may be coded on the event loop: a copy is far quicker than a compression."""
    plain = all(c == CompressionType.NONE for c in compression)
    return defaults.INLINE_BYTES if plain else defaults.INLINE_COMPRESSED_BYTES


async def receive_rest(
    call: ServerStream[ExpertRequest, ExpertResponse], first: ExpertRequest, max_bytes: int
) -> list[TensorMessage]:
    """Read a streamed request to its end and return its joined tensors, those of ``first`` included.

    Raises Refusal when the uid changes on the way, RemoteError beyond ``max_bytes`` of tensor data.
    """
    joiner = TensorJoiner(max_bytes)
    tensors: list[TensorMessage] = []
    for part in first.tensors:
        tensors += joiner.feed(part)
    while True:
        try:
            request = await call.receive(hold=True)
        except trio.EndOfChannel:
            return tensors + joiner.finish()
        if request.uid != first.uid:
            raise Refusal("Block uids differ in one request", kind="ValueError")
        for part in request.tensors:
            tensors += joiner.feed(part)


async def send_split(
    call: ServerStream[ExpertRequest, ExpertResponse], tensors: Sequence[TensorMessage]
) -> None:
    """Stream tensors in parts of ``defaults.STREAM_PART_BYTES``, one part per message."""
    for tensor in tensors:
        for part in split_tensor(tensor, defaults.STREAM_PART_BYTES):
            await call.send(ExpertResponse(tensors=[part]))
