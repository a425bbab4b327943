from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class BusMessageType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUS_MESSAGE_TYPE_UNSPECIFIED: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_SYSTEM_STATE: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_FIELD_REPORT: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_TELEMETRY: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_POLICY_UPDATE: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_RUN_REPORT: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_EMERGENCY_ACK: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_BSDS_ISSUED: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_BSDS_FAILED: _ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_BENCHMARK_REPORT: _ClassVar[BusMessageType]

class MessagePriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MESSAGE_PRIORITY_UNSPECIFIED: _ClassVar[MessagePriority]
    MESSAGE_PRIORITY_LOW: _ClassVar[MessagePriority]
    MESSAGE_PRIORITY_NORMAL: _ClassVar[MessagePriority]
    MESSAGE_PRIORITY_HIGH: _ClassVar[MessagePriority]
    MESSAGE_PRIORITY_CRITICAL: _ClassVar[MessagePriority]

class HealthStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEALTH_STATUS_UNSPECIFIED: _ClassVar[HealthStatus]
    HEALTH_STATUS_HEALTHY: _ClassVar[HealthStatus]
    HEALTH_STATUS_DEGRADED: _ClassVar[HealthStatus]
    HEALTH_STATUS_UNHEALTHY: _ClassVar[HealthStatus]
    HEALTH_STATUS_CRITICAL: _ClassVar[HealthStatus]

class CircuitBreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CIRCUIT_BREAKER_STATE_UNSPECIFIED: _ClassVar[CircuitBreakerState]
    CIRCUIT_BREAKER_STATE_CLOSED: _ClassVar[CircuitBreakerState]
    CIRCUIT_BREAKER_STATE_OPEN: _ClassVar[CircuitBreakerState]
    CIRCUIT_BREAKER_STATE_HALF_OPEN: _ClassVar[CircuitBreakerState]

class OptimizerFamily(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_FAMILY_UNSPECIFIED: _ClassVar[OptimizerFamily]
    OPTIMIZER_FAMILY_SGD: _ClassVar[OptimizerFamily]
    OPTIMIZER_FAMILY_ADAM: _ClassVar[OptimizerFamily]
    OPTIMIZER_FAMILY_ADAMW: _ClassVar[OptimizerFamily]
    OPTIMIZER_FAMILY_OTHER: _ClassVar[OptimizerFamily]

class LrPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LR_POLICY_UNSPECIFIED: _ClassVar[LrPolicy]
    LR_POLICY_CONSTANT: _ClassVar[LrPolicy]
    LR_POLICY_COSINE: _ClassVar[LrPolicy]
    LR_POLICY_STEP: _ClassVar[LrPolicy]
    LR_POLICY_SEED_WARMUP: _ClassVar[LrPolicy]
    LR_POLICY_MORPHO_ADAPTIVE: _ClassVar[LrPolicy]
    LR_POLICY_FROZEN: _ClassVar[LrPolicy]
    LR_POLICY_LINEAR: _ClassVar[LrPolicy]
    LR_POLICY_CUSTOM: _ClassVar[LrPolicy]

class RollbackTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLBACK_TIER_UNSPECIFIED: _ClassVar[RollbackTier]
    ROLLBACK_TIER_FAST: _ClassVar[RollbackTier]
    ROLLBACK_TIER_FULL: _ClassVar[RollbackTier]

class RestoreOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESTORE_OUTCOME_UNSPECIFIED: _ClassVar[RestoreOutcome]
    RESTORE_OUTCOME_OK: _ClassVar[RestoreOutcome]
    RESTORE_OUTCOME_NO_CHECKPOINT: _ClassVar[RestoreOutcome]
    RESTORE_OUTCOME_INTEGRITY_FAILED: _ClassVar[RestoreOutcome]
    RESTORE_OUTCOME_DEADLINE_EXCEEDED: _ClassVar[RestoreOutcome]
    RESTORE_OUTCOME_APPLY_FAILED: _ClassVar[RestoreOutcome]
BUS_MESSAGE_TYPE_UNSPECIFIED: BusMessageType
BUS_MESSAGE_TYPE_SYSTEM_STATE: BusMessageType
BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: BusMessageType
BUS_MESSAGE_TYPE_FIELD_REPORT: BusMessageType
BUS_MESSAGE_TYPE_TELEMETRY: BusMessageType
BUS_MESSAGE_TYPE_POLICY_UPDATE: BusMessageType
BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST: BusMessageType
BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY: BusMessageType
BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR: BusMessageType
BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE: BusMessageType
BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL: BusMessageType
BUS_MESSAGE_TYPE_RUN_REPORT: BusMessageType
BUS_MESSAGE_TYPE_EMERGENCY_ACK: BusMessageType
BUS_MESSAGE_TYPE_BSDS_ISSUED: BusMessageType
BUS_MESSAGE_TYPE_BSDS_FAILED: BusMessageType
BUS_MESSAGE_TYPE_BENCHMARK_REPORT: BusMessageType
MESSAGE_PRIORITY_UNSPECIFIED: MessagePriority
MESSAGE_PRIORITY_LOW: MessagePriority
MESSAGE_PRIORITY_NORMAL: MessagePriority
MESSAGE_PRIORITY_HIGH: MessagePriority
MESSAGE_PRIORITY_CRITICAL: MessagePriority
HEALTH_STATUS_UNSPECIFIED: HealthStatus
HEALTH_STATUS_HEALTHY: HealthStatus
HEALTH_STATUS_DEGRADED: HealthStatus
HEALTH_STATUS_UNHEALTHY: HealthStatus
HEALTH_STATUS_CRITICAL: HealthStatus
CIRCUIT_BREAKER_STATE_UNSPECIFIED: CircuitBreakerState
CIRCUIT_BREAKER_STATE_CLOSED: CircuitBreakerState
CIRCUIT_BREAKER_STATE_OPEN: CircuitBreakerState
CIRCUIT_BREAKER_STATE_HALF_OPEN: CircuitBreakerState
OPTIMIZER_FAMILY_UNSPECIFIED: OptimizerFamily
OPTIMIZER_FAMILY_SGD: OptimizerFamily
OPTIMIZER_FAMILY_ADAM: OptimizerFamily
OPTIMIZER_FAMILY_ADAMW: OptimizerFamily
OPTIMIZER_FAMILY_OTHER: OptimizerFamily
LR_POLICY_UNSPECIFIED: LrPolicy
LR_POLICY_CONSTANT: LrPolicy
LR_POLICY_COSINE: LrPolicy
LR_POLICY_STEP: LrPolicy
LR_POLICY_SEED_WARMUP: LrPolicy
LR_POLICY_MORPHO_ADAPTIVE: LrPolicy
LR_POLICY_FROZEN: LrPolicy
LR_POLICY_LINEAR: LrPolicy
LR_POLICY_CUSTOM: LrPolicy
ROLLBACK_TIER_UNSPECIFIED: RollbackTier
ROLLBACK_TIER_FAST: RollbackTier
ROLLBACK_TIER_FULL: RollbackTier
RESTORE_OUTCOME_UNSPECIFIED: RestoreOutcome
RESTORE_OUTCOME_OK: RestoreOutcome
RESTORE_OUTCOME_NO_CHECKPOINT: RestoreOutcome
RESTORE_OUTCOME_INTEGRITY_FAILED: RestoreOutcome
RESTORE_OUTCOME_DEADLINE_EXCEEDED: RestoreOutcome
RESTORE_OUTCOME_APPLY_FAILED: RestoreOutcome
