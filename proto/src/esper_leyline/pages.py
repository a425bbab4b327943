"""Shared-memory pages: 64-byte seqlock slots of eight little-endian 64-bit words in a plain mmapped file.

Exactly one writer per page; any number of readers in other containers. Aligned 8-byte stores through
`memoryview.cast('Q')` are atomic on the platforms Esper runs on (struct.pack_into is not), word 0 is the
sequence: odd while a write is in progress. Not multiprocessing.SharedMemory: its tracker unlinks on death.
"""

import contextlib
import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

WORDS = 8
SLOT_BYTES = 8 * WORDS
MAX_SLOTS = 64
_SPINS = 1000
_YIELDS = 10


class PageError(Exception):
    """The page is missing, too short, or never came to rest while being read."""


class Page:
    """A file of seqlock slots. Word 0 of each slot is the sequence; words 1 to 7 are the caller's."""

    def __init__(self, path: Path, mapping: mmap.mmap, slots: int) -> None:
        self.path = path
        self.slots = slots
        self._mapping = mapping
        self._view = memoryview(mapping)
        self.words = self._view.cast("Q")

    @classmethod
    def create(cls, path: Path, slots: int = 1) -> Self:
        """Creates or reopens the page for its one writer. An existing page keeps its content."""
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"a page has 1 to {MAX_SLOTS} slots, not {slots}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o660)
        try:
            if os.fstat(descriptor).st_size < slots * SLOT_BYTES:
                os.posix_fallocate(descriptor, 0, slots * SLOT_BYTES)
            return cls(path, mmap.mmap(descriptor, slots * SLOT_BYTES), slots)
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens an existing page read-only. PageError when it is not there yet."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise PageError(f"{path} does not exist yet") from error
        try:
            size = os.fstat(descriptor).st_size
            slots = min(size // SLOT_BYTES, MAX_SLOTS)
            if slots < 1:
                raise PageError(f"{path} has {size} bytes, less than one slot of {SLOT_BYTES}")
            return cls(path, mmap.mmap(descriptor, slots * SLOT_BYTES, prot=mmap.PROT_READ), slots)
        finally:
            os.close(descriptor)

    def write(self, slot: int, values: tuple[int, int, int, int, int, int, int]) -> None:
        """Replaces words 1 to 7 of `slot`; each value is an unsigned 64-bit integer, else OverflowError."""
        # Packed before the sequence turns odd: a store that fails would leave the slot unreadable.
        self.store(slot, array("Q", values).tobytes())

    def store(self, slot: int, packed: bytes) -> None:
        """`write` for words that are packed already, 56 bytes in this machine's order; else ValueError."""
        base = slot * WORDS
        words = self.words
        sequence = words[base] | 1
        begin = slot * SLOT_BYTES
        target = self._view[begin + 8 : begin + SLOT_BYTES]
        if len(packed) != len(target):
            raise ValueError(f"{len(packed)} bytes are not seven words")
        words[base] = sequence
        target[:] = packed
        words[base] = sequence + 1

    def read(self, slot: int = 0) -> tuple[int, ...]:
        """Words 1 to 7 of `slot`, from one moment. All zero when nothing was written yet."""
        base = slot * WORDS
        words = self.words
        for attempt in range(_SPINS + _YIELDS):
            if attempt >= _SPINS:
                os.sched_yield()  # the writer may wait for this very core
            before = words[base]
            if before & 1:
                continue
            values = tuple(words[base + 1 : base + WORDS])
            if words[base] == before:
                return values
        raise PageError(
            f"{self.path}: slot {slot} is being written without end (its writer died or was stopped inside a write)"
        )

    def close(self) -> None:
        self.words.release()
        self._view.release()
        with contextlib.suppress(BufferError):  # somebody still holds a view: the mapping goes with it
            self._mapping.close()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One slot of trainer.page, written by the trainer after every step and by nobody else."""

    step: int
    epoch: int
    phase: int
    """RuntimePhase of esper_leyline.v1."""
    beat_ns: int
    """CLOCK_MONOTONIC of the last sign of life."""
    loss: float
    total_steps: int
    pid: int
    emergency_order: int
    """Order of the newest emergency signal that the trainer acts on; see EmergencyRecord.order."""
    validating: bool = False
    """True inside validation, where beats without a new step are no hang."""

    def words(self) -> tuple[int, int, int, int, int, int, int]:
        return (
            self.step,
            (self.epoch << 32) | (int(self.validating) << 16) | self.phase,
            self.beat_ns,
            float_bits(self.loss),
            self.total_steps,
            self.pid,
            self.emergency_order,
        )

    @classmethod
    def of(cls, words: tuple[int, ...]) -> "Heartbeat":
        step, epoch_phase, beat_ns, loss, total_steps, pid, order = words
        return cls(
            step,
            epoch_phase >> 32,
            epoch_phase & 0xFFFF,
            beat_ns,
            bits_float(loss),
            total_steps,
            pid,
            order,
            bool((epoch_phase >> 16) & 1),
        )


EMERGENCY_ORDER_WORD = 1
"""Index of the word that changes with every signal: the trainer reads this one word per step."""


@dataclass(frozen=True, slots=True)
class EmergencyRecord:
    """One signal as the emergency page carries it."""

    term: int
    seq: int
    mode: int
    """EmergencyMode of esper_leyline.v1."""
    clear: bool
    attempt: int
    signal_id: str
    """32 hex digits."""
    arrived_ns: int
    """CLOCK_MONOTONIC when weatherlight verified it."""
    source: int

    @property
    def order(self) -> int:
        """Strictly rising with each signal; 0 = none ever."""
        return (self.term << 32) | self.seq

    def words(self) -> tuple[int, int, int, int, int, int, int]:
        """ValueError when a field has no place in the page."""
        if not (0 <= self.term < 1 << 32 and 0 <= self.seq < 1 << 32):
            raise ValueError(f"signal ({self.term}, {self.seq}): term and seq must fit 32 bits each")
        identity = bytes.fromhex(self.signal_id)
        if len(identity) != 16:
            raise ValueError(f"signal id {self.signal_id!r} must be 32 hex digits")
        high, low = struct.unpack(">QQ", identity)
        flags = (self.attempt << 32) | (self.source << 16) | (int(self.clear) << 8) | self.mode
        body = (self.order, flags, high, low, self.arrived_ns, 0)
        return (*body, _checksum(body))

    @classmethod
    def of(cls, words: tuple[int, ...]) -> "EmergencyRecord | None":
        """None when no signal was ever written. PageError when the checksum does not match."""
        order, flags, high, low, arrived_ns, _, checksum = words
        if order == 0:
            return None
        if checksum != _checksum(words[:6]):
            raise PageError("the emergency page's checksum does not match")
        return cls(
            term=order >> 32,
            seq=order & 0xFFFFFFFF,
            mode=flags & 0xFF,
            clear=bool((flags >> 8) & 1),
            attempt=flags >> 32,
            signal_id=struct.pack(">QQ", high, low).hex(),
            arrived_ns=arrived_ns,
            source=(flags >> 16) & 0xFF,
        )


class EmergencyPage:
    """Signals for this pod, newest first in slot 0 and a ring of the last ones behind it; weatherlight is the writer.

    A reader remembers the order of what it has read and takes what is newer, so no signal replaces an unread one as
    long as at most RING of them come between two looks; of more, the newest remain.
    """

    RING: Final = 15

    def __init__(self, page: Page) -> None:
        self.page = page

    @classmethod
    def create(cls, path: Path) -> "EmergencyPage":
        """For the writer. What is in an existing page stays."""
        return cls(Page.create(path, slots=1 + cls.RING))

    @classmethod
    def open(cls, path: Path) -> "EmergencyPage":
        """For a reader. PageError when it is not there yet."""
        return cls(Page.open(path))

    def publish(self, record: EmergencyRecord) -> None:
        """The ring first: who sees the order in slot 0 finds the record there too."""
        words = record.words()
        kept = {slot: one.order for slot, one in self._ring()}
        if record.order not in kept.values():
            self.page.write(self._place(kept), words)
        self.page.write(0, words)

    def _place(self, kept: Mapping[int, int]) -> int:
        """A torn or empty slot of the ring, else the oldest. Not by the signal's number: the numbers of a new term may
        begin anywhere, and would replace unread ones of the term before."""
        return min(range(1, self.page.slots), key=lambda slot: kept.get(slot, 0))

    def recover(self) -> EmergencyRecord | None:
        """For the writer, which may have died anywhere inside `publish`, or here: the newest whole record, which is
        then in slot 0 again. What is whole is not touched, so no death can lose it."""
        found = [record for _, record in self._ring()]
        shown = None
        with contextlib.suppress(PageError):
            shown = self.newest()
        newest = max((*found, *([] if shown is None else [shown])), key=lambda record: record.order, default=None)
        if newest is not None and not (newest == shown and newest in found):
            self.publish(newest)
        return newest

    def newest(self) -> EmergencyRecord | None:
        """None before the first signal. PageError when the slot is torn."""
        return EmergencyRecord.of(self.page.read())

    def since(self, order: int) -> list[EmergencyRecord]:
        """What is newer, in order. PageError when slot 0 is torn; a torn slot of the ring is left out."""
        newest = self.newest()
        if newest is None or newest.order <= order:
            return []
        found = {record.order: record for _, record in self._ring() if order < record.order <= newest.order}
        found[newest.order] = newest
        return [found[key] for key in sorted(found)]

    def standing(self, attempt: int) -> list[EmergencyRecord]:
        """What a process of `attempt` that begins now has to know: the newest signal, and before it the stop that is
        in force although the newest lifts another. What was in force before is not its business."""
        known = self.since(0)
        lifted = {record.signal_id for record in known if record.clear}
        ours = [record for record in known[:-1] if record.attempt in (0, attempt) and not record.clear]
        newest = known[-1:]
        if not newest or not newest[0].clear or not ours or ours[-1].signal_id in lifted:
            return newest
        return [ours[-1], *newest]

    def _ring(self) -> Iterator[tuple[int, EmergencyRecord]]:
        """Whole records with their slots."""
        for slot in range(1, self.page.slots):
            with contextlib.suppress(PageError):
                record = EmergencyRecord.of(self.page.read(slot))
                if record is not None:
                    yield slot, record

    def close(self) -> None:
        self.page.close()


def _checksum(words: tuple[int, ...]) -> int:
    total = 0x9E3779B97F4A7C15
    for word in words:
        total = ((total ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return total


def float_bits(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


def bits_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
