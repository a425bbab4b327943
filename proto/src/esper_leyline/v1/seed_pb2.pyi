from esper_leyline.v1 import blueprint_pb2 as _blueprint_pb2
from esper_leyline.v1 import rules_pb2 as _rules_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SeedLifecycleStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_LIFECYCLE_STAGE_UNSPECIFIED: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_DORMANT: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_GERMINATED: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_TRAINING: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_BLENDING: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_SHADOWING: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_PROBATIONARY: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_FOSSILIZED: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_CULLED: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_EMBARGOED: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_RESETTING: _ClassVar[SeedLifecycleStage]
    SEED_LIFECYCLE_STAGE_TERMINATED: _ClassVar[SeedLifecycleStage]

class SeedLifecycleGate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_LIFECYCLE_GATE_UNSPECIFIED: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G0_SANITY: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G1_GRADIENT_HEALTH: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G2_STABILITY: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G3_INTERFACE: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT: _ClassVar[SeedLifecycleGate]
    SEED_LIFECYCLE_GATE_G5_RESET: _ClassVar[SeedLifecycleGate]

class GateVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GATE_VERDICT_UNSPECIFIED: _ClassVar[GateVerdict]
    GATE_VERDICT_PASS: _ClassVar[GateVerdict]
    GATE_VERDICT_HOLD: _ClassVar[GateVerdict]
    GATE_VERDICT_FAIL: _ClassVar[GateVerdict]

class SeedOperation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_OPERATION_UNSPECIFIED: _ClassVar[SeedOperation]
    SEED_OPERATION_GERMINATE: _ClassVar[SeedOperation]
    SEED_OPERATION_START_TRAINING: _ClassVar[SeedOperation]
    SEED_OPERATION_START_GRAFTING: _ClassVar[SeedOperation]
    SEED_OPERATION_STABILIZE: _ClassVar[SeedOperation]
    SEED_OPERATION_EVALUATE: _ClassVar[SeedOperation]
    SEED_OPERATION_FINE_TUNE: _ClassVar[SeedOperation]
    SEED_OPERATION_FOSSILIZE: _ClassVar[SeedOperation]
    SEED_OPERATION_CULL: _ClassVar[SeedOperation]
    SEED_OPERATION_CANCEL: _ClassVar[SeedOperation]

class BlendMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLEND_MODE_UNSPECIFIED: _ClassVar[BlendMode]
    BLEND_MODE_CONVEX: _ClassVar[BlendMode]
    BLEND_MODE_RESIDUAL: _ClassVar[BlendMode]
    BLEND_MODE_CHANNEL: _ClassVar[BlendMode]
    BLEND_MODE_CONFIDENCE: _ClassVar[BlendMode]

class BlendModeSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLEND_MODE_SOURCE_UNSPECIFIED: _ClassVar[BlendModeSource]
    BLEND_MODE_SOURCE_POLICY: _ClassVar[BlendModeSource]
    BLEND_MODE_SOURCE_BLUEPRINT: _ClassVar[BlendModeSource]
    BLEND_MODE_SOURCE_DEFAULT: _ClassVar[BlendModeSource]
SEED_LIFECYCLE_STAGE_UNSPECIFIED: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_DORMANT: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_GERMINATED: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_TRAINING: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_BLENDING: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_SHADOWING: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_PROBATIONARY: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_FOSSILIZED: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_CULLED: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_EMBARGOED: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_RESETTING: SeedLifecycleStage
SEED_LIFECYCLE_STAGE_TERMINATED: SeedLifecycleStage
SEED_LIFECYCLE_GATE_UNSPECIFIED: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G0_SANITY: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G1_GRADIENT_HEALTH: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G2_STABILITY: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G3_INTERFACE: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT: SeedLifecycleGate
SEED_LIFECYCLE_GATE_G5_RESET: SeedLifecycleGate
GATE_VERDICT_UNSPECIFIED: GateVerdict
GATE_VERDICT_PASS: GateVerdict
GATE_VERDICT_HOLD: GateVerdict
GATE_VERDICT_FAIL: GateVerdict
SEED_OPERATION_UNSPECIFIED: SeedOperation
SEED_OPERATION_GERMINATE: SeedOperation
SEED_OPERATION_START_TRAINING: SeedOperation
SEED_OPERATION_START_GRAFTING: SeedOperation
SEED_OPERATION_STABILIZE: SeedOperation
SEED_OPERATION_EVALUATE: SeedOperation
SEED_OPERATION_FINE_TUNE: SeedOperation
SEED_OPERATION_FOSSILIZE: SeedOperation
SEED_OPERATION_CULL: SeedOperation
SEED_OPERATION_CANCEL: SeedOperation
BLEND_MODE_UNSPECIFIED: BlendMode
BLEND_MODE_CONVEX: BlendMode
BLEND_MODE_RESIDUAL: BlendMode
BLEND_MODE_CHANNEL: BlendMode
BLEND_MODE_CONFIDENCE: BlendMode
BLEND_MODE_SOURCE_UNSPECIFIED: BlendModeSource
BLEND_MODE_SOURCE_POLICY: BlendModeSource
BLEND_MODE_SOURCE_BLUEPRINT: BlendModeSource
BLEND_MODE_SOURCE_DEFAULT: BlendModeSource

