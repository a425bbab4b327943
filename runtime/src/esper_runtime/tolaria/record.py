"""The run's record: a bounded file of JSON lines on the checkpoint volume, from which a report can be drawn.

A thread of its own writes it, out of a bounded queue; the training thread never waits for the volume. What does not
fit is dropped, the least important first, counted, and told by the next line. A line is one write: a kill tears the
last one at most, and readers pass over it. One process writes at a time: the trainer, or its supervisor while no
trainer lives.

    {"id": "1.1.1.42", "time": "2026-11-29T12:00:00.000+00:00", "ns": 8123, "attempt": 1, "incarnation": 1, "step": 7,
     "level": "WARNING", "event": "tolaria.rollback.started", "fields": {"reason": "NonFiniteLoss"}}

`id` is attempt, incarnation of the pod, start of the trainer in it (0: its supervisor), and a number that rises; `ns`
is CLOCK_MONOTONIC.
Lines that repeat another one of their epoch are counted in one line at its end: {"repeats": <id>, "count": 12, ...}.
"""

import errno
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esper_leyline.events import Level, RunEvent, priority
from esper_leyline.v1.common_pb2 import MessagePriority

MAX_QUEUED = 10_000
MAX_FILE_BYTES = 8 * 1024 * 1024
"""Of each of the two files."""
MAX_LINE_BYTES = 16 * 1024
MAX_TEXT = 1024
MAX_FIELDS = 128
MAX_DISTINCT = 256
"""Different lines of an epoch of which repetitions are counted; more are written one by one."""
RETRY_S = 1.0
_COALESCED = frozenset({RunEvent.NOTICE, RunEvent.DEGRADED, RunEvent.MENDED, RunEvent.HOOK_BUDGET_EXCEEDED,
                        RunEvent.LR_VIOLATION, RunEvent.COMMAND_REJECTED, RunEvent.COMMAND_EXPIRED,
                        RunEvent.TAMIYO_ERROR, RunEvent.TAMIYO_TIMEOUT, RunEvent.KASMINA_ERROR,
                        RunEvent.KASMINA_TIMEOUT, RunEvent.CHECKPOINT_FAILED, RunEvent.RESTORE_FAILED})  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What happened, as it waits for the volume."""

    number: int
    ns: int
    """CLOCK_MONOTONIC."""
    time_ns: int
    """Wall clock, for people."""
    event: RunEvent
    level: Level
    step: int
    fields: Mapping[str, Any]


@dataclass(kw_only=True, slots=True)
class _Repeats:
    """Further lines like one that is written already."""

    first: Line
    count: int = 0
    last: Line | None = None


class Queue:
    """Lines by priority, `size` at most. When it is full the oldest of the least important ones gives way."""

    def __init__(self, size: int = MAX_QUEUED) -> None:
        self._size = size
        self._lines: dict[MessagePriority, deque[Line]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, line: Line) -> MessagePriority | None:
        """The priority of the line that was dropped for want of room; None when none was."""
        ours = priority(line.event, line.level)
        dropped = None
        if self._count >= self._size:
            dropped = min(rank for rank, lines in self._lines.items() if lines)
            if dropped > ours:
                return ours
            self._lines[dropped].popleft()
            self._count -= 1
        self._lines.setdefault(ours, deque()).append(line)
        self._count += 1
        return dropped

    def take(self) -> list[Line]:
        """All lines, in the order in which they came."""
        lines = sorted((line for waiting in self._lines.values() for line in waiting), key=lambda line: line.number)
        self._lines.clear()
        self._count = 0
        return lines


class Backlog:
    """Lines that wait for the file: numbered, timed, bounded. Used by one thread at a time."""

    def __init__(
        self,
        size: int = MAX_QUEUED,
        *,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._time_ns = time_ns
        self._number = 0
        self._queue = Queue(size)
        self._dropped: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, event: RunEvent, *, step: int, level: Level, fields: Mapping[str, Any]) -> str | None:
        """LOW, NORMAL, HIGH or CRITICAL when a line of that priority was dropped for want of room."""
        self._number += 1
        line = Line(
            number=self._number,
            ns=self._monotonic_ns(),
            time_ns=self._time_ns(),
            event=event,
            level=level,
            step=step,
            fields=fields,
        )
        dropped = self._queue.add(line)
        if dropped is None:
            return None
        name = MessagePriority.Name(dropped).removeprefix("MESSAGE_PRIORITY_")
        self._dropped[name] = self._dropped.get(name, 0) + 1
        return name

    def take(self) -> tuple[list[Line], dict[str, int]]:
        """All lines in the order in which they came, and how many were dropped, by priority."""
        dropped, self._dropped = self._dropped, {}
        return self._queue.take(), dropped


SUPERVISOR = 0
"""In the place of a trainer's start, which counts from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Author:
    """Whose lines these are; the first part of every id."""

    attempt: int
    incarnation: int
    trainer_start: int


