"""Exit codes of the tolaria container and of `esper run`. One table, two readers: runtime and operator."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Of the tolaria container. Anything else, or 128 + signal, is a crash of the supervisor itself."""

    COMPLETE = 0
    """Training is complete; nothing else ever exits 0."""
    TRAINER_CRASHED = 70
    """The trainer failed and restarts in place are exhausted or useless."""
    USER_CODE = 71
    """The user's code raised: bad entrypoint, wrong type, error in build, unknown config key. No restart helps."""
    NO_VALID_CHECKPOINT = 72
    """Checkpoints exist but none verifies."""
    ROLLBACK_EXHAUSTED = 73
    """maxRollbacks reached and onExhausted is Fail."""
    CHECKPOINT_DIR = 74
    """The checkpoint volume cannot be used, or another run claims it."""
    HALTED = 75
    """Stopped by emergency (Checkpoint or Kill, or onExhausted: Halt). Not a failure, no restart."""
    HUNG = 76
    """A hang that restarts in place did not cure."""
    CONFIG = 78
    """run.json or the environment is unusable: a bug between operator and runtime."""
    DRAINED = 143
    """SIGTERM handled: state saved, resume later. The Job replaces the pod."""


class SidecarExit(IntEnum):
    """Of the containers weatherlight, kasmina and tamiyo. Anything else is a crash of their PID 1."""

    STOPPED = 0
    """On request."""
    CRASH_LOOP = 70
    """A part of it failed again and again."""
    VOLUME = 74
    """The run's memory volume cannot be written."""
    KEY = 77
    """A key is missing or malformed."""
    CONFIG = 78
    """The environment is unusable: a bug between operator and runtime."""


class CliExit(IntEnum):
    """Of the esper command."""

    SUCCEEDED = 0
    ERROR = 1
    INVALID = 2
    HALTED = 3
    FAILED = 4
    INTERRUPTED = 130
