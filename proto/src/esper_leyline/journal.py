"""The pod's journal: RuntimeEvents that supervisor and trainer append and weatherlight reads.

A file in the memory volume. A frame is magic, length, CRC32C of the payload, payload; each is one write(2) with
O_APPEND, so writers need no lock and nothing ever blocks on a reader. A frame torn by a kill is skipped by
searching the next magic. Offsets only rise: the reader gives memory back by punching holes into what it has
consumed, and a writer that finds MAX_RESIDENT_BYTES in use drops what may be dropped and says so.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import crc32c
from google.protobuf.message import DecodeError

from esper_leyline.v1.report_pb2 import RuntimeEvent

MAGIC = b"ESPJ"
_HEADER = struct.Struct("<4sII")
MAX_PAYLOAD = 64 * 1024
MAX_RESIDENT_BYTES = 16 * 1024 * 1024
DROPPABLE = frozenset({"epoch", "checkpoint", "notice"})
"""Events whose content the next one of its kind repeats."""

_CHUNK = 64 * 1024
_FALLOC_KEEP_SIZE_AND_PUNCH_HOLE = 0x03


class JournalError(Exception):
    """An event that does not fit, or a journal that cannot be opened."""


class JournalWriter:
    """Appends events. One per process; safe beside other writers of the same file."""

    def __init__(self, path: Path) -> None:
        self.dropped = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o660)

    def append(self, event: RuntimeEvent) -> bool:
        """Writes one frame. False (counted in `dropped`) when there is no room: the volume is full, or the journal
        holds MAX_RESIDENT_BYTES and the event may be dropped. A journal that is full never stops its writer."""
        payload = event.SerializeToString()
        if len(payload) > MAX_PAYLOAD:
            raise JournalError(f"event of {len(payload)} bytes; at most {MAX_PAYLOAD}")
        droppable = event.WhichOneof("event") in DROPPABLE
        if droppable and os.fstat(self._descriptor).st_blocks * 512 > MAX_RESIDENT_BYTES:
            self.dropped += 1
            return False
        written = self._write(_HEADER.pack(MAGIC, len(payload), crc32c.crc32c(payload)) + payload)
        self.dropped += not written
        return written

    def _write(self, frame: bytes) -> bool:
        """One write(2), never continued: a second one could land behind another writer's frame."""
        try:
            return os.write(self._descriptor, frame) == len(frame)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False

    def close(self) -> None:
        os.close(self._descriptor)


class JournalReader:
    """Reads frames from an offset on; `offset` is the end of what was given out or skipped."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.skipped_bytes = 0
        """Bytes that were no whole frame: torn by a kill, or foreign. What was released does not count."""
        self._descriptor: int | None = None

    def events(self) -> Iterator[RuntimeEvent]:
        """All whole frames now in the file. Ends at one that may still be written; call again when it has grown."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        while (found := self._next(self._descriptor)) is not None:
            yield found

    def _next(self, descriptor: int) -> RuntimeEvent | None:
        """The next whole frame, wherever it begins; None when there is none yet."""
        if not self._pass_hole(descriptor):
            return None
        at, frame, doubtful = _scan(descriptor, self.offset)
        if frame.state is _State.WHOLE and doubtful is not None:
            # With a whole frame behind it, the doubtful one was written to its end just now, or never will be.
            at, frame, doubtful = _scan(descriptor, self.offset)
        if frame.state is _State.TAIL and doubtful is not None:
            at = doubtful
        # What lies before can never become a frame: it is not looked at again.
        self.skipped_bytes += at - self.offset
        self.offset = at + frame.size
        return frame.event

    def _pass_hole(self, descriptor: int) -> bool:
        """Moves over what was released, which reads as zeros. False at the end of the file."""
        try:
            self.offset = os.lseek(descriptor, self.offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        return True

    def release(self) -> None:
        """Gives the memory of everything before `offset` back to the volume."""
        whole_pages = self.offset // 4096 * 4096
        if self._descriptor is None or whole_pages == 0:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(
            self._descriptor, _FALLOC_KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_int64(0), ctypes.c_int64(whole_pages)
        ):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(self.path))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _State(Enum):
    WHOLE = auto()
    BROKEN = auto()
    """No frame begins here, now or later."""
    COMING = auto()
    """A frame that the file ends inside of: still being written, or torn."""
    TAIL = auto()
    """Fewer bytes than a header are left."""


class _Frame(NamedTuple):
    state: _State
    event: RuntimeEvent | None = None
    size: int = 0


def _scan(descriptor: int, at: int) -> tuple[int, _Frame, int | None]:
    """The first whole frame from `at` on, or the tail; and where before it a frame may still be coming."""
    doubtful = None
    while True:
        frame = _frame_at(descriptor, at)
        if frame.state in (_State.WHOLE, _State.TAIL):
            return at, frame, doubtful
        if frame.state is _State.COMING and doubtful is None:
            doubtful = at
        at = _candidate(descriptor, at + 1)


def _frame_at(descriptor: int, at: int) -> _Frame:
    header = os.pread(descriptor, _HEADER.size, at)
    if len(header) < _HEADER.size:
        return _Frame(_State.TAIL)
    magic, length, checksum = _HEADER.unpack(header)
    if magic != MAGIC or length > MAX_PAYLOAD:
        return _Frame(_State.BROKEN)
    payload = os.pread(descriptor, length, at + _HEADER.size)
    if len(payload) < length:
        return _Frame(_State.COMING)
    if crc32c.crc32c(payload) != checksum:
        return _Frame(_State.BROKEN)
    try:
        return _Frame(_State.WHOLE, RuntimeEvent.FromString(payload), _HEADER.size + length)
    except DecodeError:
        # A foreign frame with a right checksum: skipped like a torn one.
        return _Frame(_State.BROKEN)


def _candidate(descriptor: int, start: int) -> int:
    """Where the next frame may begin: the next magic, or where the first bytes of one may end the file."""
    while True:
        chunk = os.pread(descriptor, _CHUNK, start)
        at = chunk.find(MAGIC)
        if at >= 0:
            return start + at
        if len(chunk) < _CHUNK:
            partial = next(size for size in (3, 2, 1, 0) if chunk.endswith(MAGIC[:size]))
            return start + len(chunk) - partial
        start += _CHUNK - len(MAGIC) + 1
