"""The bounded log of signed reports, in memory and in one file of the memory volume.

A report is on the volume before anybody outside sees it, so a worker killed at any instant continues with the next
number and never gives one number to two contents. A report of plain progress is kept only while it is the newest:
the next report says the same and more. The file is a sequence of frames, each appended by one write; a torn frame
at the end was never shown to anybody and is cut off.
"""

import bisect
import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import crc32c

from esper_runtime.sidecar.http import write_atomically

FILE: Final = "reports.log"
MAX_REPORTS: Final = 4096
MAX_BYTES: Final = 8 * 1024 * 1024
_SLACK_BYTES: Final = 2 * 1024 * 1024
"""The file is rewritten when it holds this much more than what is kept."""

_MAGIC: Final = b"ESPR"
_FRAME: Final = struct.Struct("<4sII")
_STATE: Final = struct.Struct("<QQII")
_RECORD: Final = struct.Struct("<Q?I")


class Record(NamedTuple):
    seq: int
    event: bool
    """False: plain progress, which gives way to the next record."""
    envelope: bytes
    """Serialized and signed; sent again byte by byte."""


class State(NamedTuple):
    """What is remembered with the newest records, in the same write."""

    journal_offset: int = 0
    """Up to here the journal is in reports."""
    evicted_seq: int = 0
    """The newest record with an event that had to go."""
    dead_incarnation: int = 0
    rejected_signals: int = 0


class ReportLog:
    """Records by seq, which only rises. One instance per directory."""

    def __init__(self, directory: Path, *, max_reports: int = MAX_REPORTS, max_bytes: int = MAX_BYTES) -> None:
        self._path = directory / FILE
        self._max_reports = max_reports
        self._max_bytes = max_bytes
        self._records: list[Record] = []
        self._bytes = 0
        self.state = State()
        self.problem = ""
        """Why the newest records are not on the volume; empty when they are."""
        for leftover in directory.glob(f".{FILE}.*"):
            leftover.unlink()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        self._size = self._load()

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def last(self) -> Record | None:
        return self._records[-1] if self._records else None

    @property
    def last_seq(self) -> int:
        return self._records[-1].seq if self._records else 0

    @property
    def first_seq(self) -> int:
        """No event before this one is kept any more; the first ever when nothing had to go."""
        return self.state.evicted_seq + 1

    def after(self, seq: int, *, max_bytes: int = MAX_BYTES) -> list[Record]:
        """Records greater than `seq` in order, as many as fit (at least one when there is any)."""
        found: list[Record] = []
        size = 0
        for record in self._records[bisect.bisect_right(self._records, seq, key=_seq) :]:
            size += len(record.envelope)
            if found and size > max_bytes:
                break
            found.append(record)
        return found

    def next_after(self, seq: int) -> Record | None:
        at = bisect.bisect_right(self._records, seq, key=_seq)
        return self._records[at] if at < len(self._records) else None

    def waiting(self, seq: int) -> tuple[int, int]:
        """Number and bytes of the records greater than `seq`."""
        rest = self._records[bisect.bisect_right(self._records, seq, key=_seq) :]
        return len(rest), sum(len(record.envelope) for record in rest)

    # --- writing -------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[Record], state: State) -> int:
        """Adds records and remembers the state, together or not at all. The number of events that had to go.

        When the volume cannot take them they are kept in memory alone, and `problem` says why.
        """
        for record in records:
            if record.seq <= self.last_seq:
                raise ValueError(f"report {record.seq} after {self.last_seq}: numbers must rise")
            self._keep(record)
        evicted = self._evict()
        evicted_seq = max([self.state.evicted_seq, *(record.seq for record in evicted)])
        self.state = state._replace(evicted_seq=evicted_seq)
        try:
            self._write(_frame(self.state, records))
            if self._size > self._bytes + _SLACK_BYTES:
                self._rewrite()
        except OSError as error:
            self.problem = f"reports cannot be kept on the memory volume: {error.strerror}"
        else:
            self.problem = ""
        return len(evicted)

    def close(self) -> None:
        os.close(self._descriptor)

    def _keep(self, record: Record) -> None:
        if self._records and not self._records[-1].event:
            self._bytes -= len(self._records.pop().envelope)
        self._records.append(record)
        self._bytes += len(record.envelope)

    def _evict(self) -> list[Record]:
        count, size = 0, self._bytes
        while len(self._records) - count > 1 and (
            len(self._records) - count > self._max_reports or size > self._max_bytes
        ):
            size -= len(self._records[count].envelope)
            count += 1
        evicted = self._records[:count]
        del self._records[:count]
        self._bytes = size
        return evicted

    def _write(self, frame: bytes) -> None:
        if self.problem:
            self._rewrite()  # all that could not be written since
            return
        try:
            written = os.pwrite(self._descriptor, frame, self._size)
            if written < len(frame):
                raise OSError(28, "no space left for a whole frame")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(frame)

    def _rewrite(self) -> None:
        """Replaces the file by one that holds just what is kept."""
        frame = _frame(self.state, self._records)
        write_atomically(self._path, frame)
        os.close(self._descriptor)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._size = len(frame)

    def _load(self) -> int:
        """Takes in the whole frames and cuts off the rest; the size that remains."""
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        whole = 0
        for end, state, records in _frames(content):
            whole, self.state = end, state
            for record in records:
                self._keep(record)
        self._evict()
        os.ftruncate(self._descriptor, whole)
        return whole


def _seq(record: Record) -> int:
    return record.seq


def _frame(state: State, records: Sequence[Record]) -> bytes:
    payload = b"".join(
        [
            _STATE.pack(*state),
            *(_RECORD.pack(r.seq, r.event, len(r.envelope)) + r.envelope for r in records),
        ]
    )
    return _FRAME.pack(_MAGIC, len(payload), crc32c.crc32c(payload)) + payload


def _frames(content: bytes) -> Iterator[tuple[int, State, list[Record]]]:
    """Whole frames with the offset of their ends; stops at the first that is not whole."""
    at = 0
    while at + _FRAME.size <= len(content):
        magic, length, checksum = _FRAME.unpack_from(content, at)
        payload = content[at + _FRAME.size : at + _FRAME.size + length]
        if magic != _MAGIC or len(payload) < length or crc32c.crc32c(payload) != checksum:
            return
        at += _FRAME.size + length
        yield at, State(*_STATE.unpack_from(payload)), list(_records(payload))


def _records(payload: bytes) -> Iterator[Record]:
    at = _STATE.size
    while at < len(payload):
        seq, event, length = _RECORD.unpack_from(payload, at)
        at += _RECORD.size
        yield Record(seq, event, payload[at : at + length])
        at += length
