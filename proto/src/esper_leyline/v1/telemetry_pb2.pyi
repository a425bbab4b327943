import datetime

from esper_leyline.v1 import common_pb2 as _common_pb2
from esper_leyline.v1 import rules_pb2 as _rules_pb2
from esper_leyline.v1 import seed_pb2 as _seed_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TelemetryLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TELEMETRY_LEVEL_UNSPECIFIED: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_INFO: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_WARNING: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_ERROR: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_CRITICAL: _ClassVar[TelemetryLevel]
TELEMETRY_LEVEL_UNSPECIFIED: TelemetryLevel
TELEMETRY_LEVEL_INFO: TelemetryLevel
TELEMETRY_LEVEL_WARNING: TelemetryLevel
TELEMETRY_LEVEL_ERROR: TelemetryLevel
TELEMETRY_LEVEL_CRITICAL: TelemetryLevel

class HardwareContext(_message.Message):
    __slots__ = ("device_type", "device_id", "total_memory_gb", "available_memory_gb", "temperature_celsius", "utilization_percent", "compute_capability")
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MEMORY_GB_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_MEMORY_GB_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_PERCENT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    device_type: str
    device_id: str
    total_memory_gb: float
    available_memory_gb: float
    temperature_celsius: float
    utilization_percent: float
    compute_capability: int
    def __init__(self, device_type: _Optional[str] = ..., device_id: _Optional[str] = ..., total_memory_gb: _Optional[float] = ..., available_memory_gb: _Optional[float] = ..., temperature_celsius: _Optional[float] = ..., utilization_percent: _Optional[float] = ..., compute_capability: _Optional[int] = ...) -> None: ...

