from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
RULE_FIELD_NUMBER: _ClassVar[int]
rule: _descriptor.FieldDescriptor
CONTRACT_FIELD_NUMBER: _ClassVar[int]
contract: _descriptor.FieldDescriptor

class FieldRule(_message.Message):
    __slots__ = ("unit", "max_bytes", "max_items", "required", "min", "max", "equals", "may_be_infinite")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    EQUALS_FIELD_NUMBER: _ClassVar[int]
    MAY_BE_INFINITE_FIELD_NUMBER: _ClassVar[int]
    unit: str
    max_bytes: int
    max_items: int
    required: bool
    min: float
    max: float
    equals: int
    may_be_infinite: bool
    def __init__(self, unit: _Optional[str] = ..., max_bytes: _Optional[int] = ..., max_items: _Optional[int] = ..., required: bool = ..., min: _Optional[float] = ..., max: _Optional[float] = ..., equals: _Optional[int] = ..., may_be_infinite: bool = ...) -> None: ...

class MessageRule(_message.Message):
    __slots__ = ("max_bytes",)
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_bytes: int
    def __init__(self, max_bytes: _Optional[int] = ...) -> None: ...