class Record:
    """One per trainer. Its methods are for the training thread and return at once."""

    def __init__(
        self,
        path: Path,
        author: Author,
        *,
        on_dropped: Callable[[str], None] = lambda priority: None,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_queued: int = MAX_QUEUED,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`on_dropped` is called with LOW, NORMAL, HIGH or CRITICAL, in the training thread."""
        self._on_dropped = on_dropped
        self._changed = threading.Condition()
        self._backlog = Backlog(max_queued, monotonic_ns=monotonic_ns, time_ns=time_ns)
        self._busy = False
        self._closing = False
        self._sink = Sink(path, author, max_file_bytes=max_file_bytes)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why lines are being lost; empty while they are not."""
        return self._sink.trouble

    def append(self, event: RunEvent, *, step: int, level: Level = Level.INFO, **fields: Any) -> None:
        """Adds a line. Values are texts, numbers, booleans, None, and lists and mappings of them."""
        with self._changed:
            dropped = self._backlog.add(event, step=step, level=level, fields=fields)
            self._changed.notify_all()
        if dropped is not None:
            self._on_dropped(dropped)

    def flush(self, timeout_s: float) -> bool:
        """Waits until every line so far is written or lost. False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not len(self._backlog), timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Takes no more lines and waits for those that wait. False when that takes longer (then abandoned)."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # In the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._backlog) or self._closing)
                lines, dropped = self._backlog.take()
                self._busy = True
                closing = self._closing
            self._sink.write(lines, dropped)
            if closing:
                self._sink.close()
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            if closing:
                return
            if self._sink.trouble:  # the volume is given time; the queue is bounded
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)


@dataclass(kw_only=True)
class _Debt:
    """What the next line that is written has to tell."""

    dropped: dict[str, int] = field(default_factory=dict)
    """By priority, for want of room in the queue."""
    lost: int = 0
    """That the volume did not take."""


class Sink:
    """The file. Used by one thread."""

    def __init__(self, path: Path, author: Author, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.trouble = ""
        self._path = path
        self._author = author
        self._max_bytes = max_file_bytes
        self._descriptor: int | None = None
        self._size = 0
        self._debt = _Debt()
        self._seen: dict[str, _Repeats] = {}

    def write(self, lines: list[Line], dropped: Mapping[str, int]) -> None:
        """Writes all lines, or says in `trouble` what became of them."""
        for name, count in dropped.items():
            self._debt.dropped[name] = self._debt.dropped.get(name, 0) + count
        for line in lines:
            if line.event is RunEvent.EPOCH:
                self._tell_repeats()
            if not self._repeats(line) and not self._put(line, {}):
                self._seen.clear()  # what is lost is not there to be repeated

    def close(self, *, sync: bool = True) -> None:
        """Tells what was counted and, if wanted, makes all durable. What is written later opens the file again."""
        self._tell_repeats()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            try:
                if sync:
                    os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("the record may lack its end: %s: %s", self._path, error.strerror)

    # Repetitions

    def _repeats(self, line: Line) -> bool:
        """Whether the line is only counted, because this epoch has one like it already."""
        if line.event not in _COALESCED:
            return False
        key = f"{line.event} {line.level} {json.dumps(_plain(line.fields), sort_keys=True)}"
        repeats = self._seen.get(key)
        if repeats is None:
            if len(self._seen) < MAX_DISTINCT:
                self._seen[key] = _Repeats(first=line)
            return False
        repeats.count, repeats.last = repeats.count + 1, line
        return True

    def _tell_repeats(self) -> None:
        """One line for all repetitions of each, and a new epoch begins."""
        seen, self._seen = self._seen, {}
        for repeats in seen.values():
            if repeats.last is not None:
                self._put(repeats.last, {"repeats": self._id(repeats.first), "count": repeats.count})

    # The file

    def _id(self, line: Line) -> str:
        author = self._author
        return f"{author.attempt}.{author.incarnation}.{author.trainer_start}.{line.number}"

    def _put(self, line: Line, more: Mapping[str, Any]) -> bool:
        debt = {name: value for name, value in (("dropped", self._debt.dropped), ("lost", self._debt.lost)) if value}
        head = {
            "id": self._id(line),
            "time": datetime.fromtimestamp(line.time_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
            "ns": line.ns,
            "attempt": self._author.attempt,
            "incarnation": self._author.incarnation,
            "step": line.step,
            "level": line.level,
            "event": line.event,
        }
        text = _encoded({**head, "fields": _plain(line.fields), **more, **debt})
        if len(text) > MAX_LINE_BYTES:
            text = _encoded({**head, "fields": {"truncated": len(text)}, **more, **debt})
        try:
            self._write(text)
        except OSError as error:
            self._lose(error)
            return False
        self.trouble = ""
        self._debt = _Debt()
        return True

    def _write(self, text: bytes) -> None:
        if self._descriptor is None:
            self._open()
        elif self._size + len(text) > self._max_bytes:
            self._rotate()
        assert self._descriptor is not None
        written = os.write(self._descriptor, text)
        self._size += written
        if written != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                size += os.write(descriptor, b"\n")  # a line that a kill has torn ends here
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._size = descriptor, size
        if size >= self._max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        """The file becomes the older one, in the place of the one before."""
        assert self._descriptor is not None
        self._path.replace(older(self._path))
        os.close(self._descriptor)
        self._descriptor = None
        self._open()

    def _lose(self, error: OSError) -> None:
        self._debt.lost += 1
        if not self.trouble:
            log.error("the run's record cannot be written: %s: %s", self._path, error.strerror)
        self.trouble = f"{self._path.name}: {error.strerror}"
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def older(path: Path) -> Path:
    """record.jsonl -> record.1.jsonl"""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, oldest first, both files. Torn and foreign ones are left out; OSError when it is absent.

    May be called while the run writes: a line that a rotation moves meanwhile comes once.
    """
    seen: set[str] = set()
    for file in (older(path), path):
        if file != path and not file.exists():
            continue
        with file.open("rb") as opened:
            for text in opened:
                line = _decoded(text)
                if line is not None and line["id"] not in seen:
                    seen.add(line["id"])
                    yield line


_HEAD = {"id": str, "time": str, "ns": int, "attempt": int, "step": int, "level": str, "event": str, "fields": dict}


def _decoded(text: bytes) -> dict[str, Any] | None:
    """A whole line of ours; None for anything else."""
    if len(text) > 2 * MAX_LINE_BYTES or not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    ours = isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in _HEAD.items())
    return line if ours else None


def _encoded(line: Mapping[str, Any]) -> bytes:
    text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


def _plain(value: Any) -> Any:
    """What JSON can hold, bounded: numbers that are not finite as text, long texts cut, other things by their name."""
    if isinstance(value, Mapping):
        return {str(name)[:MAX_TEXT]: _plain(part) for name, part in list(value.items())[:MAX_FIELDS]}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value[:MAX_FIELDS]]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value)[:MAX_TEXT]
