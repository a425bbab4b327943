"""Events of a run's record (record.jsonl), declared once: whoever writes, draws or alarms takes the names from here."""

from enum import StrEnum

from esper_leyline.v1.common_pb2 import (
    MESSAGE_PRIORITY_CRITICAL,
    MESSAGE_PRIORITY_HIGH,
    MESSAGE_PRIORITY_LOW,
    MESSAGE_PRIORITY_NORMAL,
    MessagePriority,
)


class Level(StrEnum):
    """How bad it is."""

    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class RunEvent(StrEnum):
    """What a line of the record is about. The comment says what its `fields` hold beside reason and message."""

    # The course of training
    STARTED = "tolaria.trainer.started"  # source, trainerStart, device, threads, torch, epochs
    ENDED = "tolaria.trainer.ended"  # exitCode, savedStep
    TRANSITION = "tolaria.transition"  # from, to
    PROGRESS = "tolaria.progress"  # loss
    EPOCH = "tolaria.epoch.closed"  # epoch, epochs, loss, metrics, samplesPerSecond
    METRICS = "tolaria.metrics"  # every gauge and counter without labels, by name
    NOTICE = "tolaria.notice"
    RUN_COMPLETED = "tolaria.run.completed"  # bestStep, exportPath, metrics
    RUN_FAILED = "tolaria.run.failed"  # exitCode
    FAULT_INJECTED = "tolaria.fault_injected"

    # Recovery
    ROLLBACK_STARTED = "tolaria.rollback.started"  # from, to: phases
    ROLLBACK_COMPLETED = (
        "tolaria.rollback.completed"  # kind, cause, tier, fromStep, toStep, detectMs, recoverMs, verified
    )
    RECOVERY_COMPLETED = "tolaria.recovery.completed"  # the same, of a new trainer process
    RESTORE_FAILED = "tolaria.rollback.restore_failed"
    STALL_DETECTED = "tolaria.stall_detected"  # detectMs
    CHECKPOINT_COMMITTED = "tolaria.checkpoint.committed"  # step, bestStep, count, bytes, stallMs
    CHECKPOINT_FAILED = "tolaria.checkpoint.failed"

    # Boundary, breakers, modes
    TAMIYO_ERROR = "tolaria.tamiyo_error"
    TAMIYO_TIMEOUT = "tolaria.tamiyo_timeout"
    KASMINA_ERROR = "tolaria.kasmina_error"
    KASMINA_TIMEOUT = "tolaria.kasmina_timeout"
    CONSERVATIVE_ENTERED = "tolaria.conservative_mode_entered"
    CONSERVATIVE_CLEARED = "tolaria.conservative_mode_cleared"
    BREAKER_OPENED = "tolaria.breaker_opened"
    BREAKER_CLOSED = "tolaria.breaker_closed"
    HOOK_BUDGET_EXCEEDED = "tolaria.hook_budget_exceeded"
    COMMAND_ACCEPTED = "tolaria.command.accepted"
    COMMAND_REJECTED = "tolaria.command.rejected"
    COMMAND_EXPIRED = "tolaria.command.expired"
    ESCALATED = "tolaria.emergency.escalated"
    DEESCALATED = "tolaria.emergency.deescalated"
    HALT = "tolaria.emergency.halt"  # from, to: phases
    ACKNOWLEDGED = "tolaria.emergency.acknowledged"  # signal, stage, elapsedMs
    DEGRADED = "tolaria.degraded"  # component
    MENDED = "tolaria.mended"  # component

    # Learning rate, optimizer, features
    LR_VIOLATION = "tolaria.lr_integrity_violation"
    OPTIMIZER_REBUILT = "tolaria.optimizer_rebuilt"
    COMPILE_FALLBACK = "tolaria.compile_fallback"
    GRAPH_FALLBACK = "tolaria.graph_fallback"
    FEATURE_FALLBACK = "tolaria.feature_fallback"
    PROFILER_TRACE = "tolaria.profiler.trace"
    PROFILER_FAILED = "tolaria.profiler.export_failed"


PRIORITY: dict[Level, MessagePriority] = {
    Level.INFO: MESSAGE_PRIORITY_NORMAL,
    Level.WARNING: MESSAGE_PRIORITY_HIGH,
    Level.ERROR: MESSAGE_PRIORITY_HIGH,
    Level.CRITICAL: MESSAGE_PRIORITY_CRITICAL,
}
LOW = frozenset({RunEvent.PROGRESS, RunEvent.METRICS})
"""Dropped before all others where there is no room."""


def priority(event: RunEvent, level: Level) -> MessagePriority:
    """Of a line, by which a full queue chooses what to drop."""
    return MESSAGE_PRIORITY_LOW if event in LOW and level is Level.INFO else PRIORITY[level]
