"""The write-ahead log of a run: small facts that must survive every death of every attempt.

A record is a 256-byte header (magic, version, kind, sequence, times, payload length and CRC32C, CRC32C of the record
before, CRC32C of the header) and a JSON payload. One append is one write and one fdatasync. Replay stops at the first
record that does not verify and cuts the file there: a torn tail is forgotten, never half believed. One process
writes at a time: the trainer, or the supervisor while no trainer lives. Needs no torch.
"""

import errno
import fcntl
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import crc32c
from esper_leyline.phases import RestoreOutcome
from esper_leyline.v1.report_pb2 import Counters

from esper_runtime.checkpoint.errors import CheckpointError
from esper_runtime.checkpoint.volume import sync_directory

MAGIC = b"ESPERWAL"
VERSION = 2
HEADER_BYTES = 256
MAX_PAYLOAD = 1024 * 1024
COMPACT_BYTES = 4 * 1024 * 1024
"""A larger log is replaced by one record of its state when it is opened."""
MAX_REMEMBERED = 1000
"""Rollback times and skipped positions kept in the state; older ones fall out, totals stay."""

_FIELDS = struct.Struct("<8sHHIQQQII")  # magic, version, kind, length, sequence, monotonic, wall, payload, previous
_CRC = struct.Struct("<I")
log = logging.getLogger(__name__)


class WalError(CheckpointError):
    """A record that cannot be written, or a log that this version cannot read."""


class Kind(StrEnum):
    """What a record says. Fields in parentheses are those of `append`."""

    ROLLBACK = "rollback"
    """In-process rollback (cause, from_step, to_step, time: Unix seconds)."""
    SKIP = "skip"
    """Batches never to be trained on (positions: list of int)."""
    FAULT = "fault"
    """An injected fault has fired (key: str)."""
    LEARNING_RATE = "learning_rate"
    """The learning rate's scale from now on (scale)."""
    RESTART = "restart"
    """The trainer was started again inside its pod (cause, step)."""
    CHECKPOINT_FAILURE = "checkpoint_failure"
    """A save failed (step, error)."""
    REJECTED_COMMAND = "rejected_command"
    """(reason)"""
    REJECTED_SIGNAL = "rejected_signal"
    """(reason)"""
    STATE = "state"
    """All of the state at once; written by compaction."""
    RESTORE_FAILURE = "restore_failure"
    """A tier of rollback failed (outcome: esper_leyline.phases.RestoreOutcome, tier: RollbackTier)."""
    LEVEL = "level"
    """The emergency level from now on (level: 0 to 4, reason, id)."""
    BEGIN = "begin"
    """A save begins (txn, step, epoch)."""
    COMMIT = "commit"
    """It is on the volume, whole (txn, attempt, number, step, files)."""
    ABORT = "abort"
    """It failed and left nothing (txn, error)."""
    # Its place in this list is a kind's number on disk: add at the end.


