from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CallRequest(_message.Message):
    __slots__ = ("peer", "proto", "data")
    PEER_FIELD_NUMBER: _ClassVar[int]
    PROTO_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    proto: str
    data: bytes
    def __init__(self, peer: _Optional[bytes] = ..., proto: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class CallResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: bytes
    error: bytes
    def __init__(self, response: _Optional[bytes] = ..., error: _Optional[bytes] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("call_id", "call", "answer")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    call_id: bytes
    call: CallRequest
    answer: CallResponse
    def __init__(self, call_id: _Optional[bytes] = ..., call: _Optional[_Union[CallRequest, _Mapping]] = ..., answer: _Optional[_Union[CallResponse, _Mapping]] = ...) -> None: ...

class StreamError(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...
