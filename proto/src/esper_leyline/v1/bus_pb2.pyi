import datetime

from esper_leyline.v1 import common_pb2 as _common_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BusEnvelope(_message.Message):
    __slots__ = ("message_type", "payload", "priority", "signature", "key_id", "nonce", "issued_at", "delivery_attempt", "correlation_id", "run_uid")
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_UID_FIELD_NUMBER: _ClassVar[int]
    message_type: _common_pb2.BusMessageType
    payload: bytes
    priority: _common_pb2.MessagePriority
    signature: bytes
    key_id: str
    nonce: bytes
    issued_at: _timestamp_pb2.Timestamp
    delivery_attempt: int
    correlation_id: str
    run_uid: str
    def __init__(self, message_type: _Optional[_Union[_common_pb2.BusMessageType, str]] = ..., payload: _Optional[bytes] = ..., priority: _Optional[_Union[_common_pb2.MessagePriority, str]] = ..., signature: _Optional[bytes] = ..., key_id: _Optional[str] = ..., nonce: _Optional[bytes] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., delivery_attempt: _Optional[int] = ..., correlation_id: _Optional[str] = ..., run_uid: _Optional[str] = ...) -> None: ...