_CODES = {kind: code for code, kind in enumerate(Kind, start=1)}
_RESTORE_COUNTERS = {
    RestoreOutcome.NO_CHECKPOINT: "restores_without_checkpoint",
    RestoreOutcome.INTEGRITY_FAILED: "restores_failed_integrity",
    RestoreOutcome.DEADLINE_EXCEEDED: "restores_over_deadline",
    RestoreOutcome.APPLY_FAILED: "restores_failed_apply",
}
_BY_CODE = {code: kind for kind, code in _CODES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class WalState:
    """The sum of all records."""

    rollbacks: int = 0
    in_place_restarts: int = 0
    skipped_batches: int = 0
    checkpoint_failures: int = 0
    rejected_commands: int = 0
    rejected_signals: int = 0
    fired_faults: frozenset[str] = frozenset()
    learning_rate_scale: float = 1.0
    rollback_times: tuple[float, ...] = ()
    """Unix seconds of the newest MAX_REMEMBERED rollbacks, oldest first."""
    restores_without_checkpoint: int = 0
    restores_failed_integrity: int = 0
    restores_over_deadline: int = 0
    restores_failed_apply: int = 0
    level: int = 0
    """EmergencyLevel; 0: none."""
    skipped_positions: tuple[int, ...] = ()
    """The newest MAX_REMEMBERED positions of skipped batches, in the order they were skipped."""

    def counters(self) -> Counters:
        return Counters(
            rollbacks=self.rollbacks,
            in_place_restarts=self.in_place_restarts,
            skipped_batches=self.skipped_batches,
            checkpoint_failures=self.checkpoint_failures,
            rejected_commands=self.rejected_commands,
            rejected_signals=self.rejected_signals,
            restores_without_checkpoint=self.restores_without_checkpoint,
            restores_failed_integrity=self.restores_failed_integrity,
            restores_over_deadline=self.restores_over_deadline,
            restores_failed_apply=self.restores_failed_apply,
        )

    def after(self, kind: Kind, fields: dict[str, Any]) -> "WalState":
        """The state with one more record. KeyError, TypeError or ValueError when a field is missing or of no use."""
        match kind:
            case Kind.ROLLBACK:
                times = (*self.rollback_times, float(fields["time"]))[-MAX_REMEMBERED:]
                return replace(self, rollbacks=self.rollbacks + 1, rollback_times=times)
            case Kind.SKIP:
                positions = [int(position) for position in fields["positions"]]
                return replace(
                    self,
                    skipped_batches=self.skipped_batches + len(positions),
                    skipped_positions=(*self.skipped_positions, *positions)[-MAX_REMEMBERED:],
                )
            case Kind.FAULT:
                return replace(self, fired_faults=self.fired_faults | {str(fields["key"])})
            case Kind.LEARNING_RATE:
                return replace(self, learning_rate_scale=float(fields["scale"]))
            case Kind.RESTART:
                return replace(self, in_place_restarts=self.in_place_restarts + 1)
            case Kind.CHECKPOINT_FAILURE:
                return replace(self, checkpoint_failures=self.checkpoint_failures + 1)
            case Kind.REJECTED_COMMAND:
                return replace(self, rejected_commands=self.rejected_commands + 1)
            case Kind.REJECTED_SIGNAL:
                return replace(self, rejected_signals=self.rejected_signals + 1)
            case Kind.STATE:
                return _state_of(fields)
            case Kind.RESTORE_FAILURE:
                counter = _RESTORE_COUNTERS[RestoreOutcome(fields["outcome"])]
                return replace(self, **{counter: getattr(self, counter) + 1})
            case Kind.LEVEL:
                return replace(self, level=int(fields["level"]))
            case Kind.BEGIN | Kind.COMMIT | Kind.ABORT:
                return self

    def fields(self) -> dict[str, Any]:
        """Content of a STATE record."""
        return {
            "rollbacks": self.rollbacks,
            "in_place_restarts": self.in_place_restarts,
            "skipped_batches": self.skipped_batches,
            "checkpoint_failures": self.checkpoint_failures,
            "rejected_commands": self.rejected_commands,
            "rejected_signals": self.rejected_signals,
            "restores_without_checkpoint": self.restores_without_checkpoint,
            "restores_failed_integrity": self.restores_failed_integrity,
            "restores_over_deadline": self.restores_over_deadline,
            "restores_failed_apply": self.restores_failed_apply,
            "level": self.level,
            "fired_faults": sorted(self.fired_faults),
            "learning_rate_scale": self.learning_rate_scale,
            "rollback_times": list(self.rollback_times),
            "skipped_positions": list(self.skipped_positions),
        }


def _state_of(fields: dict[str, Any]) -> WalState:
    tuples = {
        "rollback_times": tuple(fields["rollback_times"]),
        "skipped_positions": tuple(fields["skipped_positions"]),
    }
    return WalState(**{**fields, **tuples, "fired_faults": frozenset(fields["fired_faults"])})


@dataclass(slots=True)
class _Tail:
    """Where the next record goes and what it links to."""

    offset: int = 0
    sequence: int = 0
    crc: int = 0
    state: WalState = field(default_factory=WalState)


class Wal:
    """One open log. The first replay or append opens (and creates) the file."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.path = path
        self.cut_bytes = 0
        """Bytes that replay cut off: a torn tail, or everything behind a damaged record (kept as <path>.cut)."""
        self._clock = clock
        self._monotonic_ns = monotonic_ns
        self._descriptor: int | None = None
        self._tail = _Tail()

    @property
    def state(self) -> WalState:
        """State after the newest record read or written by this object."""
        return self._tail.state

    def replay(self) -> WalState:
        """Reads the whole log and makes it ready for append. OSError when the volume fails; WalError: newer version."""
        self.close()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        _lock(self._descriptor, self.path)
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        if not data:
            sync_directory(self.path.parent)
        self._tail = _Tail()
        for tail in _records(data, self.path):
            self._tail = tail
        self.cut_bytes = len(data) - self._tail.offset
        if self.cut_bytes:
            self._cut(data)
        if self._tail.offset > COMPACT_BYTES:
            self._compact()
        return self.state

    def append(self, kind: Kind | str, **fields: Any) -> WalState:
        """Makes one fact durable (on return) and gives the new state. After an OSError the log is as before."""
        if self._descriptor is None:
            self.replay()
        assert self._descriptor is not None
        kind = Kind(kind)
        try:
            state = self._tail.state.after(kind, fields)
        except (KeyError, TypeError, ValueError) as error:
            raise WalError(f"record {kind}: field {error} is missing or of the wrong type") from error
        record, crc = self._encode(kind, fields, self._tail.sequence + 1, self._tail.crc)
        try:
            _write_whole(self._descriptor, record, self._tail.offset)
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self._tail.offset)
            raise
        self._tail = _Tail(self._tail.offset + len(record), self._tail.sequence + 1, crc, state)
        return state

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _encode(self, kind: Kind, fields: dict[str, Any], sequence: int, previous: int) -> tuple[bytes, int]:
        payload = json.dumps(fields, sort_keys=True, allow_nan=False).encode()
        if len(payload) > MAX_PAYLOAD:
            raise WalError(f"record {kind} has {len(payload)} bytes; at most {MAX_PAYLOAD}")
        head = _FIELDS.pack(
            MAGIC, VERSION, _CODES[kind], len(payload), sequence,
            self._monotonic_ns(), int(self._clock() * 1e9), crc32c.crc32c(payload), previous,
        ).ljust(HEADER_BYTES - _CRC.size, b"\0")  # fmt: skip
        crc = crc32c.crc32c(head)
        return head + _CRC.pack(crc) + payload, crc

    def _cut(self, data: bytes) -> None:
        assert self._descriptor is not None
        try:
            self.path.with_name(self.path.name + ".cut").write_bytes(data[self._tail.offset :])
        except OSError as error:  # a full volume: the copy is for people, the log itself needs no more room
            log.warning("cannot keep what was cut off %s: %s", self.path, error)
        os.ftruncate(self._descriptor, self._tail.offset)
        os.fdatasync(self._descriptor)

    def _compact(self) -> None:
        record, crc = self._encode(Kind.STATE, self.state.fields(), self._tail.sequence + 1, 0)
        draft = self.path.with_name(self.path.name + ".new")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            _write_whole(descriptor, record, 0)
            os.fsync(descriptor)
            draft.rename(self.path)
        except OSError:
            os.close(descriptor)
            raise
        sync_directory(self.path.parent)
        self.close()
        self._descriptor = descriptor
        self._tail = _Tail(len(record), self._tail.sequence + 1, crc, self.state)


def _lock(descriptor: int, path: Path) -> None:
    """One writing process. The lock goes with the process, so a dead one leaves none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise WalError(f"{path} is being written by another process of this run") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _records(data: bytes, path: Path) -> Iterator[_Tail]:
    """The tail after each record that verifies, up to the first that does not."""
    tail = _Tail()
    while (header := data[tail.offset : tail.offset + HEADER_BYTES]) and len(header) == HEADER_BYTES:
        head, crc = header[: -_CRC.size], _CRC.unpack(header[-_CRC.size :])[0]
        magic, version, code, length, sequence, _, _, payload_crc, previous = _FIELDS.unpack_from(head)
        if magic != MAGIC or crc32c.crc32c(head) != crc:
            return
        if version != VERSION or code not in _BY_CODE:
            raise WalError(f"{path} has records of version {version}, kind {code}: use a runtime of the newer release")
        begin = tail.offset + HEADER_BYTES
        payload = data[begin : begin + length]
        first = tail.offset == 0
        linked = previous == tail.crc and (first or sequence == tail.sequence + 1)
        if not linked or len(payload) != length or crc32c.crc32c(payload) != payload_crc:
            return
        try:
            state = tail.state.after(_BY_CODE[code], json.loads(payload))
        except (KeyError, TypeError, ValueError) as error:
            raise WalError(f"{path}: record {sequence} verifies but makes no sense: {error!r}") from error
        tail = _Tail(begin + length, sequence, crc, state)
        yield tail


def _write_whole(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
