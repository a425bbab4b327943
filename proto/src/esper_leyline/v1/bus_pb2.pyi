import datetime

from esper_leyline.v1 import common_pb2 as _common_pb2
from esper_leyline.v1 import rules_pb2 as _rules_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeadLetterReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEAD_LETTER_REASON_UNSPECIFIED: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_UNDECODABLE: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_OVERSIZED: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_UNKNOWN_TYPE: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_BAD_SIGNATURE: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_WRONG_VERSION: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_HANDLER_FAILED: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_HANDLER_TIMEOUT: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_INVALID: _ClassVar[DeadLetterReason]
    DEAD_LETTER_REASON_MISSING_PRIORITY: _ClassVar[DeadLetterReason]
DEAD_LETTER_REASON_UNSPECIFIED: DeadLetterReason
DEAD_LETTER_REASON_UNDECODABLE: DeadLetterReason
DEAD_LETTER_REASON_OVERSIZED: DeadLetterReason
DEAD_LETTER_REASON_UNKNOWN_TYPE: DeadLetterReason
DEAD_LETTER_REASON_BAD_SIGNATURE: DeadLetterReason
DEAD_LETTER_REASON_WRONG_VERSION: DeadLetterReason
DEAD_LETTER_REASON_HANDLER_FAILED: DeadLetterReason
DEAD_LETTER_REASON_HANDLER_TIMEOUT: DeadLetterReason
DEAD_LETTER_REASON_INVALID: DeadLetterReason
DEAD_LETTER_REASON_MISSING_PRIORITY: DeadLetterReason

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

class DeadLetter(_message.Message):
    __slots__ = ("envelope", "reason", "detail", "stream", "entry_id", "group", "delivery_attempts", "given_up_at", "consumer")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_AT_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    reason: DeadLetterReason
    detail: str
    stream: str
    entry_id: str
    group: str
    delivery_attempts: int
    given_up_at: _timestamp_pb2.Timestamp
    consumer: str
    def __init__(self, envelope: _Optional[bytes] = ..., reason: _Optional[_Union[DeadLetterReason, str]] = ..., detail: _Optional[str] = ..., stream: _Optional[str] = ..., entry_id: _Optional[str] = ..., group: _Optional[str] = ..., delivery_attempts: _Optional[int] = ..., given_up_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., consumer: _Optional[str] = ...) -> None: ...
