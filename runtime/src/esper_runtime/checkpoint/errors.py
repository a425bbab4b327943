"""What can go wrong with durable state, by what the caller can do about it.

CheckpointError
 ├─ CheckpointDirError        the volume cannot be used: exit 74, a person must act
 ├─ CorruptFileError          one file does not verify: use an older generation
 ├─ NoValidCheckpointError    generations exist, none verifies: exit 72
 ├─ AbandonedError            this load was told to stop: nobody waits for it any more
 └─ SaveError                 this save failed: train on, the older generations are intact
     └─ SupersededError       a newer attempt of the run owns the directory: stop
"""

from pathlib import Path


class CheckpointError(Exception):
    """Base of all errors of this package."""


class CheckpointDirError(CheckpointError):
    """The checkpoint directory cannot be used; the message names the remedy."""


class CorruptFileError(CheckpointError):
    """A file is not what its manifest says. `where` is its path relative to the run's directory."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


class NoValidCheckpointError(CheckpointError):
    """Generations exist (or were asked for by resumeFrom), but none can be used. `corrupt` says why, newest first."""

    def __init__(self, message: str, corrupt: tuple[str, ...] = ()) -> None:
        super().__init__("; ".join((message, *corrupt)))
        self.corrupt = corrupt


class AbandonedError(CheckpointError):
    """A load stopped between two chunks because its caller gave it up."""


class SaveError(CheckpointError):
    """A save that left nothing behind. `errno` is the operating system's, None when it was not at fault."""

    def __init__(self, message: str, *, errno: int | None = None, path: Path | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.path = path


class SupersededError(SaveError):
    """A newer attempt exists: this writer is a remnant and must not write any more."""
