"""The messages of averaging that carry tensors: parts to average, and a peer's state.

Source: hivemind 1.1.12, ``proto/averaging.proto``. Our ``averaging.proto`` states the same, and tests compare these
bytes with those that the protobuf library makes of it.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass, field
from typing import Final, Self

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
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
    total,
)
from kwaainet_bridge.wire.tensors import TensorMessage
from kwaainet_bridge.wire.varint import encode_uvarint

_FIXED64: Final = 1

_CODE: Final = 1 << 3 | VARINT
_GROUP_ID, _PART = (number << 3 | DELIMITED for number in (2, 4))
_WEIGHT: Final = 5 << 3 | _FIXED64
_DATA: Final[Known] = {_CODE: "code", _GROUP_ID: "group_id", _PART: "tensor_part", _WEIGHT: "weight"}

_METADATA, _STATE_PART = (number << 3 | DELIMITED for number in (1, 2))
_DOWNLOAD: Final[Known] = {_METADATA: "metadata", _STATE_PART: "tensor_part"}

_DOUBLE: Final = struct.Struct("<d")


class MessageCode(enum.IntEnum):
    """What a message of an averager says. Source of the numbers: hivemind 1.1.12, ``proto/averaging.proto``."""

    NO_CODE = 0
    REQUEST_JOIN = 1
    ACCEPTED = 2
    BEGIN_ALLREDUCE = 3
    PART_FOR_AVERAGING = 4
    AVERAGED_PART = 5
    NOT_DECLARED = 6
    NOT_A_LEADER = 7
    BAD_EXPIRATION_TIME = 8
    BAD_SCHEMA_HASH = 9
    BAD_GROUP_ID = 10
    DUPLICATE_PEER_ID = 11
    GROUP_IS_FULL = 12
    NOT_LOOKING_FOR_GROUP = 13
    PROTOCOL_VIOLATION = 14
    INTERNAL_ERROR = 15
    CANCELLED = 16
    GROUP_DISBANDED = 17
    BAD_GROUP_KEY = 18


def code_name(code: int) -> str:
    """A code as text, whoever sent it."""
    return MessageCode(code).name if code in MessageCode.__members__.values() else f"code {code}"


@dataclass(slots=True, kw_only=True)
class AveragingData(BytesMessage):
    """One part of a sender's tensors with its weight, or the average less that part, or a refusal by ``code``."""

    code: int = MessageCode.NO_CODE
    group_id: bytes = b""
    tensor_part: TensorMessage | None = None
    weight: float = 0.0

    def parts(self) -> list[Buffer]:
        weight = encode_uvarint(_WEIGHT) + _DOUBLE.pack(self.weight) if self.weight else b""
        head = number_field(_CODE, self.code) + bytes_field(_GROUP_ID, self.group_id)
        return [head, *_tensor_field(_PART, self.tensor_part), weight]

    @classmethod
    def read(cls, data: Buffer) -> Self:
        message = cls()
        for tag, value, content in read_fields(memoryview(data), _DATA):
            if tag == _CODE:
                message.code = value
            elif tag == _GROUP_ID:
                if len(content) > defaults.AVERAGING_GROUP_ID_BYTES:
                    raise RemoteError(
                        f"group_id has {len(content)} bytes, at most {defaults.AVERAGING_GROUP_ID_BYTES} "
                        f"are accepted"
                    )
                message.group_id = bytes(content)
            elif tag == _PART:
                message.tensor_part = _read_tensor(content)
            else:
                (weight,) = _DOUBLE.unpack(content)
                if not math.isfinite(weight) or weight < 0:
                    raise RemoteError(f"weight is {weight}")
                message.weight = weight
        return message


@dataclass(slots=True, kw_only=True)
class DownloadData(BytesMessage):
    """A piece of a peer's state: the first message has its metadata, a map in msgpack."""

    metadata: bytes = b""
    tensor_part: TensorMessage = field(default_factory=TensorMessage)

    def parts(self) -> list[Buffer]:
        return [bytes_field(_METADATA, self.metadata), *_tensor_field(_STATE_PART, self.tensor_part)]

    @classmethod
    def read(cls, data: Buffer) -> Self:
        message = cls()
        for tag, _, content in read_fields(memoryview(data), _DOWNLOAD):
            if tag == _METADATA:
                message.metadata = bytes(content)
            else:
                message.tensor_part = _read_tensor(content)
        return message


def _tensor_field(tag: int, tensor: TensorMessage | None) -> list[Buffer]:
    if tensor is None:
        return []
    parts = tensor.parts()
    return [field_header(tag, total(parts)), *parts]


def _read_tensor(content: memoryview) -> TensorMessage:
    try:
        return TensorMessage.read(content)
    except RemoteError as e:
        raise RemoteError(f"tensor_part: {e}") from e
