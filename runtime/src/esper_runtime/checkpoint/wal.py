"""The write-ahead log of a run: small facts that must survive every death of every attempt.

A record is a 256-byte header (magic, version, kind, sequence, times, payload length and CRC32C, CRC32C of the record
before, CRC32C of the header) and a JSON payload. One append is one write and one fdatasync. Replay stops at the first
record that does not verify and cuts the file there: a torn tail is forgotten, never half believed. One process
writes at a time: the trainer, or the supervisor while no trainer lives. Needs no torch.

Inside the trainer two threads append: training and the checkpoint writer. Only the write itself is done one after the
other; each thread then syncs by itself, so that neither waits longer than for the disk. A record counts once its own
sync and every sync under way beside it have succeeded: the kernel tells an error to one of them only.
"""

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper_runtime.checkpoint.transactions import Transactions
from esper_runtime.checkpoint.volume import preallocate, sync_directory
from esper_runtime.checkpoint.walformat import HEADER_BYTES, MAX_PAYLOAD, Record, WalError, encode, records
from esper_runtime.checkpoint.walstate import Kind, WalState

__all__ = ["COMPACT_BYTES", "HEADER_BYTES", "MAX_PAYLOAD", "Kind", "Log", "Wal", "WalError", "WalState", "read_log"]

