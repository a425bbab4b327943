"""What the trainer tells the rest of the pod: the heartbeat page after every step, events into the journal."""

import logging
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from esper_leyline import paths
from esper_leyline.events import Level, RunEvent
from esper_leyline.incidents import FIELD
from esper_leyline.journal import JournalWriter
from esper_leyline.pages import Page
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import EmergencyAck

from esper_runtime.tolaria.narrate import label, tell
from esper_runtime.tolaria.record import Record

MAX_MESSAGE = 1024
WRITER = "tolaria"
_BEAT = struct.Struct("=QQQdQQQ")
"""The words of a Heartbeat; one of them is a float's bits."""
log = logging.getLogger(__name__)


class Heart:
    """The trainer's slot of trainer.page."""

    def __init__(self, run_dir: Path, *, slot: int = 0, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._page = Page.create(run_dir / paths.TRAINER_PAGE, slots=slot + 1)
        self._slot = slot
        self._pid = os.getpid()
        self._monotonic_ns = monotonic_ns
        self.phase: pb.RuntimePhase = pb.RUNTIME_PHASE_STARTING
        self.order = 0
        """Of the emergency signal acted upon."""
        self.validating = False
        self.total_steps = 0
        self.step = 0
        self.epoch = 0
        """From 1; 0 before training."""
        self._loss = math.nan

    def beat(self) -> None:
        """A sign of life without progress."""
        flags = (self.epoch << 32) | (self.validating << 16) | self.phase
        now = self._monotonic_ns()
        packed = _BEAT.pack(self.step, flags, now, self._loss, self.total_steps, self._pid, self.order)
        self._page.store(self._slot, packed)

    def progress(self, *, step: int, epoch: int, loss: float) -> None:
        self.step, self.epoch, self._loss = step, epoch, loss
        self.beat()


class Events:
    """Appends RuntimeEvents, each with the run's counters, and tells the run's record of them."""

    def __init__(
        self,
        run_dir: Path,
        *,
        counters: Callable[[], pb.Counters],
        heart: Heart,
        record: Record | None = None,
        new_incident: Callable[[], str] = str,
    ) -> None:
        """`new_incident` names what begins here and has no name yet."""
        self._record = record
        self._journal = JournalWriter(run_dir / paths.JOURNAL)
        self._counters = counters
        self._heart = heart
        self._new_incident = new_incident
        self._incident = ""

    @contextmanager
    def incident(self, name: str = "") -> Iterator[None]:
        """What is told meanwhile is part of that incident; without a name, of the present one or else of a new one."""
        before = self._incident
        self._incident = name or before or self._new_incident()
        try:
            yield
        finally:
            self._incident = before

    def append(self, event: pb.RuntimeEvent, name: RunEvent | None = None, level: Level | None = None) -> None:
        """`name` and `level`: in the record and on the bus, where the event itself leaves several."""
        event.writer = WRITER
        event.monotonic_ns = time.monotonic_ns()
        if not event.HasField("time"):
            event.time.GetCurrentTime()
        event.counters.CopyFrom(self._counters())
        event.incident = self._incident
        lines = tell(event, name, level)
        label(event, lines)
        self._journal.append(event)
        if event.incident:
            log.warning("%s", event.name, extra={FIELD: event.incident, "step": self._heart.step})
        if self._record is not None:
            for told in lines:
                step = self._heart.step if told.step is None else told.step
                self._record.append(told.event, step=step, level=told.level, **told.fields)

    def transition(self, to: pb.RuntimePhase, *, reason: str, message: str = "", step: int) -> None:
        """Moves to a phase, in the journal and on the page. Nothing when already there."""
        before = self._heart.phase
        if before == to:
            return
        self.move(before, to, reason=reason, message=message, step=step)

    def move(self, before: pb.RuntimePhase, to: pb.RuntimePhase, *, reason: str, message: str = "", step: int) -> None:
        event = pb.RuntimeEvent()
        event.transition.from_phase = before
        event.transition.to_phase = to
        event.transition.reason = reason
        event.transition.message = message[:MAX_MESSAGE]
        event.transition.step = step
        event.transition.time.GetCurrentTime()
        self.append(event)
        self._heart.phase = to
        self._heart.beat()

    def notice(
        self,
        reason: str,
        message: str,
        *,
        warning: bool = False,
        name: RunEvent | None = None,
        level: Level | None = None,
    ) -> None:
        notice = pb.Notice(reason=reason, message=message[:MAX_MESSAGE], warning=warning)
        self.append(pb.RuntimeEvent(notice=notice), name, level)

    def degradation(self, component: str, *, degraded: bool, reason: str, message: str) -> None:
        self.degraded(
            pb.Degradation(component=component, degraded=degraded, reason=reason, message=message[:MAX_MESSAGE])
        )

    def degraded(self, degradation: pb.Degradation, *, name: RunEvent | None = None) -> None:
        self.append(pb.RuntimeEvent(degradation=degradation), name)

    def failure(self, reason: str, message: str, *, exit_code: int, step: int) -> None:
        event = pb.RuntimeEvent()
        event.failure.reason = reason
        event.failure.message = message[-2048:]
        event.failure.exit_code = exit_code
        event.failure.container = WRITER
        event.failure.step = step
        event.failure.time.GetCurrentTime()
        self.append(event)

    def ack(self, ack: EmergencyAck) -> None:
        self.append(pb.RuntimeEvent(ack=ack))

    def recovery(self, recovery: pb.Recovery) -> None:
        self.append(pb.RuntimeEvent(recovery=recovery))

    def checkpoint(self, state: pb.CheckpointState) -> None:
        self.append(pb.RuntimeEvent(checkpoint=state))

    def epoch(self, progress: pb.Progress) -> None:
        self.append(pb.RuntimeEvent(epoch=progress))

    def completion(self, completion: pb.Completion) -> None:
        self.append(pb.RuntimeEvent(completion=completion))


def named(metrics: Mapping[str, float]) -> list[pb.NamedMetric]:
    """At most 32, finite ones only."""
    finite = [(name, value) for name, value in metrics.items() if math.isfinite(value)]
    return [pb.NamedMetric(name=name, value=value) for name, value in finite[:32]]
