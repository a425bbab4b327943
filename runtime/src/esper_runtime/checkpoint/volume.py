"""The checkpoint volume as a directory: who owns it, where things lie, how names become durable.

Needs no torch, so the supervisor uses it too. A writer writes only below its own attempt; the layout is in
docs/design/0001-contracts.md.
"""

import ctypes
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from esper_leyline import paths

from esper_runtime.checkpoint.errors import CheckpointDirError

WAL_FILE = "wal.log"
RECORD_FILE = "record.jsonl"
BOOTS_FILE = "boots"
_ATTEMPT = re.compile(r"a(\d{5,})")
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_MAX_CLAIM_BYTES = 256
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE"""


class Volume:
    """Directories of one run and attempt below a checkpoint root. Creating the object touches nothing."""

    def __init__(self, root: Path, *, run_uid: str, attempt: int) -> None:
        if not run_uid or "/" in run_uid or run_uid.startswith("."):
            raise CheckpointDirError(f"run UID {run_uid!r} is no directory name")
        if attempt < 1:
            raise CheckpointDirError(f"attempt is {attempt}; attempts count from 1")
        self.root = root
        self.run_uid = run_uid
        self.attempt = attempt
        self.run_dir = root / run_uid
        self.attempt_dir = root / paths.attempt_dir(run_uid, attempt)
        self.export_dir = self.run_dir / paths.EXPORT_DIR
        self.wal_file = self.run_dir / WAL_FILE
        self.record_file = self.run_dir / RECORD_FILE

    def claim(self) -> None:
        """Makes the directory this run's own and its attempt directory present. Idempotent.

        CheckpointDirError when the root is missing or not writable, or when another run has claimed it.
        """
        try:
            self._claim_root()
            self.attempt_dir.mkdir(parents=True, exist_ok=True)
            _probe_write(self.attempt_dir)
            sync_directory(self.run_dir)
            sync_directory(self.root)
        except OSError as error:
            raise self.unusable(error) from error

    def _claim_root(self) -> None:
        marker = self.root / paths.CLAIM_MARKER
        owner = _read_owner(marker)
        if owner is None:
            _create_whole(marker, f"{self.run_uid}\n".encode())
            owner = _read_owner(marker)
        if owner == "":
            raise CheckpointDirError(
                f"{marker} is empty: a claim was interrupted; remove the file if no other run uses {self.root}"
            )
        if owner != self.run_uid:
            raise CheckpointDirError(
                f"{self.root} belongs to run {owner} ({paths.CLAIM_MARKER}), not to {self.run_uid}: "
                "give this run a claim or subPath of its own, or remove the old run's files"
            )

    def unusable(self, error: OSError) -> CheckpointDirError:
        """The error with what to do about it."""
        remedy = {
            errno.ENOENT: "mount the volume there",
            errno.ENOTDIR: "mount the volume there",
            errno.EROFS: "the volume is mounted read-only; mount it writable",
            errno.EACCES: "make it writable for the pod's fsGroup",
            errno.EPERM: "make it writable for the pod's fsGroup",
            errno.ENOSPC: "the volume is full; enlarge it or remove files",
            errno.EDQUOT: "the quota is used up; enlarge it or remove files",
        }.get(error.errno or 0, "check the volume")
        return CheckpointDirError(f"checkpoint directory {self.root} cannot be used: {error}; {remedy}")

    def attempts(self) -> list[int]:
        """Attempts that have a directory, highest first."""
        return attempts_below(self.run_dir)

    def superseded_by(self) -> int | None:
        """The highest attempt above ours, if there is one."""
        highest = next(iter(self.attempts()), self.attempt)
        return highest if highest > self.attempt else None

    def count_boot(self) -> int:
        """Records one more start of this attempt's container and returns its number, from 1. Call after claim().

        One line per start, appended: needs no free block after the first, and cannot be torn into a smaller number.
        """
        path = self.attempt_dir / BOOTS_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o660)
            try:
                written = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
                torn = bool(written) and not written.endswith(b"\n")
                number = written.count(b"\n") + int(torn) + 1
                os.write(descriptor, (b"\n" if torn else b"") + f"{number}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(self.attempt_dir)
        except OSError as error:
            raise self.unusable(error) from error
        return number


def attempts_below(run_dir: Path) -> list[int]:
    """Attempt numbers with a directory below `run_dir`, highest first; empty when the run never wrote."""
    try:
        names = os.listdir(run_dir)
    except FileNotFoundError:
        return []
    return sorted((int(match[1]) for match in map(_ATTEMPT.fullmatch, names) if match), reverse=True)


def sync_directory(path: Path) -> None:
    """Makes creations and renames in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network filesystems have no fsync for directories: nothing to wait for
            raise
    finally:
        os.close(descriptor)


def preallocate(descriptor: int, size: int, *, offset: int = 0, keep_size: bool = False) -> None:
    """Reserves room now, so that a full disk is known before the first byte. Skipped where a filesystem cannot.

    With `keep_size` the file does not become longer. OSError when there is no room.
    """
    if size == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    mode = _KEEP_SIZE if keep_size else 0
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
        error = ctypes.get_errno()
        if error not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(error, os.strerror(error))


def tree(path: Path) -> Iterator[Path]:
    """Everything below `path`, children before parents, links not followed."""
    for directory, folders, files in os.walk(path, topdown=False):
        yield from (Path(directory, name) for name in (*files, *folders))


def remove_tree(path: Path) -> None:
    """Deletes a directory and its content. What is already gone is no error; everything else is an OSError."""
    for entry in tree(path):
        if entry.is_dir() and not entry.is_symlink():
            entry.rmdir()
        else:
            entry.unlink(missing_ok=True)
    if path.exists():
        path.rmdir()


def _read_owner(marker: Path) -> str | None:
    try:
        with marker.open("rb") as file:
            return file.read(_MAX_CLAIM_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def _create_whole(path: Path, content: bytes) -> None:
    """Creates `path` with its content in one step; does nothing when it exists."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _write_new(draft, content)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another claim came first; the caller reads whose
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _write_new(path, content)
    finally:
        draft.unlink()


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _probe_write(directory: Path) -> None:
    """Fails where files cannot be created. A full volume passes: training goes on without new checkpoints."""
    probe = directory / f".probe.{secrets.token_hex(4)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        probe.unlink()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