COMPACT_BYTES = 4 * 1024 * 1024
"""A larger log is replaced by one record of its state."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Tail:
    """Where the next record goes, what it links to, and what the records up to here add up to."""

    offset: int = 0
    sequence: int = 0
    crc: int = 0
    state: WalState = field(default_factory=WalState)
    transactions: Transactions = field(default_factory=Transactions)

    def after(self, record: Record, path: Path) -> "_Tail":
        try:
            state = self.state.after(record.kind, record.fields)
            transactions = self.transactions.after(record.kind, record.fields)
        except (KeyError, TypeError, ValueError) as error:
            raise WalError(f"{path}: record {record.sequence} verifies but makes no sense: {error!r}") from error
        return _Tail(record.end, record.sequence, record.crc, state, transactions)


class Wal:
    """One open log. The first replay or append opens (and creates) the file. Safe for several threads."""

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
        self._draft = path.with_name(path.name + ".new")
        self._clock = clock
        self._monotonic_ns = monotonic_ns
        self._descriptor: int | None = None
        self._changed = threading.Condition()
        self._tail = _Tail()
        self._durable = self._tail
        """The newest that a successful sync stands behind."""
        self._syncing: set[int] = set()
        """Sequences of the records that are written and wait for their sync."""
        self._failures = 0
        self._broken = False
        """A sync failed, and what follows the durable tail is not cut off yet."""
        self._named = False
        """The directory's entry for the file is known to be on the disk."""
        self._compact_above = COMPACT_BYTES

    @property
    def state(self) -> WalState:
        """State after the newest record read or written by this object."""
        return self._tail.state

    @property
    def transactions(self) -> Transactions:
        """Saves, as the newest record leaves them."""
        return self._tail.transactions

    def replay(self) -> WalState:
        """Reads the whole log and makes it ready for append. OSError when the volume fails; WalError: newer version."""
        with self._changed:
            return self._replay()

    def _replay(self) -> WalState:
        self._close()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        _lock(self._descriptor, self.path)
        data = _read_whole(self._descriptor, self.path)
        self._named = bool(data)
        self._tail, self._compact_above = _Tail(), COMPACT_BYTES
        for record in records(data, self.path):
            self._tail = self._tail.after(record, self.path)
        self.cut_bytes = len(data) - self._tail.offset
        if self.cut_bytes:
            self._cut(data)
        self._durable, self._broken = self._tail, False
        self._shorten()
        self._name()
        return self.state

    def append(self, kind: Kind | str, **fields: Any) -> WalState:
        """Makes one fact durable (on return) and gives the new state. After an OSError the log is as before."""
        kind = Kind(kind)
        with self._changed:
            self._changed.wait_for(lambda: not (self._broken and self._syncing))
            if self._broken:
                self._repair()
            if self._descriptor is None:
                self._replay()
            if not self._syncing:
                self._shorten()
            self._name()
            descriptor, mine, failures = self._descriptor, self._write(kind, fields), self._failures
            self._syncing.add(mine.sequence)
        assert descriptor is not None
        failure: OSError | None = None
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            failure = error
        self._settle(mine, failures, failure)
        return mine.state

    def _write(self, kind: Kind, fields: dict[str, Any]) -> _Tail:
        """The tail with one more record, in the file but not synced."""
        assert self._descriptor is not None
        before = self._tail
        try:
            state = before.state.after(kind, fields)
            transactions = before.transactions.after(kind, fields)
        except (KeyError, TypeError, ValueError) as error:
            raise WalError(f"record {kind}: field {error} is missing or of the wrong type") from error
        record, crc = self._encode(kind, fields, before.sequence + 1, before.crc)
        try:
            _write_whole(self._descriptor, record, before.offset)
        except OSError:
            os.ftruncate(self._descriptor, before.offset)
            raise
        self._tail = _Tail(before.offset + len(record), before.sequence + 1, crc, state, transactions)
        return self._tail

    def _settle(self, mine: _Tail, failures: int, failure: OSError | None) -> None:
        """Waits for the syncs beside this one. OSError, with the log cut back, when any of them failed."""
        with self._changed:
            self._syncing.discard(mine.sequence)
            beside = frozenset(self._syncing)
            if failure is not None:
                self._failures += 1
                self._broken = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (beside & self._syncing))
            if self._failures == failures:
                if mine.sequence > self._durable.sequence:
                    self._durable = mine
                return
            if self._broken and not self._syncing:
                self._repair()
        raise failure or OSError(errno.EIO, "the sync of a record beside this one failed", str(self.path))

    def _repair(self) -> None:
        """Back to what is known to be on the disk."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self._durable.offset)
        self._tail, self._broken = self._durable, False
        self._changed.notify_all()

    def reserve(self, size: int) -> None:
        """Makes room for so many more bytes of records, where the filesystem can. OSError when there is none."""
        with self._changed:
            if self._descriptor is None:
                self._replay()
            assert self._descriptor is not None
            preallocate(self._descriptor, size, offset=self._tail.offset, keep_size=True)

    def close(self) -> None:
        with self._changed:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _encode(self, kind: Kind, fields: dict[str, Any], sequence: int, previous: int) -> tuple[bytes, int]:
        return encode(
            kind,
            fields,
            sequence=sequence,
            previous=previous,
            monotonic_ns=self._monotonic_ns(),
            wall_ns=int(self._clock() * 1e9),
        )

    def _cut(self, data: bytes) -> None:
        assert self._descriptor is not None
        try:
            self.path.with_name(self.path.name + ".cut").write_bytes(data[self._tail.offset :])
        except OSError as error:  # a full volume: the copy is for people, the log itself needs no more room
            log.warning("cannot keep what was cut off %s: %s", self.path, error)
        os.ftruncate(self._descriptor, self._tail.offset)
        os.fdatasync(self._descriptor)

    def _name(self) -> None:
        if not self._named:
            sync_directory(self.path.parent)
            self._named = True

    def _shorten(self) -> None:
        """Compacts a log that has become long. One that cannot be is as good as before, and is tried again later."""
        if self._tail.offset <= self._compact_above:
            return
        try:
            self._compact()
        except (OSError, WalError) as error:
            with contextlib.suppress(OSError):
                self._draft.unlink(missing_ok=True)
            self._compact_above = self._tail.offset + COMPACT_BYTES
            log.warning("%s stays long, %d bytes: %s", self.path, self._tail.offset, error)

    def _compact(self) -> None:
        before = self._tail
        whole = {**before.state.fields(), "transactions": before.transactions.fields()}
        record, crc = self._encode(Kind.STATE, whole, before.sequence + 1, 0)
        draft = self._draft
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            _write_whole(descriptor, record, 0)
            os.fsync(descriptor)
            _lock(descriptor, draft)
            draft.rename(self.path)
        except (OSError, WalError):
            os.close(descriptor)
            raise
        self._close()
        self._descriptor, self._named = descriptor, False
        self._tail = self._durable = _Tail(len(record), before.sequence + 1, crc, before.state, before.transactions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A log as it lies on the disk."""

    records: int
    state: WalState
    transactions: Transactions
    size_bytes: int
    torn_bytes: int
    """Behind the last record that verifies."""


def read_log(path: Path) -> Log:
    """Reads a log without opening it for writing: of a copy, or beside its writer. OSError or WalError."""
    data = path.read_bytes()
    tail, count = _Tail(), 0
    for record in records(data, path):
        tail, count = tail.after(record, path), count + 1
    return Log(
        records=count,
        state=tail.state,
        transactions=tail.transactions,
        size_bytes=len(data),
        torn_bytes=len(data) - tail.offset,
    )


def _lock(descriptor: int, path: Path) -> None:
    """One writing process. The lock goes with the process, so a dead one leaves none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise WalError(f"{path} is being written by another process of this run") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _read_whole(descriptor: int, path: Path) -> bytes:
    """OSError when the file is shorter than the filesystem says: a torn tail is told from a volume that fails."""
    size, parts, done = os.fstat(descriptor).st_size, [], 0
    while done < size:
        part = os.pread(descriptor, size - done, done)
        if not part:
            raise OSError(errno.EIO, f"only {done} of {size} bytes can be read", str(path))
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _write_whole(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
