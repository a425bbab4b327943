import datetime

from esper_leyline.v1 import blueprint_pb2 as _blueprint_pb2
from esper_leyline.v1 import common_pb2 as _common_pb2
from esper_leyline.v1 import emergency_pb2 as _emergency_pb2
from esper_leyline.v1 import rules_pb2 as _rules_pb2
from esper_leyline.v1 import seed_pb2 as _seed_pb2
from esper_leyline.v1 import telemetry_pb2 as _telemetry_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CommandType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMAND_TYPE_UNSPECIFIED: _ClassVar[CommandType]
    COMMAND_TYPE_SEED: _ClassVar[CommandType]
    COMMAND_TYPE_ROLLBACK: _ClassVar[CommandType]
    COMMAND_TYPE_OPTIMIZER: _ClassVar[CommandType]
    COMMAND_TYPE_CIRCUIT_BREAKER: _ClassVar[CommandType]
    COMMAND_TYPE_PAUSE: _ClassVar[CommandType]
    COMMAND_TYPE_EMERGENCY: _ClassVar[CommandType]
    COMMAND_TYPE_STRUCTURAL_PRUNING: _ClassVar[CommandType]
    COMMAND_TYPE_NO_OPERATION: _ClassVar[CommandType]

class RiskReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RISK_REASON_UNSPECIFIED: _ClassVar[RiskReason]
    RISK_REASON_TIMEOUT_INFERENCE: _ClassVar[RiskReason]
    RISK_REASON_TIMEOUT_URZA: _ClassVar[RiskReason]
    RISK_REASON_LOSS_SPIKE: _ClassVar[RiskReason]
    RISK_REASON_BP_QUARANTINE: _ClassVar[RiskReason]
    RISK_REASON_DEVICE_PRESSURE: _ClassVar[RiskReason]
    RISK_REASON_OPERATOR_OVERRIDE: _ClassVar[RiskReason]
    RISK_REASON_VALIDATION_REGRESSION: _ClassVar[RiskReason]

