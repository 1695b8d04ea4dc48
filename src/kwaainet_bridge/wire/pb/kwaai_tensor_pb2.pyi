from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Compression]
    MEANSTD_16BIT: _ClassVar[Compression]
    FLOAT16: _ClassVar[Compression]
    QUANTILE_8BIT: _ClassVar[Compression]
    UNIFORM_8BIT: _ClassVar[Compression]
    BLOCKWISE_8BIT: _ClassVar[Compression]
    KWAAI_INT8: _ClassVar[Compression]
    KWAAI_TOP_K: _ClassVar[Compression]

class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OK: _ClassVar[Code]
    ACCEPTED: _ClassVar[Code]
    RECEIVED: _ClassVar[Code]
    REFUSED: _ClassVar[Code]
    UNSUPPORTED: _ClassVar[Code]
    TOO_LARGE: _ClassVar[Code]
    BUSY: _ClassVar[Code]
    INVALID: _ClassVar[Code]
    FAILED: _ClassVar[Code]
    PROTOCOL: _ClassVar[Code]
    TIMEOUT: _ClassVar[Code]
    STOPPING: _ClassVar[Code]
NONE: Compression
MEANSTD_16BIT: Compression
FLOAT16: Compression
QUANTILE_8BIT: Compression
UNIFORM_8BIT: Compression
BLOCKWISE_8BIT: Compression
KWAAI_INT8: Compression
KWAAI_TOP_K: Compression
OK: Code
ACCEPTED: Code
RECEIVED: Code
REFUSED: Code
UNSUPPORTED: Code
TOO_LARGE: Code
BUSY: Code
INVALID: Code
FAILED: Code
PROTOCOL: Code
TIMEOUT: Code
STOPPING: Code

class Offer(_message.Message):
    __slots__ = ("number", "name", "dtype", "shape", "compression", "bytes", "metadata", "data")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    compression: Compression
    bytes: int
    metadata: _containers.ScalarMap[str, str]
    data: bytes
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., compression: _Optional[_Union[Compression, str]] = ..., bytes: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("number", "offset", "data")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    number: int
    offset: int
    data: bytes
    def __init__(self, number: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("number", "code", "text", "bytes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    number: int
    code: Code
    text: str
    bytes: int
    def __init__(self, number: _Optional[int] = ..., code: _Optional[_Union[Code, str]] = ..., text: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("offer", "part", "ack")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    part: Part
    ack: Ack
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("text", "code")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    text: str
    code: Code
    def __init__(self, text: _Optional[str] = ..., code: _Optional[_Union[Code, str]] = ...) -> None: ...
