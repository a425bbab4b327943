"""The pod's journal: RuntimeEvents that supervisor and trainer append and weatherlight reads.

A file in the memory volume. A frame is magic, length, CRC32C of the payload, payload; each is one write(2) with
O_APPEND, so writers need no lock and nothing ever blocks on a reader. A frame torn by a kill is skipped by
searching the next magic. Offsets only rise: the reader gives memory back by punching holes into what it has
consumed, and a writer that finds MAX_RESIDENT_BYTES in use drops what may be dropped and says so.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import crc32c
from google.protobuf.message import DecodeError

from esper_leyline.v1.report_pb2 import RuntimeEvent

MAGIC = b"ESPJ"
_HEADER = struct.Struct("<4sII")
MAX_PAYLOAD = 64 * 1024
MAX_RESIDENT_BYTES = 16 * 1024 * 1024
DROPPABLE = frozenset({"epoch", "checkpoint", "notice"})
"""Events whose content the next one of its kind repeats."""

_FALLOC_KEEP_SIZE_AND_PUNCH_HOLE = 0x03


class JournalError(Exception):
    """An event that does not fit, or a journal that cannot be opened."""


class JournalWriter:
    """Appends events. One per process; safe beside other writers of the same file."""

    def __init__(self, path: Path) -> None:
        self.dropped = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o660)

    def append(self, event: RuntimeEvent) -> bool:
        """Writes one frame. False when the journal is full and the event may be dropped (counted)."""
        payload = event.SerializeToString()
        if len(payload) > MAX_PAYLOAD:
            raise JournalError(f"event of {len(payload)} bytes; at most {MAX_PAYLOAD}")
        if event.WhichOneof("event") in DROPPABLE:
            resident = os.fstat(self._descriptor).st_blocks * 512
            if resident > MAX_RESIDENT_BYTES:
                self.dropped += 1
                return False
        os.write(self._descriptor, _HEADER.pack(MAGIC, len(payload), crc32c.crc32c(payload)) + payload)
        return True

    def close(self) -> None:
        os.close(self._descriptor)


class JournalReader:
    """Reads frames from an offset on; `offset` is always the end of the last whole frame given out."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.skipped_bytes = 0
        """Bytes that were no whole frame: torn by a kill, or foreign."""
        self._descriptor: int | None = None

    def events(self) -> Iterator[RuntimeEvent]:
        """All whole frames now in the file. Ends at the first incomplete one; call again when it has grown."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        while (found := self._next(self._descriptor)) is not None:
            yield found

    def _next(self, descriptor: int) -> RuntimeEvent | None:
        while True:
            header = os.pread(descriptor, _HEADER.size, self.offset)
            if len(header) < _HEADER.size:
                return None
            magic, length, checksum = _HEADER.unpack(header)
            if magic == MAGIC and length <= MAX_PAYLOAD:
                payload = os.pread(descriptor, length, self.offset + _HEADER.size)
                if len(payload) == length and crc32c.crc32c(payload) == checksum:
                    event = RuntimeEvent()
                    try:
                        event.ParseFromString(payload)
                    except DecodeError:
                        pass  # a foreign frame with a right checksum: skipped like a torn one
                    else:
                        self.offset += _HEADER.size + length
                        return event
            if not self._resync(descriptor):
                return None

    def _resync(self, descriptor: int) -> bool:
        """Moves past a torn frame to the next magic. False when there is none yet (it may still be written)."""
        start = self.offset + 1
        chunk = os.pread(descriptor, MAX_PAYLOAD * 2, start)
        at = chunk.find(MAGIC)
        if at < 0:
            return False
        self.skipped_bytes += at + 1
        self.offset = start + at
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
