"""The run's events as telemetry on the bus: by the priority of their level, none lost while there is room, none twice.

The journal is read a second time here, behind a cursor that survives this process, and a packet is named by its place
in the journal: what is sent again after a restart is the same message, under the same nonce, and its reader drops it.
HIGH and CRITICAL have a queue of their own, where a flood of equal events is told as one with its count. While Redis is
away packets wait in memory, within MAX_SPOOL_BYTES.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from esper_leyline import paths
from esper_leyline.events import HEALTH, PRIORITY, Level
from esper_leyline.journal import JournalReader
from esper_leyline.oona import Backoff, Publisher, Status
from esper_leyline.pages import Page, PageError
from esper_leyline.signing import SigningKey, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import (
    BUS_MESSAGE_TYPE_TELEMETRY,
    MESSAGE_PRIORITY_CRITICAL,
    MESSAGE_PRIORITY_HIGH,
    MessagePriority,
)
from esper_leyline.v1.report_pb2 import RuntimeEvent
from esper_leyline.v1.telemetry_pb2 import (
    MetricPoint,
    SystemHealth,
    TelemetryEvent,
    TelemetryLevel,
    TelemetryPacket,
)

from esper_runtime.inotify import Change, hints
from esper_runtime.weatherlight.bounds import cut
from esper_runtime.weatherlight.coalesce import WINDOW_NS, Coalescer
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Bell
from esper_runtime.weatherlight.reports import Identity
from esper_runtime.weatherlight.unsure import LOOK_S, Unsure

CURSOR_FILE: Final = "telemetry.page"
MAX_SPOOL_BYTES: Final = 4 * 1024 * 1024
MAX_DESCRIPTION_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 128
MAX_WRITER_BYTES: Final = 32
REPEATS: Final = "repeats"
"""Metric of a packet that stands for so many further events equal to an earlier one."""
_EVERY_S: Final = 1.0
_POLL_S: Final = 0.05
_BATCH: Final = 64
_RETRY_FIRST_S: Final = 0.05
_RETRY_MAX_S: Final = 1.0
_LEVELS: Final = {TelemetryLevel.Value(f"TELEMETRY_LEVEL_{level}"): level for level in Level}
_URGENT: Final = frozenset({MESSAGE_PRIORITY_HIGH, MESSAGE_PRIORITY_CRITICAL})
_DONE: Final = frozenset({Status.PUBLISHED, Status.DROPPED, Status.COALESCED})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """An event of the journal between two offsets."""

    begin: int
    end: int
    event: RuntimeEvent
    level: Level


@dataclass(frozen=True, slots=True)
class Waiting:
    """A packet, and an offset from which its event will be read again."""

    offset: int
    envelope: BusEnvelope
    size: int
    source: str
    again: bool = False
    """Redis had it once, and may have forgotten it."""
    tried: bool = False
    """Redis may have it."""
    demoted: bool = False
    """To the ordinary stream."""
    repeats: bool = False
    """It stands for events that were held back, and its offset may be lower than those before it."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits, and what has gone and may have to come again."""

    waiting: deque[Waiting]
    unsure: Unsure[Waiting]
    repeats: dict[bytes, int] = field(default_factory=dict)
    """Offsets of repetitions that wait, by nonce."""

    def oldest(self) -> list[int]:
        """Offsets from which to read again after a death of this process."""
        first = [self.waiting[0].offset] if self.waiting else []
        return [*first, *self.repeats.values(), *(item.offset for item in self.unsure.items())]

    def add(self, waiting: Waiting) -> None:
        self.waiting.append(waiting)
        self._note(waiting)

    def bring_back(self, forgotten: list[Waiting]) -> None:
        """Before what waits: it is older."""
        for waiting in reversed(forgotten):
            self.waiting.appendleft(replace(waiting, again=True))
            self._note(waiting)

    def take(self) -> Waiting:
        """The first."""
        waiting = self.waiting.popleft()
        self.repeats.pop(waiting.envelope.nonce, None)
        return waiting

    def _note(self, waiting: Waiting) -> None:
        if waiting.repeats:
            self.repeats[waiting.envelope.nonce] = waiting.offset


