import datetime

from esper_leyline.v1 import rules_pb2 as _rules_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EmergencyLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMERGENCY_LEVEL_UNSPECIFIED: _ClassVar[EmergencyLevel]
    EMERGENCY_LEVEL_NOTICE: _ClassVar[EmergencyLevel]
    EMERGENCY_LEVEL_ELEVATED: _ClassVar[EmergencyLevel]
    EMERGENCY_LEVEL_CONSERVATIVE: _ClassVar[EmergencyLevel]
    EMERGENCY_LEVEL_HALT: _ClassVar[EmergencyLevel]

class EmergencyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMERGENCY_MODE_UNSPECIFIED: _ClassVar[EmergencyMode]
    EMERGENCY_MODE_FREEZE: _ClassVar[EmergencyMode]
    EMERGENCY_MODE_CHECKPOINT: _ClassVar[EmergencyMode]
    EMERGENCY_MODE_KILL: _ClassVar[EmergencyMode]

class EmergencySource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMERGENCY_SOURCE_UNSPECIFIED: _ClassVar[EmergencySource]
    EMERGENCY_SOURCE_SPEC: _ClassVar[EmergencySource]
    EMERGENCY_SOURCE_BROADCAST: _ClassVar[EmergencySource]
    EMERGENCY_SOURCE_RUNTIME: _ClassVar[EmergencySource]
    EMERGENCY_SOURCE_BUDGET: _ClassVar[EmergencySource]

class AckStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACK_STAGE_UNSPECIFIED: _ClassVar[AckStage]
    ACK_STAGE_SEEN: _ClassVar[AckStage]
    ACK_STAGE_DONE: _ClassVar[AckStage]
EMERGENCY_LEVEL_UNSPECIFIED: EmergencyLevel
EMERGENCY_LEVEL_NOTICE: EmergencyLevel
EMERGENCY_LEVEL_ELEVATED: EmergencyLevel
EMERGENCY_LEVEL_CONSERVATIVE: EmergencyLevel
EMERGENCY_LEVEL_HALT: EmergencyLevel
EMERGENCY_MODE_UNSPECIFIED: EmergencyMode
EMERGENCY_MODE_FREEZE: EmergencyMode
EMERGENCY_MODE_CHECKPOINT: EmergencyMode
EMERGENCY_MODE_KILL: EmergencyMode
EMERGENCY_SOURCE_UNSPECIFIED: EmergencySource
EMERGENCY_SOURCE_SPEC: EmergencySource
EMERGENCY_SOURCE_BROADCAST: EmergencySource
EMERGENCY_SOURCE_RUNTIME: EmergencySource
EMERGENCY_SOURCE_BUDGET: EmergencySource
ACK_STAGE_UNSPECIFIED: AckStage
ACK_STAGE_SEEN: AckStage
ACK_STAGE_DONE: AckStage

class EmergencySignal(_message.Message):
    __slots__ = ("version", "level", "reason", "origin", "triggered_at", "run_uid", "signal_id", "mode", "attempt", "term", "seq", "clear", "source")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_AT_FIELD_NUMBER: _ClassVar[int]
    RUN_UID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CLEAR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    level: EmergencyLevel
    reason: str
    origin: str
    triggered_at: _timestamp_pb2.Timestamp
    run_uid: str
    signal_id: str
    mode: EmergencyMode
    attempt: int
    term: int
    seq: int
    clear: bool
    source: EmergencySource
    def __init__(self, version: _Optional[int] = ..., level: _Optional[_Union[EmergencyLevel, str]] = ..., reason: _Optional[str] = ..., origin: _Optional[str] = ..., triggered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., run_uid: _Optional[str] = ..., signal_id: _Optional[str] = ..., mode: _Optional[_Union[EmergencyMode, str]] = ..., attempt: _Optional[int] = ..., term: _Optional[int] = ..., seq: _Optional[int] = ..., clear: bool = ..., source: _Optional[_Union[EmergencySource, str]] = ...) -> None: ...

class EmergencyAck(_message.Message):
    __slots__ = ("version", "signal_id", "run_uid", "attempt", "rank", "participant", "stage", "step", "saved_step", "elapsed_ms", "time", "clear")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_UID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAVED_STEP_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CLEAR_FIELD_NUMBER: _ClassVar[int]
    version: int
    signal_id: str
    run_uid: str
    attempt: int
    rank: int
    participant: str
    stage: AckStage
    step: int
    saved_step: int
    elapsed_ms: float
    time: _timestamp_pb2.Timestamp
    clear: bool
    def __init__(self, version: _Optional[int] = ..., signal_id: _Optional[str] = ..., run_uid: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., participant: _Optional[str] = ..., stage: _Optional[_Union[AckStage, str]] = ..., step: _Optional[int] = ..., saved_step: _Optional[int] = ..., elapsed_ms: _Optional[float] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., clear: bool = ...) -> None: ...
