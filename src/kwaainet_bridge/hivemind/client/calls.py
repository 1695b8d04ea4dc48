"""Requests to a Petals server and its answers, as stock clients write and read them.

Source: Petals main ``client/inference_session.py``, ``client/remote_forward_backward.py``,
``utils/packaging.py``; recorded messages of both releases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import InvalidRequest, Refusal, RemoteError
from kwaainet_bridge.hivemind.experts import trees
from kwaainet_bridge.hivemind.experts.methods import RPC_INFO
from kwaainet_bridge.hivemind.experts.requests import decode_tensors, encode_tensors
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.msgpack import TensorDescriptor
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertUID
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage

# in place of an argument that is not given
NO_TENSOR = torch.empty(0)
NO_INDICES = torch.empty(0, dtype=torch.int64)

_NO_BFLOAT16 = (CompressionType.FLOAT16, CompressionType.MEANSTD_16BIT)

# releases before 2.3 ignore start_from_position
_OLD_PETALS = re.compile(r"2\.[012]\.")


@dataclass(frozen=True, slots=True)
class ServerTraits:
    """What a client needs of a server's rpc_info.

    ``inference`` and ``training`` are the compressions it wants requests in. ``rolls_back`` tells whether it
    heeds ``start_from_position``. ``tree_tokens`` is how many tokens a tree step may have there, 0: it takes none.
    """

    version: str
    inference: CompressionType
    training: CompressionType
    tree_tokens: int = 0

    @property
    def rolls_back(self) -> bool:
        return _OLD_PETALS.match(self.version) is None


async def fetch_traits(rpc: RpcClient, peer: PeerId, uid: str) -> ServerTraits:
    """Ask ``peer``, which serves the block ``uid``, what it is. Raises NetworkError or RemoteError."""
    answer = await rpc.call(peer, RPC_INFO, ExpertUID(uid=uid), timeout=defaults.INFO_SECONDS)
    return parse_traits(answer.serialized_info)


def parse_traits(serialized_info: bytes) -> ServerTraits:
    """Read rpc_info's msgpack map. Raises RemoteError naming the key."""
    info = msgpack.unpack(serialized_info)
    if not isinstance(info, dict):
        raise RemoteError("rpc_info: the answer is no map")
    version = info.get("version")
    return ServerTraits(
        version=version if isinstance(version, str) else "",
        inference=_announced_compression(info, "inference_schema"),
        training=_announced_compression(info, "forward_schema"),
        tree_tokens=trees.announced(info),
    )


def _announced_compression(info: dict[Any, Any], key: str) -> CompressionType:
    """The compression of the first argument of a schema ``(args, kwargs)``: stock clients use it for all."""
    try:
        descriptor = info[key][0][0]
    except (KeyError, IndexError, TypeError) as e:
        raise RemoteError(f"rpc_info: {key} is missing or describes no argument") from e
    if not isinstance(descriptor, TensorDescriptor):
        raise RemoteError(f"rpc_info: {key} describes no tensor")
    try:
        return CompressionType(descriptor.compression)
    except ValueError as e:
        raise RemoteError(f"rpc_info: {key} wants the unknown compression {descriptor.compression!r}") from e


def args_structure(count: int) -> tuple[Any, ...]:
    """The metadata entry of a call with ``count`` positional tensors and no keyword arguments."""
    return tuple(b"__T%d" % index for index in range(count)), {}


async def encode_arguments(
    tensors: Sequence[torch.Tensor], compression: CompressionType
) -> list[TensorMessage]:
    """Encode a call's arguments the way the server announced; indices and absent ones as they are.

    bfloat16 goes as float32 under the two compressions that cannot hold it. Large tensors are encoded in a
    worker thread. Raises InvalidRequest for values that the compression cannot carry.
    """
    prepared, kinds = [], []
    for tensor in tensors:
        plain = not tensor.is_floating_point() or tensor.numel() == 0
        widen = not plain and tensor.dtype == torch.bfloat16 and compression in _NO_BFLOAT16
        kinds.append(CompressionType.NONE if plain else compression)
        prepared.append((tensor.float() if widen else tensor).detach().cpu().contiguous())
    try:
        return await encode_tensors(prepared, kinds)
    except Refusal as e:
        raise InvalidRequest(f"cannot send the tensors with compression {compression.name}: {e}") from e


async def decode_answer(
    messages: Sequence[TensorMessage], expected: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Decode an answer's tensors, of exactly the ``expected`` shapes, cast to ``dtype``.

    Raises RemoteError naming what is wrong: the number of tensors, a shape, a dtype, or what decode_tensor
    finds.
    """
    if len(messages) != len(expected):
        raise RemoteError(f"the answer holds {len(messages)} tensors, expected {len(expected)}")
    for message, shape in zip(messages, expected, strict=True):
        if list(message.size) != list(shape):
            raise RemoteError(f"the answer has shape {list(message.size)[:8]}, expected {list(shape)}")
    tensors = await decode_tensors(messages)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise RemoteError(f"the answer has dtype {tensor.dtype}, expected hidden states")
    return [tensor.detach().to(dtype) for tensor in tensors]


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