class Telemetry:
    """`read`, `send_urgent` and `send_ordinary` are workers: endless, and each may be started again."""

    def __init__(
        self,
        run_dir: Path,
        state_dir: Path,
        *,
        identity: Identity,
        key: Callable[[], SigningKey],
        metrics: Metrics,
        max_spool_bytes: int = MAX_SPOOL_BYTES,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._run_dir = run_dir
        self._identity = identity
        self._key = key
        self._metrics = metrics
        self._max_bytes = max_spool_bytes
        self._monotonic_ns = monotonic_ns
        self._cursor = Page.create(state_dir / CURSOR_FILE)
        self._taken_offset = self._restored()
        """Everything before it is in a queue, in the coalescer, or done with."""
        self._reader = JournalReader(run_dir / paths.JOURNAL, self._taken_offset)
        self._urgent = Queue(deque(), Unsure())
        self._ordinary = Queue(deque(), Unsure())
        self._repeated: Coalescer[Taken] = Coalescer()
        self._bytes = 0
        self._changed = Bell()
        metrics.telemetry_spool.set_function(lambda: self._bytes)

    def _restored(self) -> int:
        try:
            return self._cursor.read()[0]
        except PageError:  # killed inside the write: what the journal still has is sent again
            return 0

    def close(self) -> None:
        self._reader.close()
        self._cursor.close()

    # Taking

    async def read(self, beat: Callable[[], None] = lambda: None) -> None:
        """Takes in events as they come. Beats every second."""
        self._rewind()
        mask = Change.MODIFY | Change.CREATE | Change.MOVED_TO
        async with aclosing(hints(self._run_dir, mask, every_s=_EVERY_S, poll_s=_POLL_S)) as changes:
            async for _ in changes:
                more = True
                while more:
                    beat()
                    more = self.take()
                    await asyncio.sleep(0)
                self.tell_repetitions(self._monotonic_ns())

    def _rewind(self) -> None:
        if self._reader.offset != self._taken_offset:
            self._reader.close()
            self._reader = JournalReader(self._run_dir / paths.JOURNAL, self._taken_offset)

    def take(self) -> bool:
        """At most a batch of events; True when there may be more."""
        try:
            begin = self._reader.offset
            for taken, event in enumerate(self._reader.events(), start=1):
                self._add(event, begin, self._reader.offset)
                begin = self._taken_offset = self._reader.offset
                if taken == _BATCH:
                    return True
        except OSError as error:
            log.error("the journal cannot be read for telemetry: %s", error.strerror)
        return False

    def take_all(self) -> None:
        """Everything that there is, and what was held back: nothing more is to come."""
        while self.take():
            pass
        self.tell_repetitions(self._monotonic_ns() + WINDOW_NS)

    def tell_repetitions(self, now_ns: int) -> None:
        """Of events that were held back, once their window is over."""
        for held in self._repeated.due(now_ns):
            assert held.first is not None
            assert held.newest is not None
            self._queue(held.newest, offset=held.first.begin, repeats=held.count)

    def _add(self, event: RuntimeEvent, begin: int, end: int) -> None:
        if not event.name:
            return
        level = _LEVELS.get(event.level)
        if level is None:
            self._metrics.priority_missing.inc()
            log.warning("an event of %s has no level and is not told", cut(event.writer, MAX_WRITER_BYTES))
            return
        taken = Taken(begin, end, event, level)
        if PRIORITY[level] in _URGENT and not self._repeated.passes(_kind(taken), taken, event.monotonic_ns):
            self._metrics.coalesced.inc()
            return
        self._queue(taken, offset=begin)

    def _queue(self, taken: Taken, *, offset: int, repeats: int = 0) -> None:
        envelope = self._sealed(taken, repeats)
        queue = self._urgent if envelope.priority in _URGENT else self._ordinary
        queue.add(Waiting(offset, envelope, envelope.ByteSize(), taken.event.writer, repeats=bool(repeats)))
        self._grown(queue.waiting[-1].size)
        self._changed.ring()

    def _grown(self, size: int) -> None:
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop()

    def _drop(self) -> None:
        """The oldest of what matters least."""
        waiting = (self._ordinary if self._ordinary.waiting else self._urgent).take()
        self._bytes -= waiting.size
        self._count(waiting, Status.DROPPED)

    def _sealed(self, taken: Taken, repeats: int) -> BusEnvelope:
        identity, event, level = self._identity, taken.event, taken.level
        packet_id = f"{identity.attempt}.{identity.rank}.{taken.end}"
        packet = TelemetryPacket(
            packet_id=packet_id,
            timestamp=event.time,
            source_subsystem=cut(event.writer, MAX_WRITER_BYTES) or "unknown",
            level=event.level,
            events=[
                TelemetryEvent(
                    event_id=packet_id,
                    name=cut(event.name, MAX_NAME_BYTES),
                    level=event.level,
                    description=_described(event),
                )
            ],
            system_health=SystemHealth(status=HEALTH[level], summary=cut(event.name, MAX_NAME_BYTES)),
            priority=PRIORITY[level],
        )
        if repeats:
            packet.metrics.append(MetricPoint(name=REPEATS, value=repeats, unit="1"))
        return seal(
            packet.SerializeToString(),
            BUS_MESSAGE_TYPE_TELEMETRY,
            run_uid=identity.run_uid,
            key=self._key(),
            priority=PRIORITY[level],
            correlation_id=event.incident,
            nonce=hashlib.sha256(f"{identity.run_uid}/{packet_id}".encode()).digest()[:16],
        )

    # Sending

    @property
    def waiting(self) -> int:
        """Packets that are not on the bus."""
        return len(self._urgent.waiting) + len(self._ordinary.waiting)

    async def send_urgent(self, publisher: Publisher) -> None:
        """HIGH and CRITICAL."""
        await self._send(self._urgent, publisher)

    async def send_ordinary(self, publisher: Publisher) -> None:
        await self._send(self._ordinary, publisher)

    async def _send(self, queue: Queue, publisher: Publisher) -> None:
        backoff = Backoff(first_s=_RETRY_FIRST_S, max_s=_RETRY_MAX_S)
        while True:
            self._bring_back(queue, queue.unsure.forgotten(publisher.oona))
            if not queue.waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._changed.wait()
                continue
            waiting = queue.waiting[0]
            before = publisher.demoted
            outcome = await publisher.publish(
                waiting.envelope, again=waiting.again or waiting.tried, demoted=waiting.demoted
            )
            known, waiting = (
                waiting,
                replace(waiting, tried=True, demoted=waiting.demoted or publisher.demoted != before),
            )
            if outcome.status not in _DONE:
                if queue.waiting and queue.waiting[0] is known:
                    queue.waiting[0] = waiting
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            if queue.waiting and queue.waiting[0] is known:  # else it was dropped meanwhile, and has arrived anyway
                queue.take()
                self._bytes -= waiting.size
                self._count(waiting, outcome.status, emergency=queue is self._urgent and not waiting.demoted)
            if outcome.status is Status.PUBLISHED:
                queue.unsure.acknowledged(waiting)
            self._save()

    def _bring_back(self, queue: Queue, forgotten: list[Waiting]) -> None:
        queue.bring_back(forgotten)
        self._grown(sum(waiting.size for waiting in forgotten))

    def _save(self) -> None:
        """The cursor: behind what needs not be read again."""
        offsets = [*self._urgent.oldest(), *self._ordinary.oldest()]
        offsets += [taken.begin for taken in self._repeated.first()]
        self._cursor.write(0, (min(offsets, default=self._taken_offset), 0, 0, 0, 0, 0, 0))

    def _count(self, waiting: Waiting, status: Status, *, emergency: bool = False) -> None:
        if waiting.again and status is Status.PUBLISHED:
            return
        priority = MessagePriority.Name(waiting.envelope.priority).removeprefix("MESSAGE_PRIORITY_")
        self._metrics.telemetry.labels(priority, status).inc()
        if status is Status.PUBLISHED:
            self._metrics.told(waiting.source, priority, emergency=emergency)


def _kind(taken: Taken) -> tuple[str, str, Level, str]:
    """What makes two events equal."""
    return taken.event.writer, taken.event.name, taken.level, _described(taken.event)


def _described(event: RuntimeEvent) -> str:
    kind = event.WhichOneof("event") or ""
    content = getattr(event, kind, None)
    words = [getattr(content, name, "") for name in ("component", "reason", "cause", "message", "last_error")]
    return cut(": ".join(word for word in words if word), MAX_DESCRIPTION_BYTES)
