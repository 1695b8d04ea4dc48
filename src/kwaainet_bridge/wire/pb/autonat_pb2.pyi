from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerInfo(_message.Message):
    __slots__ = ("id", "addrs")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    addrs: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, id: _Optional[bytes] = ..., addrs: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Dial(_message.Message):
    __slots__ = ("peer",)
    PEER_FIELD_NUMBER: _ClassVar[int]
    peer: PeerInfo
    def __init__(self, peer: _Optional[_Union[PeerInfo, _Mapping]] = ...) -> None: ...

class DialResponse(_message.Message):
    __slots__ = ("status", "status_text", "addr")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OK: _ClassVar[DialResponse.Status]
        E_DIAL_ERROR: _ClassVar[DialResponse.Status]
        E_DIAL_REFUSED: _ClassVar[DialResponse.Status]
        E_BAD_REQUEST: _ClassVar[DialResponse.Status]
        E_INTERNAL_ERROR: _ClassVar[DialResponse.Status]
    OK: DialResponse.Status
    E_DIAL_ERROR: DialResponse.Status
    E_DIAL_REFUSED: DialResponse.Status
    E_BAD_REQUEST: DialResponse.Status
    E_INTERNAL_ERROR: DialResponse.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STATUS_TEXT_FIELD_NUMBER: _ClassVar[int]
    ADDR_FIELD_NUMBER: _ClassVar[int]
    status: DialResponse.Status
    status_text: str
    addr: bytes
    def __init__(self, status: _Optional[_Union[DialResponse.Status, str]] = ..., status_text: _Optional[str] = ..., addr: _Optional[bytes] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("type", "dial", "dial_response")
    class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DIAL: _ClassVar[Message.Type]
        DIAL_RESPONSE: _ClassVar[Message.Type]
    DIAL: Message.Type
    DIAL_RESPONSE: Message.Type
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DIAL_FIELD_NUMBER: _ClassVar[int]
    DIAL_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    type: Message.Type
    dial: Dial
    dial_response: DialResponse
    def __init__(self, type: _Optional[_Union[Message.Type, str]] = ..., dial: _Optional[_Union[Dial, _Mapping]] = ..., dial_response: _Optional[_Union[DialResponse, _Mapping]] = ...) -> None: ...
