"""CamelCase reasons: of conditions, history entries, Events, reports and rejections. One list for all sides."""

from enum import StrEnum
from typing import Final


class RunReason(StrEnum):
    """Reasons in status.conditions, status.history, status.lastFailure, Events and RunReports."""

    # Acceptance
    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    UNSUPPORTED = "Unsupported"
    """Valid, but this version does not do it yet (workers.count > 1, gang, Replicated)."""
    POD_NOT_RESTRICTED = "PodNotRestricted"
    CHECKPOINT_CLAIM_IN_USE = "CheckpointClaimInUse"
    FAULT_INJECTION_DISABLED = "FaultInjectionDisabled"
    MANAGED_ELSEWHERE = "ManagedElsewhere"
    FORBIDDEN_EDIT = "ForbiddenEdit"
    RESUME_SOURCE_NOT_FOUND = "ResumeSourceNotFound"

    # Pods
    JOB_CREATED = "JobCreated"
    PODS_PENDING = "PodsPending"
    PODS_READY = "PodsReady"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CLAIM_PENDING = "ClaimPending"
    CONFIG_ERROR = "ConfigError"
    POD_REFUSED = "PodRefused"
    """The API server refused the Job or pod (quota, admission)."""
    QUEUED = "Queued"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    POD_DISRUPTED = "PodDisrupted"
    NODE_LOST = "NodeLost"

    # Running
    STARTING = "Starting"
    TRAINING = "Training"
    NOT_STARTED = "NotStarted"
    NO_REPORTS = "NoReports"
    REPORTS_LOST = "ReportsLost"
    SIDECAR_DOWN = "SidecarDown"
    BUS_UNAVAILABLE = "BusUnavailable"
    BUS_UNUSABLE = "BusUnusable"
    """Redis answers and is not as it must be: too old, a replica, or its user may not do what it has to."""
    CLOCK_SKEW = "ClockSkew"
    """The clocks of pod and Redis differ. Nothing goes by them but times that people read."""
    WORKER_FAILED = "WorkerFailed"
    """A part of weatherlight failed and is started again, or has stopped."""
    SYSTEM_DEGRADED = "SystemDegraded"
    SYSTEM_OPERATIONAL = "SystemOperational"
    PAGE_UNREADABLE = "PageUnreadable"
    """The trainer's heartbeat cannot be read."""
    JOURNAL_DAMAGED = "JournalDamaged"
    """Bytes of the pod's journal were no events and were skipped, or it cannot be read."""
    EMERGENCY_LEG_DOWN = "EmergencyLegDown"
    """Emergency signals cannot arrive by the mounted ConfigMap at once."""
    CONSERVATIVE_MODE = "ConservativeMode"
    CHECKPOINT_FAILED = "CheckpointFailed"
    CHECKPOINT_VOLUME_FULL = "CheckpointVolumeFull"
    CHECKPOINT_CORRUPT = "CheckpointCorrupt"
    CHECKPOINT_SAVED = "CheckpointSaved"
    NO_CHECKPOINT = "NoCheckpoint"
    FAULT_INJECTED = "FaultInjected"
    COMMAND_REJECTED = "CommandRejected"
    SIGNAL_REJECTED = "SignalRejected"
    REPORT_REJECTED = "ReportRejected"
    """A report that claims to come from the run is not signed by it."""
    CONFIG_CHANGED = "ConfigChanged"
    LEARNING_RATE_SCALED = "LearningRateScaled"
    LEARNING_RATE_TAMPERED = "LearningRateTampered"
    """Something else than the schedule had changed a group's learning rate; it was put back."""
    OPTIMIZER_REBUILT = "OptimizerRebuilt"
    OPTIMIZER_REBUILD_FAILED = "OptimizerRebuildFailed"
    """The old optimizer was kept."""
    EMERGENCY_LEVEL_RAISED = "EmergencyLevelRaised"
    EMERGENCY_LEVEL_LOWERED = "EmergencyLevelLowered"
    BREAKER_OPENED = "BreakerOpened"
    BREAKER_CLOSED = "BreakerClosed"
    BOUNDARY_BUDGET_EXCEEDED = "BoundaryBudgetExceeded"
    BOUNDARY_FAILED = "BoundaryFailed"
    """What a boundary set out to do to the model failed, and was undone."""
    COMMAND_APPLIED = "CommandApplied"
    FEATURE_FALLBACK = "FeatureFallback"
    """A PyTorch feature that was asked for is off: torch.compile, CUDA graphs, a precision."""
    PROFILER_TRACE = "ProfilerTrace"
    PROFILER_FAILED = "ProfilerFailed"
    SNAPSHOTS_DISABLED = "SnapshotsDisabled"
    """Memory snapshots do not fit, or memory cannot be written."""
    CHECKPOINT_NOT_DURABLE = "CheckpointNotDurable"
    """The volume does not keep its word on O_DSYNC; fsync is used, or nothing is known to help."""
    CHECKPOINT_INFEASIBLE = "CheckpointInfeasible"
    """The volume is too slow or too small for this state; the message has the numbers."""
    RESTORE_FAILED = "RestoreFailed"
    """A tier of rollback failed; the next one follows."""
    SPARE_UNAVAILABLE = "SpareUnavailable"
    """No spare trainer is kept: memory is tight, or the user's module cannot be imported twice."""
    RECORD_INCOMPLETE = "RecordIncomplete"
    """Lines of the run's record were dropped."""

    # Anomalies and failures
    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRADIENT = "NonFiniteGradient"
    LOSS_SPIKE = "LossSpike"
    NON_FINITE_WEIGHT = "NonFiniteWeight"
    """A parameter, buffer or optimizer moment is not finite."""
    GRADIENT_EXPLOSION = "GradientExplosion"
    VALIDATION_REGRESSION = "ValidationRegression"
    TAMIYO_REQUEST = "TamiyoRequest"
    HANG = "Hang"
    TRAINER_KILLED = "TrainerKilled"
    TRAINER_CRASHED = "TrainerCrashed"
    OUT_OF_MEMORY = "OutOfMemory"
    USER_CODE_ERROR = "UserCodeError"
    ENTRYPOINT_NOT_FOUND = "EntrypointNotFound"
    ENTRYPOINT_WRONG_TYPE = "EntrypointWrongType"
    UNKNOWN_CONFIG_KEY = "UnknownConfigKey"
    NO_VALID_CHECKPOINT = "NoValidCheckpoint"
    CHECKPOINT_DIR_UNUSABLE = "CheckpointDirUnusable"
    CONTAINER_DIED = "ContainerDied"
    POD_LOST = "PodLost"
    ROLLBACKS_EXHAUSTED = "RollbacksExhausted"
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    JOB_FAILED = "JobFailed"

    # Recoveries
    ROLLED_BACK = "RolledBack"
    RESTARTED_IN_PLACE = "RestartedInPlace"
    POD_REPLACED = "PodReplaced"
    NEW_ATTEMPT = "NewAttempt"
    RESUMED = "Resumed"
    NO_ROLLBACK = "NoRollback"
    RECOVERABLE = "Recoverable"

    # Stopping
    EMERGENCY_STOP = "EmergencyStop"
    EMERGENCY_BROADCAST = "EmergencyBroadcast"
    FROZEN = "Frozen"
    HALT_REQUESTED = "HaltRequested"
    HALTED = "Halted"
    NOT_HALTED = "NotHalted"
    SUSPENDED = "Suspended"
    NOT_SUSPENDED = "NotSuspended"
    DRAINED = "Drained"

    # Ends
    COMPLETE = "Complete"
    NOT_FINISHED = "NotFinished"
    NOT_FAILED = "NotFailed"
    DELETED = "Deleted"


