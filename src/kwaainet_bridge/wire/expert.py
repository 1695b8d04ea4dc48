"""The requests and answers of expert calls.

Source: hivemind 1.1.12, ``proto/runtime.proto``. Our ``expert.proto`` states the same, and tests compare these bytes
with those that the protobuf library makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import (
    DELIMITED,
    Buffer,
    BytesMessage,
    Known,
    bytes_field,
    field_header,
    read_fields,
    total,
)
from kwaainet_bridge.wire.tensors import TensorMessage

_UID, _TENSORS, _METADATA = (number << 3 | DELIMITED for number in (1, 2, 3))
_RESPONSE: Final[Known] = {_TENSORS: "tensors", _METADATA: "metadata"}
_REQUEST: Final[Known] = _RESPONSE | {_UID: "uid"}


@dataclass(slots=True, kw_only=True)
class ExpertRequest(BytesMessage):
    """A call of the blocks that ``uid`` names: tensors or parts of them, and a map in msgpack."""

    uid: str = ""
    tensors: list[TensorMessage] = field(default_factory=list)
    metadata: bytes = b""

    def parts(self) -> list[Buffer]:
        return _parts(self.uid.encode(), self.tensors, self.metadata)

    @classmethod
    def read(cls, data: Buffer) -> Self:
        uid, tensors, metadata = _read(data, _REQUEST)
        if len(uid) > defaults.MAX_UID_BYTES:
            raise RemoteError(f"uid has {len(uid)} bytes, at most {defaults.MAX_UID_BYTES} are accepted")
        try:
            return cls(uid=str(uid, "utf-8"), tensors=tensors, metadata=bytes(metadata))
        except UnicodeDecodeError as e:
            raise RemoteError("uid is not UTF-8") from e


@dataclass(slots=True, kw_only=True)
class ExpertResponse(BytesMessage):
    """An answer. Its fields have the numbers of a request's, as which stock clients read streamed answers."""

    tensors: list[TensorMessage] = field(default_factory=list)
    metadata: bytes = b""

    def parts(self) -> list[Buffer]:
        return _parts(b"", self.tensors, self.metadata)

    @classmethod
    def read(cls, data: Buffer) -> Self:
        _, tensors, metadata = _read(data, _RESPONSE)
        return cls(tensors=tensors, metadata=bytes(metadata))


def _parts(uid: bytes, tensors: Sequence[TensorMessage], metadata: bytes) -> list[Buffer]:
    parts: list[Buffer] = [bytes_field(_UID, uid)]
    for tensor in tensors:
        own = tensor.parts()
        parts += [field_header(_TENSORS, total(own)), *own]
    parts.append(bytes_field(_METADATA, metadata))
    return parts


def _read(data: Buffer, known: Known) -> tuple[Buffer, list[TensorMessage], Buffer]:
    uid: Buffer = b""
    metadata: Buffer = b""
    tensors: list[TensorMessage] = []
    for tag, _, content in read_fields(memoryview(data), known):
        if tag == _UID:
            uid = content
        elif tag == _METADATA:
            metadata = content
        else:
            try:
                tensors.append(TensorMessage.read(content))
            except RemoteError as e:
                raise RemoteError(f"tensors: {e}") from e
    return uid, tensors, metadata
