from kwaainet_bridge.wire.pb import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MessageCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_CODE: _ClassVar[MessageCode]
    REQUEST_JOIN: _ClassVar[MessageCode]
    ACCEPTED: _ClassVar[MessageCode]
    BEGIN_ALLREDUCE: _ClassVar[MessageCode]
    PART_FOR_AVERAGING: _ClassVar[MessageCode]
    AVERAGED_PART: _ClassVar[MessageCode]
    NOT_DECLARED: _ClassVar[MessageCode]
    NOT_A_LEADER: _ClassVar[MessageCode]
    BAD_EXPIRATION_TIME: _ClassVar[MessageCode]
    BAD_SCHEMA_HASH: _ClassVar[MessageCode]
    BAD_GROUP_ID: _ClassVar[MessageCode]
    DUPLICATE_PEER_ID: _ClassVar[MessageCode]
    GROUP_IS_FULL: _ClassVar[MessageCode]
    NOT_LOOKING_FOR_GROUP: _ClassVar[MessageCode]
    PROTOCOL_VIOLATION: _ClassVar[MessageCode]
    INTERNAL_ERROR: _ClassVar[MessageCode]
    CANCELLED: _ClassVar[MessageCode]
    GROUP_DISBANDED: _ClassVar[MessageCode]
    BAD_GROUP_KEY: _ClassVar[MessageCode]
NO_CODE: MessageCode
REQUEST_JOIN: MessageCode
ACCEPTED: MessageCode
BEGIN_ALLREDUCE: MessageCode
PART_FOR_AVERAGING: MessageCode
AVERAGED_PART: MessageCode
NOT_DECLARED: MessageCode
NOT_A_LEADER: MessageCode
BAD_EXPIRATION_TIME: MessageCode
BAD_SCHEMA_HASH: MessageCode
BAD_GROUP_ID: MessageCode
DUPLICATE_PEER_ID: MessageCode
GROUP_IS_FULL: MessageCode
NOT_LOOKING_FOR_GROUP: MessageCode
PROTOCOL_VIOLATION: MessageCode
INTERNAL_ERROR: MessageCode
CANCELLED: MessageCode
GROUP_DISBANDED: MessageCode
BAD_GROUP_KEY: MessageCode

class JoinRequest(_message.Message):
    __slots__ = ("schema_hash", "expiration", "gather", "client_mode", "group_key")
    SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    EXPIRATION_FIELD_NUMBER: _ClassVar[int]
    GATHER_FIELD_NUMBER: _ClassVar[int]
    CLIENT_MODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_KEY_FIELD_NUMBER: _ClassVar[int]
    schema_hash: bytes
    expiration: float
    gather: bytes
    client_mode: bool
    group_key: str
    def __init__(self, schema_hash: _Optional[bytes] = ..., expiration: _Optional[float] = ..., gather: _Optional[bytes] = ..., client_mode: _Optional[bool] = ..., group_key: _Optional[str] = ...) -> None: ...

class MessageFromLeader(_message.Message):
    __slots__ = ("code", "group_id", "suggested_leader", "ordered_peer_ids", "gathered")
    CODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SUGGESTED_LEADER_FIELD_NUMBER: _ClassVar[int]
    ORDERED_PEER_IDS_FIELD_NUMBER: _ClassVar[int]
    GATHERED_FIELD_NUMBER: _ClassVar[int]
    code: MessageCode
    group_id: bytes
    suggested_leader: bytes
    ordered_peer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    gathered: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, code: _Optional[_Union[MessageCode, str]] = ..., group_id: _Optional[bytes] = ..., suggested_leader: _Optional[bytes] = ..., ordered_peer_ids: _Optional[_Iterable[bytes]] = ..., gathered: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AveragingData(_message.Message):
    __slots__ = ("code", "group_id", "peer_id", "tensor_part", "weight")
    CODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PART_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    code: MessageCode
    group_id: bytes
    peer_id: bytes
    tensor_part: _expert_pb2.Tensor
    weight: float
    def __init__(self, code: _Optional[_Union[MessageCode, str]] = ..., group_id: _Optional[bytes] = ..., peer_id: _Optional[bytes] = ..., tensor_part: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadData(_message.Message):
    __slots__ = ("metadata", "tensor_part")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PART_FIELD_NUMBER: _ClassVar[int]
    metadata: bytes
    tensor_part: _expert_pb2.Tensor
    def __init__(self, metadata: _Optional[bytes] = ..., tensor_part: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ...) -> None: ...