class CommandRejection(StrEnum):
    """Why Kasmina refused a command, in the order of its checks."""

    VERIFIER_UNAVAILABLE = "verifier_unavailable"
    HALTED = "halted"
    """The run is halted: no command acts."""
    MISSING_SIGNATURE = "missing_signature"
    UNKNOWN_KEY_ID = "unknown_key_id"
    INVALID_SIGNATURE = "invalid_signature"
    MALFORMED = "malformed"
    WRONG_VERSION = "wrong_version"
    WRONG_RUN = "wrong_run"
    MISSING_COMMAND_ID = "missing_command_id"
    UNKNOWN_PACKET = "unknown_packet"
    """Echoes no boundary that this verifier opened."""
    STALE_COMMAND = "stale_command"
    NONCE_REPLAYED = "nonce_replayed"
    """Nonce or command id were used before."""
    NONCE_LEDGER_FULL = "nonce_ledger_full"
    """More commands inside one freshness window than can be remembered; refused rather than one forgotten."""
    EXPIRED = "expired"
    """Its own execution deadline was over before it could act. The trainer's word, not Kasmina's."""


SUSPECT_COMMANDS: Final = frozenset(
    {
        CommandRejection.MISSING_SIGNATURE,
        CommandRejection.UNKNOWN_KEY_ID,
        CommandRejection.INVALID_SIGNATURE,
        CommandRejection.WRONG_RUN,
        CommandRejection.UNKNOWN_PACKET,
        CommandRejection.STALE_COMMAND,
        CommandRejection.NONCE_REPLAYED,
    }
)
"""Whoever sent such a command is not Tamiyo as it should be: told as CRITICAL."""


class SignalRejection(StrEnum):
    """Why an emergency signal was ignored."""

    MALFORMED = "malformed"
    MISSING_SIGNATURE = "missing_signature"
    UNKNOWN_KEY_ID = "unknown_key_id"
    INVALID_SIGNATURE = "invalid_signature"
    WRONG_VERSION = "wrong_version"
    WRONG_RUN = "wrong_run"
    WRONG_ATTEMPT = "wrong_attempt"
    REPLAYED = "replayed"
    """Not greater than the last (term, seq). A mere duplicate of the last is no rejection."""
