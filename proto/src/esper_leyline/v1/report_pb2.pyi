import datetime

from esper_leyline.v1 import common_pb2 as _common_pb2
from esper_leyline.v1 import emergency_pb2 as _emergency_pb2
from esper_leyline.v1 import rules_pb2 as _rules_pb2
from esper_leyline.v1 import telemetry_pb2 as _telemetry_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RuntimePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUNTIME_PHASE_UNSPECIFIED: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_STARTING: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_RUNNING: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_ROLLING_BACK: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_RESTARTING: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_HALTING: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_FROZEN: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_HALTED: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_STOPPING: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_SUCCEEDED: _ClassVar[RuntimePhase]
    RUNTIME_PHASE_FAILED: _ClassVar[RuntimePhase]

class RecoveryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECOVERY_KIND_UNSPECIFIED: _ClassVar[RecoveryKind]
    RECOVERY_KIND_IN_PROCESS: _ClassVar[RecoveryKind]
    RECOVERY_KIND_IN_PLACE: _ClassVar[RecoveryKind]
    RECOVERY_KIND_POD_REPLACED: _ClassVar[RecoveryKind]
    RECOVERY_KIND_NEW_ATTEMPT: _ClassVar[RecoveryKind]
RUNTIME_PHASE_UNSPECIFIED: RuntimePhase
RUNTIME_PHASE_STARTING: RuntimePhase
RUNTIME_PHASE_RUNNING: RuntimePhase
RUNTIME_PHASE_ROLLING_BACK: RuntimePhase
RUNTIME_PHASE_RESTARTING: RuntimePhase
RUNTIME_PHASE_HALTING: RuntimePhase
RUNTIME_PHASE_FROZEN: RuntimePhase
RUNTIME_PHASE_HALTED: RuntimePhase
RUNTIME_PHASE_STOPPING: RuntimePhase
RUNTIME_PHASE_SUCCEEDED: RuntimePhase
RUNTIME_PHASE_FAILED: RuntimePhase
RECOVERY_KIND_UNSPECIFIED: RecoveryKind
RECOVERY_KIND_IN_PROCESS: RecoveryKind
RECOVERY_KIND_IN_PLACE: RecoveryKind
RECOVERY_KIND_POD_REPLACED: RecoveryKind
RECOVERY_KIND_NEW_ATTEMPT: RecoveryKind

class NamedMetric(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("epoch", "step", "total_steps", "loss", "metrics", "samples_per_second", "goodput", "total_epochs", "parameter_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    total_steps: int
    loss: float
    metrics: _containers.RepeatedCompositeFieldContainer[NamedMetric]
    samples_per_second: float
    goodput: float
    total_epochs: int
    parameter_count: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[NamedMetric, _Mapping]]] = ..., samples_per_second: _Optional[float] = ..., goodput: _Optional[float] = ..., total_epochs: _Optional[int] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("rollbacks", "in_place_restarts", "skipped_batches", "checkpoint_failures", "rejected_commands", "rejected_signals", "restores_without_checkpoint", "restores_failed_integrity", "restores_over_deadline", "restores_failed_apply")
    ROLLBACKS_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_BATCHES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FAILURES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_COMMANDS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_SIGNALS_FIELD_NUMBER: _ClassVar[int]
    RESTORES_WITHOUT_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FAILED_INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    RESTORES_OVER_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FAILED_APPLY_FIELD_NUMBER: _ClassVar[int]
    rollbacks: int
    in_place_restarts: int
    skipped_batches: int
    checkpoint_failures: int
    rejected_commands: int
    rejected_signals: int
    restores_without_checkpoint: int
    restores_failed_integrity: int
    restores_over_deadline: int
    restores_failed_apply: int
    def __init__(self, rollbacks: _Optional[int] = ..., in_place_restarts: _Optional[int] = ..., skipped_batches: _Optional[int] = ..., checkpoint_failures: _Optional[int] = ..., rejected_commands: _Optional[int] = ..., rejected_signals: _Optional[int] = ..., restores_without_checkpoint: _Optional[int] = ..., restores_failed_integrity: _Optional[int] = ..., restores_over_deadline: _Optional[int] = ..., restores_failed_apply: _Optional[int] = ...) -> None: ...

