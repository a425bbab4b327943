"""Phases, condition types and the small enums of the resource that both sides use."""

from enum import StrEnum


class Phase(StrEnum):
    """status.phase: a pure function of conditions, for people and columns."""

    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    ROLLING_BACK = "RollingBack"
    RESTARTING = "Restarting"
    HALTING = "Halting"
    HALTED = "Halted"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """All present from the first reconcile."""

    ACCEPTED = "Accepted"
    SUSPENDED = "Suspended"
    PODS_READY = "PodsReady"
    HEALTHY = "Healthy"
    RECOVERABLE = "Recoverable"
    ROLLED_BACK = "RolledBack"
    HALTED = "Halted"
    COMPLETE = "Complete"
    FAILED = "Failed"
    FINISHED = "Finished"


class EmergencyStop(StrEnum):
    """spec.emergencyStop and the mode of a broadcast, by strength."""

    NONE = "None"
    FREEZE = "Freeze"
    CHECKPOINT = "Checkpoint"
    KILL = "Kill"


class HaltSource(StrEnum):
    SPEC = "Spec"
    BROADCAST = "Broadcast"
    RUNTIME = "Runtime"
    BUDGET = "Budget"


class RecoveryKind(StrEnum):
    """status.lastRecovery.kind; L0 to L3 of the ladder."""

    IN_PROCESS = "InProcess"
    IN_PLACE = "InPlace"
    POD_REPLACED = "PodReplaced"
    NEW_ATTEMPT = "NewAttempt"


class RollbackTier(StrEnum):
    """status.lastRecovery.tier"""

    FAST = "Fast"
    FULL = "Full"


class RestoreOutcome(StrEnum):
    """How an attempt to restore a state ended: label of metrics, field of the run's record."""

    OK = "ok"
    NO_CHECKPOINT = "no_checkpoint"
    INTEGRITY_FAILED = "integrity_failed"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    APPLY_FAILED = "apply_failed"


class Durability(StrEnum):
    """How checkpoints are made durable on a volume, as far as a probe can know."""

    DSYNC = "o_dsync"
    """What commits a generation is written with O_DSYNC, and fsync follows."""
    FSYNC = "fsync"
    """By fsync alone: the volume refuses O_DSYNC."""
    UNKNOWN = "unknown"
    """Nothing there is known to survive a loss of power, or of the container."""


class FaultKind(StrEnum):
    """spec.faultInjection[].kind"""

    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRADIENT = "NonFiniteGradient"
    LOSS_SPIKE = "LossSpike"
    CRASH = "Crash"
    HANG = "Hang"
    SLOW_STEP = "SlowStep"
    KILL_TRAINER = "KillTrainer"
