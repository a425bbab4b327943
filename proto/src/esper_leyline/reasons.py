"""CamelCase reasons: of conditions, history entries, Events, reports and rejections. One list for all sides."""

from enum import StrEnum


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
    CONFIG_CHANGED = "ConfigChanged"
    LEARNING_RATE_SCALED = "LearningRateScaled"

    # Anomalies and failures
    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRADIENT = "NonFiniteGradient"
    LOSS_SPIKE = "LossSpike"
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


class CommandRejection(StrEnum):
    """Why Kasmina refused a command, in the order of its checks."""

    VERIFIER_UNAVAILABLE = "verifier_unavailable"
    MISSING_SIGNATURE = "missing_signature"
    UNKNOWN_KEY_ID = "unknown_key_id"
    INVALID_SIGNATURE = "invalid_signature"
    MALFORMED = "malformed"
    WRONG_RUN = "wrong_run"
    MISSING_COMMAND_ID = "missing_command_id"
    UNKNOWN_PACKET = "unknown_packet"
    """Echoes no boundary that this verifier opened."""
    STALE_COMMAND = "stale_command"
    NONCE_REPLAYED = "nonce_replayed"
    """Nonce or command id were used before."""
    NONCE_LEDGER_FULL = "nonce_ledger_full"
    """More commands inside one freshness window than can be remembered; refused rather than one forgotten."""


class SignalRejection(StrEnum):
    """Why an emergency signal was ignored."""

    MALFORMED = "malformed"
    MISSING_SIGNATURE = "missing_signature"
    UNKNOWN_KEY_ID = "unknown_key_id"
    INVALID_SIGNATURE = "invalid_signature"
    WRONG_RUN = "wrong_run"
    WRONG_ATTEMPT = "wrong_attempt"
    REPLAYED = "replayed"
    """Not greater than the last (term, seq). A mere duplicate of the last is no rejection."""
