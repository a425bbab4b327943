import datetime

from esper_leyline.v1 import rules_pb2 as _rules_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FieldReportOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIELD_REPORT_OUTCOME_UNSPECIFIED: _ClassVar[FieldReportOutcome]
    FIELD_REPORT_OUTCOME_SUCCESS: _ClassVar[FieldReportOutcome]
    FIELD_REPORT_OUTCOME_NEUTRAL: _ClassVar[FieldReportOutcome]
    FIELD_REPORT_OUTCOME_REGRESSION: _ClassVar[FieldReportOutcome]
    FIELD_REPORT_OUTCOME_ABORTED: _ClassVar[FieldReportOutcome]

class MitigationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MITIGATION_KIND_UNSPECIFIED: _ClassVar[MitigationKind]
    MITIGATION_KIND_CONSERVATIVE_MODE: _ClassVar[MitigationKind]
    MITIGATION_KIND_ROLLBACK_REQUEST: _ClassVar[MitigationKind]
    MITIGATION_KIND_SEED_CULL: _ClassVar[MitigationKind]
    MITIGATION_KIND_BREAKER_OPEN: _ClassVar[MitigationKind]

class MetricId(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METRIC_ID_UNSPECIFIED: _ClassVar[MetricId]
    METRIC_ID_LOSS_EWMA: _ClassVar[MetricId]
    METRIC_ID_LOSS_VOLATILITY: _ClassVar[MetricId]
    METRIC_ID_GRADIENT_NORM_EWMA: _ClassVar[MetricId]
    METRIC_ID_GRADIENT_CONFLICT_RATE: _ClassVar[MetricId]
    METRIC_ID_OPTIMIZER_LR: _ClassVar[MetricId]
    METRIC_ID_STEP_LATENCY_MS: _ClassVar[MetricId]
    METRIC_ID_SAMPLES_PER_SECOND: _ClassVar[MetricId]
    METRIC_ID_INPUT_WAIT_MS: _ClassVar[MetricId]
    METRIC_ID_FEATURE_COVERAGE: _ClassVar[MetricId]
    METRIC_ID_SEEDS_ACTIVE: _ClassVar[MetricId]
FIELD_REPORT_OUTCOME_UNSPECIFIED: FieldReportOutcome
FIELD_REPORT_OUTCOME_SUCCESS: FieldReportOutcome
FIELD_REPORT_OUTCOME_NEUTRAL: FieldReportOutcome
FIELD_REPORT_OUTCOME_REGRESSION: FieldReportOutcome
FIELD_REPORT_OUTCOME_ABORTED: FieldReportOutcome
MITIGATION_KIND_UNSPECIFIED: MitigationKind
MITIGATION_KIND_CONSERVATIVE_MODE: MitigationKind
MITIGATION_KIND_ROLLBACK_REQUEST: MitigationKind
MITIGATION_KIND_SEED_CULL: MitigationKind
MITIGATION_KIND_BREAKER_OPEN: MitigationKind
METRIC_ID_UNSPECIFIED: MetricId
METRIC_ID_LOSS_EWMA: MetricId
METRIC_ID_LOSS_VOLATILITY: MetricId
METRIC_ID_GRADIENT_NORM_EWMA: MetricId
METRIC_ID_GRADIENT_CONFLICT_RATE: MetricId
METRIC_ID_OPTIMIZER_LR: MetricId
METRIC_ID_STEP_LATENCY_MS: MetricId
METRIC_ID_SAMPLES_PER_SECOND: MetricId
METRIC_ID_INPUT_WAIT_MS: MetricId
METRIC_ID_FEATURE_COVERAGE: MetricId
METRIC_ID_SEEDS_ACTIVE: MetricId

class FieldReportDelta(_message.Message):
    __slots__ = ("loss_delta", "param_delta", "risk_index", "risk_score", "tamiyo_latency_ms", "hook_latency_ms", "kasmina_apply_ms", "kasmina_finalize_ms", "accuracy_delta", "value_estimate", "blending_index", "selected_seed_score", "schedule_start", "schedule_end", "blueprint_risk")
    LOSS_DELTA_FIELD_NUMBER: _ClassVar[int]
    PARAM_DELTA_FIELD_NUMBER: _ClassVar[int]
    RISK_INDEX_FIELD_NUMBER: _ClassVar[int]
    RISK_SCORE_FIELD_NUMBER: _ClassVar[int]
    TAMIYO_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    HOOK_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    KASMINA_APPLY_MS_FIELD_NUMBER: _ClassVar[int]
    KASMINA_FINALIZE_MS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_DELTA_FIELD_NUMBER: _ClassVar[int]
    VALUE_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    BLENDING_INDEX_FIELD_NUMBER: _ClassVar[int]
    SELECTED_SEED_SCORE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_START_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_END_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_RISK_FIELD_NUMBER: _ClassVar[int]
    loss_delta: float
    param_delta: float
    risk_index: int
    risk_score: float
    tamiyo_latency_ms: float
    hook_latency_ms: float
    kasmina_apply_ms: float
    kasmina_finalize_ms: float
    accuracy_delta: float
    value_estimate: float
    blending_index: int
    selected_seed_score: float
    schedule_start: float
    schedule_end: float
    blueprint_risk: float
    def __init__(self, loss_delta: _Optional[float] = ..., param_delta: _Optional[float] = ..., risk_index: _Optional[int] = ..., risk_score: _Optional[float] = ..., tamiyo_latency_ms: _Optional[float] = ..., hook_latency_ms: _Optional[float] = ..., kasmina_apply_ms: _Optional[float] = ..., kasmina_finalize_ms: _Optional[float] = ..., accuracy_delta: _Optional[float] = ..., value_estimate: _Optional[float] = ..., blending_index: _Optional[int] = ..., selected_seed_score: _Optional[float] = ..., schedule_start: _Optional[float] = ..., schedule_end: _Optional[float] = ..., blueprint_risk: _Optional[float] = ...) -> None: ...

class MetricValue(_message.Message):
    __slots__ = ("id", "value")
    ID_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    id: MetricId
    value: float
    def __init__(self, id: _Optional[_Union[MetricId, str]] = ..., value: _Optional[float] = ...) -> None: ...

class MitigationAction(_message.Message):
    __slots__ = ("rationale", "kind")
    RATIONALE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    rationale: str
    kind: MitigationKind
    def __init__(self, rationale: _Optional[str] = ..., kind: _Optional[_Union[MitigationKind, str]] = ...) -> None: ...

class FieldReport(_message.Message):
    __slots__ = ("version", "report_id", "command_id", "training_run_id", "seed_id", "blueprint_id", "outcome", "observation_window_epochs", "issued_at", "tamiyo_policy_version", "follow_up_actions", "notes", "delta", "extra_metrics")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPORT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINING_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_WINDOW_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    TAMIYO_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_UP_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    EXTRA_METRICS_FIELD_NUMBER: _ClassVar[int]
    version: int
    report_id: str
    command_id: str
    training_run_id: str
    seed_id: str
    blueprint_id: str
    outcome: FieldReportOutcome
    observation_window_epochs: int
    issued_at: _timestamp_pb2.Timestamp
    tamiyo_policy_version: str
    follow_up_actions: _containers.RepeatedCompositeFieldContainer[MitigationAction]
    notes: str
    delta: FieldReportDelta
    extra_metrics: _containers.RepeatedCompositeFieldContainer[MetricValue]
    def __init__(self, version: _Optional[int] = ..., report_id: _Optional[str] = ..., command_id: _Optional[str] = ..., training_run_id: _Optional[str] = ..., seed_id: _Optional[str] = ..., blueprint_id: _Optional[str] = ..., outcome: _Optional[_Union[FieldReportOutcome, str]] = ..., observation_window_epochs: _Optional[int] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tamiyo_policy_version: _Optional[str] = ..., follow_up_actions: _Optional[_Iterable[_Union[MitigationAction, _Mapping]]] = ..., notes: _Optional[str] = ..., delta: _Optional[_Union[FieldReportDelta, _Mapping]] = ..., extra_metrics: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ...) -> None: ...

class PolicyUpdate(_message.Message):
    __slots__ = ("version", "policy_id", "training_run_id", "issued_at", "tamiyo_policy_version", "artifact_ref", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINING_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    TAMIYO_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_REF_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    policy_id: str
    training_run_id: str
    issued_at: _timestamp_pb2.Timestamp
    tamiyo_policy_version: str
    artifact_ref: str
    digest: bytes
    def __init__(self, version: _Optional[int] = ..., policy_id: _Optional[str] = ..., training_run_id: _Optional[str] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tamiyo_policy_version: _Optional[str] = ..., artifact_ref: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...