class SeedState(_message.Message):
    __slots__ = ("seed_id", "stage", "gradient_norm", "learning_rate", "layer_depth", "age_epochs", "risk_score", "alpha", "alpha_steps", "alpha_total_steps", "alpha_temperature", "blend_allowed", "risk_tolerance", "blueprint_id")
    SEED_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LAYER_DEPTH_FIELD_NUMBER: _ClassVar[int]
    AGE_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    RISK_SCORE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    ALPHA_STEPS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    BLEND_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    RISK_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    seed_id: str
    stage: SeedLifecycleStage
    gradient_norm: float
    learning_rate: float
    layer_depth: int
    age_epochs: int
    risk_score: float
    alpha: float
    alpha_steps: int
    alpha_total_steps: int
    alpha_temperature: float
    blend_allowed: bool
    risk_tolerance: float
    blueprint_id: str
    def __init__(self, seed_id: _Optional[str] = ..., stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., gradient_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., layer_depth: _Optional[int] = ..., age_epochs: _Optional[int] = ..., risk_score: _Optional[float] = ..., alpha: _Optional[float] = ..., alpha_steps: _Optional[int] = ..., alpha_total_steps: _Optional[int] = ..., alpha_temperature: _Optional[float] = ..., blend_allowed: bool = ..., risk_tolerance: _Optional[float] = ..., blueprint_id: _Optional[str] = ...) -> None: ...

class GateEvent(_message.Message):
    __slots__ = ("gate", "reason", "seed_id", "from_stage", "to_stage", "verdict")
    GATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SEED_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    gate: SeedLifecycleGate
    reason: str
    seed_id: str
    from_stage: SeedLifecycleStage
    to_stage: SeedLifecycleStage
    verdict: GateVerdict
    def __init__(self, gate: _Optional[_Union[SeedLifecycleGate, str]] = ..., reason: _Optional[str] = ..., seed_id: _Optional[str] = ..., from_stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., to_stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., verdict: _Optional[_Union[GateVerdict, str]] = ...) -> None: ...

class CommandSeedOperation(_message.Message):
    __slots__ = ("operation", "blueprint_id", "blend_alpha", "blend_mode", "schedule_start", "schedule_end", "resume_flag", "include_teacher")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    BLEND_ALPHA_FIELD_NUMBER: _ClassVar[int]
    BLEND_MODE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_START_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_END_FIELD_NUMBER: _ClassVar[int]
    RESUME_FLAG_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEACHER_FIELD_NUMBER: _ClassVar[int]
    operation: SeedOperation
    blueprint_id: str
    blend_alpha: float
    blend_mode: BlendMode
    schedule_start: float
    schedule_end: float
    resume_flag: bool
    include_teacher: bool
    def __init__(self, operation: _Optional[_Union[SeedOperation, str]] = ..., blueprint_id: _Optional[str] = ..., blend_alpha: _Optional[float] = ..., blend_mode: _Optional[_Union[BlendMode, str]] = ..., schedule_start: _Optional[float] = ..., schedule_end: _Optional[float] = ..., resume_flag: bool = ..., include_teacher: bool = ...) -> None: ...

class BlendConfig(_message.Message):
    __slots__ = ("mode", "alpha", "schedule_start", "schedule_end", "alpha_vec", "logits_available", "gate_k", "gate_tau", "alpha_lo", "alpha_hi", "mode_source")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_START_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_END_FIELD_NUMBER: _ClassVar[int]
    ALPHA_VEC_FIELD_NUMBER: _ClassVar[int]
    LOGITS_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    GATE_K_FIELD_NUMBER: _ClassVar[int]
    GATE_TAU_FIELD_NUMBER: _ClassVar[int]
    ALPHA_LO_FIELD_NUMBER: _ClassVar[int]
    ALPHA_HI_FIELD_NUMBER: _ClassVar[int]
    MODE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    mode: BlendMode
    alpha: float
    schedule_start: float
    schedule_end: float
    alpha_vec: _containers.RepeatedScalarFieldContainer[float]
    logits_available: bool
    gate_k: float
    gate_tau: float
    alpha_lo: float
    alpha_hi: float
    mode_source: BlendModeSource
    def __init__(self, mode: _Optional[_Union[BlendMode, str]] = ..., alpha: _Optional[float] = ..., schedule_start: _Optional[float] = ..., schedule_end: _Optional[float] = ..., alpha_vec: _Optional[_Iterable[float]] = ..., logits_available: bool = ..., gate_k: _Optional[float] = ..., gate_tau: _Optional[float] = ..., alpha_lo: _Optional[float] = ..., alpha_hi: _Optional[float] = ..., mode_source: _Optional[_Union[BlendModeSource, str]] = ...) -> None: ...

class SelectionContext(_message.Message):
    __slots__ = ("seed_id", "blueprint_id", "seed_score", "blueprint_score", "blueprint_tier")
    SEED_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_SCORE_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_SCORE_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_TIER_FIELD_NUMBER: _ClassVar[int]
    seed_id: str
    blueprint_id: str
    seed_score: float
    blueprint_score: float
    blueprint_tier: _blueprint_pb2.BlueprintTier
    def __init__(self, seed_id: _Optional[str] = ..., blueprint_id: _Optional[str] = ..., seed_score: _Optional[float] = ..., blueprint_score: _Optional[float] = ..., blueprint_tier: _Optional[_Union[_blueprint_pb2.BlueprintTier, str]] = ...) -> None: ...