class TrainingMetrics(_message.Message):
    __slots__ = ("optimizer_lr", "optimizer_momentum", "loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma", "grad_conflict_rate", "tamiyo_latency_ms", "kasmina_apply_ms", "kasmina_finalize_ms", "step_latency_ms", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent", "loss", "accuracy", "gradient_norm", "grad_var", "samples_per_s", "hook_latency_ms", "input_wait_ms", "h2d_copy_ms", "optimizer_family", "epochs_total", "epoch_latency_ms", "isolation_violations")
    OPTIMIZER_LR_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    LOSS_DELTA_FIELD_NUMBER: _ClassVar[int]
    LOSS_EWMA_FIELD_NUMBER: _ClassVar[int]
    LOSS_VOLATILITY_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_EWMA_FIELD_NUMBER: _ClassVar[int]
    GRAD_CONFLICT_RATE_FIELD_NUMBER: _ClassVar[int]
    TAMIYO_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    KASMINA_APPLY_MS_FIELD_NUMBER: _ClassVar[int]
    KASMINA_FINALIZE_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    GPU_MEM_USED_GB_FIELD_NUMBER: _ClassVar[int]
    GPU_MEM_FREE_GB_FIELD_NUMBER: _ClassVar[int]
    GPU_UTIL_PERCENT_FIELD_NUMBER: _ClassVar[int]
    CPU_UTIL_PERCENT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_VAR_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_S_FIELD_NUMBER: _ClassVar[int]
    HOOK_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    INPUT_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    H2D_COPY_MS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FAMILY_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    optimizer_lr: float
    optimizer_momentum: float
    loss_delta: float
    loss_ewma: float
    loss_volatility: float
    grad_norm_ewma: float
    grad_conflict_rate: float
    tamiyo_latency_ms: float
    kasmina_apply_ms: float
    kasmina_finalize_ms: float
    step_latency_ms: float
    gpu_mem_used_gb: float
    gpu_mem_free_gb: float
    gpu_util_percent: float
    cpu_util_percent: float
    loss: float
    accuracy: float
    gradient_norm: float
    grad_var: float
    samples_per_s: float
    hook_latency_ms: float
    input_wait_ms: float
    h2d_copy_ms: float
    optimizer_family: _common_pb2.OptimizerFamily
    epochs_total: int
    epoch_latency_ms: float
    isolation_violations: int
    def __init__(self, optimizer_lr: _Optional[float] = ..., optimizer_momentum: _Optional[float] = ..., loss_delta: _Optional[float] = ..., loss_ewma: _Optional[float] = ..., loss_volatility: _Optional[float] = ..., grad_norm_ewma: _Optional[float] = ..., grad_conflict_rate: _Optional[float] = ..., tamiyo_latency_ms: _Optional[float] = ..., kasmina_apply_ms: _Optional[float] = ..., kasmina_finalize_ms: _Optional[float] = ..., step_latency_ms: _Optional[float] = ..., gpu_mem_used_gb: _Optional[float] = ..., gpu_mem_free_gb: _Optional[float] = ..., gpu_util_percent: _Optional[float] = ..., cpu_util_percent: _Optional[float] = ..., loss: _Optional[float] = ..., accuracy: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., grad_var: _Optional[float] = ..., samples_per_s: _Optional[float] = ..., hook_latency_ms: _Optional[float] = ..., input_wait_ms: _Optional[float] = ..., h2d_copy_ms: _Optional[float] = ..., optimizer_family: _Optional[_Union[_common_pb2.OptimizerFamily, str]] = ..., epochs_total: _Optional[int] = ..., epoch_latency_ms: _Optional[float] = ..., isolation_violations: _Optional[int] = ...) -> None: ...

class SystemStatePacket(_message.Message):
    __slots__ = ("version", "current_epoch", "validation_accuracy", "validation_loss", "timestamp_ns", "hardware_context", "seed_states", "packet_id", "global_step", "training_loss", "source_subsystem", "training_run_id", "experiment_name", "metrics_struct")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CURRENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_NS_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SEED_STATES_FIELD_NUMBER: _ClassVar[int]
    PACKET_ID_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    TRAINING_LOSS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    TRAINING_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_NAME_FIELD_NUMBER: _ClassVar[int]
    METRICS_STRUCT_FIELD_NUMBER: _ClassVar[int]
    version: int
    current_epoch: int
    validation_accuracy: float
    validation_loss: float
    timestamp_ns: int
    hardware_context: HardwareContext
    seed_states: _containers.RepeatedCompositeFieldContainer[_seed_pb2.SeedState]
    packet_id: str
    global_step: int
    training_loss: float
    source_subsystem: str
    training_run_id: str
    experiment_name: str
    metrics_struct: TrainingMetrics
    def __init__(self, version: _Optional[int] = ..., current_epoch: _Optional[int] = ..., validation_accuracy: _Optional[float] = ..., validation_loss: _Optional[float] = ..., timestamp_ns: _Optional[int] = ..., hardware_context: _Optional[_Union[HardwareContext, _Mapping]] = ..., seed_states: _Optional[_Iterable[_Union[_seed_pb2.SeedState, _Mapping]]] = ..., packet_id: _Optional[str] = ..., global_step: _Optional[int] = ..., training_loss: _Optional[float] = ..., source_subsystem: _Optional[str] = ..., training_run_id: _Optional[str] = ..., experiment_name: _Optional[str] = ..., metrics_struct: _Optional[_Union[TrainingMetrics, _Mapping]] = ...) -> None: ...

class MetricPoint(_message.Message):
    __slots__ = ("name", "value", "unit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    unit: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., unit: _Optional[str] = ...) -> None: ...

class TelemetryEvent(_message.Message):
    __slots__ = ("event_id", "description", "level", "name")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    description: str
    level: TelemetryLevel
    name: str
    def __init__(self, event_id: _Optional[str] = ..., description: _Optional[str] = ..., level: _Optional[_Union[TelemetryLevel, str]] = ..., name: _Optional[str] = ...) -> None: ...

class SystemHealth(_message.Message):
    __slots__ = ("status", "summary")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    status: _common_pb2.HealthStatus
    summary: str
    def __init__(self, status: _Optional[_Union[_common_pb2.HealthStatus, str]] = ..., summary: _Optional[str] = ...) -> None: ...

class TelemetryPacket(_message.Message):
    __slots__ = ("packet_id", "timestamp", "source_subsystem", "level", "metrics", "events", "system_health", "priority")
    PACKET_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SUBSYSTEM_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_HEALTH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    packet_id: str
    timestamp: _timestamp_pb2.Timestamp
    source_subsystem: str
    level: TelemetryLevel
    metrics: _containers.RepeatedCompositeFieldContainer[MetricPoint]
    events: _containers.RepeatedCompositeFieldContainer[TelemetryEvent]
    system_health: SystemHealth
    priority: _common_pb2.MessagePriority
    def __init__(self, packet_id: _Optional[str] = ..., timestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., source_subsystem: _Optional[str] = ..., level: _Optional[_Union[TelemetryLevel, str]] = ..., metrics: _Optional[_Iterable[_Union[MetricPoint, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[TelemetryEvent, _Mapping]]] = ..., system_health: _Optional[_Union[SystemHealth, _Mapping]] = ..., priority: _Optional[_Union[_common_pb2.MessagePriority, str]] = ...) -> None: ...