class FeatureGroup(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_GROUP_UNSPECIFIED: _ClassVar[FeatureGroup]
    FEATURE_GROUP_GLOBAL: _ClassVar[FeatureGroup]
    FEATURE_GROUP_SEED: _ClassVar[FeatureGroup]
    FEATURE_GROUP_BLUEPRINT: _ClassVar[FeatureGroup]
    FEATURE_GROUP_LAYER: _ClassVar[FeatureGroup]
    FEATURE_GROUP_EDGE: _ClassVar[FeatureGroup]
COMMAND_TYPE_UNSPECIFIED: CommandType
COMMAND_TYPE_SEED: CommandType
COMMAND_TYPE_ROLLBACK: CommandType
COMMAND_TYPE_OPTIMIZER: CommandType
COMMAND_TYPE_CIRCUIT_BREAKER: CommandType
COMMAND_TYPE_PAUSE: CommandType
COMMAND_TYPE_EMERGENCY: CommandType
COMMAND_TYPE_STRUCTURAL_PRUNING: CommandType
COMMAND_TYPE_NO_OPERATION: CommandType
RISK_REASON_UNSPECIFIED: RiskReason
RISK_REASON_TIMEOUT_INFERENCE: RiskReason
RISK_REASON_TIMEOUT_URZA: RiskReason
RISK_REASON_LOSS_SPIKE: RiskReason
RISK_REASON_BP_QUARANTINE: RiskReason
RISK_REASON_DEVICE_PRESSURE: RiskReason
RISK_REASON_OPERATOR_OVERRIDE: RiskReason
RISK_REASON_VALIDATION_REGRESSION: RiskReason
FEATURE_GROUP_UNSPECIFIED: FeatureGroup
FEATURE_GROUP_GLOBAL: FeatureGroup
FEATURE_GROUP_SEED: FeatureGroup
FEATURE_GROUP_BLUEPRINT: FeatureGroup
FEATURE_GROUP_LAYER: FeatureGroup
FEATURE_GROUP_EDGE: FeatureGroup

class PolicyMetadata(_message.Message):
    __slots__ = ("action_id", "value_estimate", "risk_score", "policy_version", "param_delta", "risk_index", "blending_index")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    VALUE_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    RISK_SCORE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAM_DELTA_FIELD_NUMBER: _ClassVar[int]
    RISK_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLENDING_INDEX_FIELD_NUMBER: _ClassVar[int]
    action_id: int
    value_estimate: float
    risk_score: float
    policy_version: str
    param_delta: float
    risk_index: int
    blending_index: int
    def __init__(self, action_id: _Optional[int] = ..., value_estimate: _Optional[float] = ..., risk_score: _Optional[float] = ..., policy_version: _Optional[str] = ..., param_delta: _Optional[float] = ..., risk_index: _Optional[int] = ..., blending_index: _Optional[int] = ...) -> None: ...

class RiskMetadata(_message.Message):
    __slots__ = ("reason", "conservative_mode", "breaker_confidence", "blueprint_risk", "blueprint_tier", "blueprint_stage")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONSERVATIVE_MODE_FIELD_NUMBER: _ClassVar[int]
    BREAKER_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_RISK_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_TIER_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_STAGE_FIELD_NUMBER: _ClassVar[int]
    reason: RiskReason
    conservative_mode: bool
    breaker_confidence: float
    blueprint_risk: float
    blueprint_tier: _blueprint_pb2.BlueprintTier
    blueprint_stage: int
    def __init__(self, reason: _Optional[_Union[RiskReason, str]] = ..., conservative_mode: bool = ..., breaker_confidence: _Optional[float] = ..., blueprint_risk: _Optional[float] = ..., blueprint_tier: _Optional[_Union[_blueprint_pb2.BlueprintTier, str]] = ..., blueprint_stage: _Optional[int] = ...) -> None: ...

class GroupCoverage(_message.Message):
    __slots__ = ("group", "value")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    group: FeatureGroup
    value: float
    def __init__(self, group: _Optional[_Union[FeatureGroup, str]] = ..., value: _Optional[float] = ...) -> None: ...

class CoverageSummary(_message.Message):
    __slots__ = ("average", "groups")
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    average: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupCoverage]
    def __init__(self, average: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupCoverage, _Mapping]]] = ...) -> None: ...

class DecisionMetadata(_message.Message):
    __slots__ = ("policy", "risk", "blend", "coverage", "selection", "training_run_id", "packet_id", "mesh_host_layers")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    BLEND_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    TRAINING_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PACKET_ID_FIELD_NUMBER: _ClassVar[int]
    MESH_HOST_LAYERS_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyMetadata
    risk: RiskMetadata
    blend: _seed_pb2.BlendConfig
    coverage: CoverageSummary
    selection: _seed_pb2.SelectionContext
    training_run_id: str
    packet_id: str
    mesh_host_layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, policy: _Optional[_Union[PolicyMetadata, _Mapping]] = ..., risk: _Optional[_Union[RiskMetadata, _Mapping]] = ..., blend: _Optional[_Union[_seed_pb2.BlendConfig, _Mapping]] = ..., coverage: _Optional[_Union[CoverageSummary, _Mapping]] = ..., selection: _Optional[_Union[_seed_pb2.SelectionContext, _Mapping]] = ..., training_run_id: _Optional[str] = ..., packet_id: _Optional[str] = ..., mesh_host_layers: _Optional[_Iterable[str]] = ...) -> None: ...

class CommandOptimizerAdjustment(_message.Message):
    __slots__ = ("optimizer_id", "learning_rate_scale")
    OPTIMIZER_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_SCALE_FIELD_NUMBER: _ClassVar[int]
    optimizer_id: str
    learning_rate_scale: float
    def __init__(self, optimizer_id: _Optional[str] = ..., learning_rate_scale: _Optional[float] = ...) -> None: ...