class CheckpointState(_message.Message):
    __slots__ = ("latest_step", "latest_verified_step", "best_step", "count", "total_bytes", "last_saved_time", "last_stall_ms", "last_error", "corrupt_files", "feasible")
    LATEST_STEP_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERIFIED_STEP_FIELD_NUMBER: _ClassVar[int]
    BEST_STEP_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_SAVED_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FILES_FIELD_NUMBER: _ClassVar[int]
    FEASIBLE_FIELD_NUMBER: _ClassVar[int]
    latest_step: int
    latest_verified_step: int
    best_step: int
    count: int
    total_bytes: int
    last_saved_time: _timestamp_pb2.Timestamp
    last_stall_ms: float
    last_error: str
    corrupt_files: _containers.RepeatedScalarFieldContainer[str]
    feasible: bool
    def __init__(self, latest_step: _Optional[int] = ..., latest_verified_step: _Optional[int] = ..., best_step: _Optional[int] = ..., count: _Optional[int] = ..., total_bytes: _Optional[int] = ..., last_saved_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_stall_ms: _Optional[float] = ..., last_error: _Optional[str] = ..., corrupt_files: _Optional[_Iterable[str]] = ..., feasible: bool = ...) -> None: ...

class Transition(_message.Message):
    __slots__ = ("from_phase", "to_phase", "reason", "message", "step", "time")
    FROM_PHASE_FIELD_NUMBER: _ClassVar[int]
    TO_PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    from_phase: RuntimePhase
    to_phase: RuntimePhase
    reason: str
    message: str
    step: int
    time: _timestamp_pb2.Timestamp
    def __init__(self, from_phase: _Optional[_Union[RuntimePhase, str]] = ..., to_phase: _Optional[_Union[RuntimePhase, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Recovery(_message.Message):
    __slots__ = ("kind", "cause", "from_step", "to_step", "detected_time", "completed_time", "detect_ms", "recover_ms", "verified", "tier")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    TO_STEP_FIELD_NUMBER: _ClassVar[int]
    DETECTED_TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_TIME_FIELD_NUMBER: _ClassVar[int]
    DETECT_MS_FIELD_NUMBER: _ClassVar[int]
    RECOVER_MS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    kind: RecoveryKind
    cause: str
    from_step: int
    to_step: int
    detected_time: _timestamp_pb2.Timestamp
    completed_time: _timestamp_pb2.Timestamp
    detect_ms: float
    recover_ms: float
    verified: bool
    tier: _common_pb2.RollbackTier
    def __init__(self, kind: _Optional[_Union[RecoveryKind, str]] = ..., cause: _Optional[str] = ..., from_step: _Optional[int] = ..., to_step: _Optional[int] = ..., detected_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., completed_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., detect_ms: _Optional[float] = ..., recover_ms: _Optional[float] = ..., verified: bool = ..., tier: _Optional[_Union[_common_pb2.RollbackTier, str]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason", "message", "exit_code", "container", "step", "time")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    exit_code: int
    container: str
    step: int
    time: _timestamp_pb2.Timestamp
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., exit_code: _Optional[int] = ..., container: _Optional[str] = ..., step: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Degradation(_message.Message):
    __slots__ = ("component", "degraded", "reason", "message")
    COMPONENT_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    component: str
    degraded: bool
    reason: str
    message: str
    def __init__(self, component: _Optional[str] = ..., degraded: bool = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class RuntimeEvent(_message.Message):
    __slots__ = ("writer", "monotonic_ns", "time", "boot", "transition", "recovery", "checkpoint", "epoch", "ack", "failure", "degradation", "completion", "notice", "counters", "name", "level", "incident")
    WRITER_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DEGRADATION_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    writer: str
    monotonic_ns: int
    time: _timestamp_pb2.Timestamp
    boot: Boot
    transition: Transition
    recovery: Recovery
    checkpoint: CheckpointState
    epoch: Progress
    ack: _emergency_pb2.EmergencyAck
    failure: Failure
    degradation: Degradation
    completion: Completion
    notice: Notice
    counters: Counters
    name: str
    level: _telemetry_pb2.TelemetryLevel
    incident: str
    def __init__(self, writer: _Optional[str] = ..., monotonic_ns: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., boot: _Optional[_Union[Boot, _Mapping]] = ..., transition: _Optional[_Union[Transition, _Mapping]] = ..., recovery: _Optional[_Union[Recovery, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointState, _Mapping]] = ..., epoch: _Optional[_Union[Progress, _Mapping]] = ..., ack: _Optional[_Union[_emergency_pb2.EmergencyAck, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., degradation: _Optional[_Union[Degradation, _Mapping]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., name: _Optional[str] = ..., level: _Optional[_Union[_telemetry_pb2.TelemetryLevel, str]] = ..., incident: _Optional[str] = ...) -> None: ...

class Boot(_message.Message):
    __slots__ = ("attempt", "rank", "incarnation", "world_size")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    rank: int
    incarnation: int
    world_size: int
    def __init__(self, attempt: _Optional[int] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., world_size: _Optional[int] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("export_path", "best_step", "metrics")
    EXPORT_PATH_FIELD_NUMBER: _ClassVar[int]
    BEST_STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    export_path: str
    best_step: int
    metrics: _containers.RepeatedCompositeFieldContainer[NamedMetric]
    def __init__(self, export_path: _Optional[str] = ..., best_step: _Optional[int] = ..., metrics: _Optional[_Iterable[_Union[NamedMetric, _Mapping]]] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("reason", "message", "warning")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    warning: bool
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., warning: bool = ...) -> None: ...

class RunReport(_message.Message):
    __slots__ = ("version", "run_uid", "run", "attempt", "rank", "seq", "time", "pod_name", "node_name", "phase", "progress", "counters", "checkpoint", "heartbeat_age_ms", "degradations", "previous_event_seq", "incident", "transition", "recovery", "ack", "failure", "completion", "notice", "saved")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_UID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    POD_NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    DEGRADATIONS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_EVENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_uid: str
    run: str
    attempt: int
    rank: int
    seq: int
    time: _timestamp_pb2.Timestamp
    pod_name: str
    node_name: str
    phase: RuntimePhase
    progress: Progress
    counters: Counters
    checkpoint: CheckpointState
    heartbeat_age_ms: float
    degradations: _containers.RepeatedCompositeFieldContainer[Degradation]
    previous_event_seq: int
    incident: str
    transition: Transition
    recovery: Recovery
    ack: _emergency_pb2.EmergencyAck
    failure: Failure
    completion: Completion
    notice: Notice
    saved: CheckpointState
    def __init__(self, version: _Optional[int] = ..., run_uid: _Optional[str] = ..., run: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., seq: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pod_name: _Optional[str] = ..., node_name: _Optional[str] = ..., phase: _Optional[_Union[RuntimePhase, str]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointState, _Mapping]] = ..., heartbeat_age_ms: _Optional[float] = ..., degradations: _Optional[_Iterable[_Union[Degradation, _Mapping]]] = ..., previous_event_seq: _Optional[int] = ..., incident: _Optional[str] = ..., transition: _Optional[_Union[Transition, _Mapping]] = ..., recovery: _Optional[_Union[Recovery, _Mapping]] = ..., ack: _Optional[_Union[_emergency_pb2.EmergencyAck, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., saved: _Optional[_Union[CheckpointState, _Mapping]] = ...) -> None: ...

class ReportBatch(_message.Message):
    __slots__ = ("envelopes", "last_seq", "first_seq")
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    envelopes: _containers.RepeatedScalarFieldContainer[bytes]
    last_seq: int
    first_seq: int
    def __init__(self, envelopes: _Optional[_Iterable[bytes]] = ..., last_seq: _Optional[int] = ..., first_seq: _Optional[int] = ...) -> None: ...