class CommandCircuitBreaker(_message.Message):
    __slots__ = ("desired_state", "rationale", "name")
    DESIRED_STATE_FIELD_NUMBER: _ClassVar[int]
    RATIONALE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    desired_state: _common_pb2.CircuitBreakerState
    rationale: str
    name: str
    def __init__(self, desired_state: _Optional[_Union[_common_pb2.CircuitBreakerState, str]] = ..., rationale: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class CommandEmergency(_message.Message):
    __slots__ = ("level", "reason")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    level: _emergency_pb2.EmergencyLevel
    reason: str
    def __init__(self, level: _Optional[_Union[_emergency_pb2.EmergencyLevel, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("target_epoch", "tier", "reason")
    TARGET_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    target_epoch: int
    tier: _common_pb2.RollbackTier
    reason: str
    def __init__(self, target_epoch: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.RollbackTier, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class AdaptationCommand(_message.Message):
    __slots__ = ("version", "command_id", "command_type", "target_seed_id", "execution_deadline_ms", "issued_at", "issued_by", "seed_operation", "optimizer_adjustment", "circuit_breaker", "rollback", "emergency", "metadata", "rationale")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_TYPE_FIELD_NUMBER: _ClassVar[int]
    TARGET_SEED_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    ISSUED_BY_FIELD_NUMBER: _ClassVar[int]
    SEED_OPERATION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    CIRCUIT_BREAKER_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    EMERGENCY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RATIONALE_FIELD_NUMBER: _ClassVar[int]
    version: int
    command_id: str
    command_type: CommandType
    target_seed_id: str
    execution_deadline_ms: int
    issued_at: _timestamp_pb2.Timestamp
    issued_by: str
    seed_operation: _seed_pb2.CommandSeedOperation
    optimizer_adjustment: CommandOptimizerAdjustment
    circuit_breaker: CommandCircuitBreaker
    rollback: RollbackRequest
    emergency: CommandEmergency
    metadata: DecisionMetadata
    rationale: str
    def __init__(self, version: _Optional[int] = ..., command_id: _Optional[str] = ..., command_type: _Optional[_Union[CommandType, str]] = ..., target_seed_id: _Optional[str] = ..., execution_deadline_ms: _Optional[int] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., issued_by: _Optional[str] = ..., seed_operation: _Optional[_Union[_seed_pb2.CommandSeedOperation, _Mapping]] = ..., optimizer_adjustment: _Optional[_Union[CommandOptimizerAdjustment, _Mapping]] = ..., circuit_breaker: _Optional[_Union[CommandCircuitBreaker, _Mapping]] = ..., rollback: _Optional[_Union[RollbackRequest, _Mapping]] = ..., emergency: _Optional[_Union[CommandEmergency, _Mapping]] = ..., metadata: _Optional[_Union[DecisionMetadata, _Mapping]] = ..., rationale: _Optional[str] = ...) -> None: ...

class CommandSecurity(_message.Message):
    __slots__ = ("signature", "nonce", "issued_at", "freshness_window", "key_id")
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_WINDOW_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    nonce: str
    issued_at: _timestamp_pb2.Timestamp
    freshness_window: _duration_pb2.Duration
    key_id: str
    def __init__(self, signature: _Optional[bytes] = ..., nonce: _Optional[str] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., freshness_window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., key_id: _Optional[str] = ...) -> None: ...

class SignedCommand(_message.Message):
    __slots__ = ("command", "security")
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    SECURITY_FIELD_NUMBER: _ClassVar[int]
    command: bytes
    security: CommandSecurity
    def __init__(self, command: _Optional[bytes] = ..., security: _Optional[_Union[CommandSecurity, _Mapping]] = ...) -> None: ...

class CommandVerdict(_message.Message):
    __slots__ = ("accepted", "reason", "command_id")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    command_id: str
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ..., command_id: _Optional[str] = ...) -> None: ...

class OpenBoundaryRequest(_message.Message):
    __slots__ = ("run_uid", "attempt", "epoch", "step")
    RUN_UID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run_uid: str
    attempt: int
    epoch: int
    step: int
    def __init__(self, run_uid: _Optional[str] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class OpenBoundaryResponse(_message.Message):
    __slots__ = ("packet_id",)
    PACKET_ID_FIELD_NUMBER: _ClassVar[int]
    packet_id: str
    def __init__(self, packet_id: _Optional[str] = ...) -> None: ...
