"""The supervisor's entries in the pod's journal. A full or broken memory volume never stops the supervision.

What is told here goes to the run's record too, but for failures: there a death and the run's end are told apart
(`account`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from esper_leyline.journal import JournalWriter
from esper_leyline.pages import EmergencyRecord
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE, ACK_STAGE_SEEN, AckStage, EmergencyAck

from esper_runtime.tolaria.narrate import label, tell
from esper_runtime.tolaria.supervisor.lines import Lines

WRITER = "supervisor"
CONTAINER = "tolaria"
MAX_MESSAGE_BYTES = 2048
log = logging.getLogger(__name__)


class Events:
    """Writes RuntimeEvents; `counters` tells the run's totals, or None while they are unknown."""

    def __init__(
        self,
        path: Path,
        *,
        lines: Lines,
        counters: Callable[[], pb.Counters | None],
        wall_s: Callable[[], float] = time.time,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._journal = JournalWriter(path)
        self._lines = lines
        self._counters = counters
        self._wall_s = wall_s
        self._monotonic_ns = monotonic_ns
        self._incident = ""

    @contextmanager
    def incident(self, name: str) -> Iterator[None]:
        """What is told meanwhile is part of that incident."""
        self._incident = name
        try:
            yield
        finally:
            self._incident = ""

    def boot(self, *, attempt: int, rank: int, incarnation: int, world_size: int) -> None:
        boot = pb.Boot(attempt=attempt, rank=rank, incarnation=incarnation, world_size=world_size)
        self._write(pb.RuntimeEvent(boot=boot))

    def transition(
        self, from_phase: pb.RuntimePhase, to_phase: pb.RuntimePhase, *, reason: str, message: str, step: int
    ) -> None:
        event = pb.RuntimeEvent()
        event.transition.from_phase = from_phase
        event.transition.to_phase = to_phase
        event.transition.reason = reason
        event.transition.message = shorten(message)
        event.transition.step = step
        self._stamp(event.transition.time.FromNanoseconds)
        self._write(event)

    def failure(self, *, reason: str, message: str, exit_code: int, step: int) -> None:
        event = pb.RuntimeEvent()
        event.failure.reason = reason
        event.failure.message = shorten(message)
        event.failure.exit_code = exit_code
        event.failure.container = CONTAINER
        event.failure.step = step
        self._stamp(event.failure.time.FromNanoseconds)
        self._write(event)

    def acknowledge(self, record: EmergencyRecord, *, run_uid: str, attempt: int, rank: int, step: int) -> None:
        """SEEN and DONE at once: the trainer is gone, so it has stopped and nothing else will happen."""
        with self.incident(record.signal_id):
            for stage in (ACK_STAGE_SEEN, ACK_STAGE_DONE):
                self._acknowledge(stage, record, run_uid=run_uid, attempt=attempt, rank=rank, step=step)

    def _acknowledge(
        self, stage: AckStage, record: EmergencyRecord, *, run_uid: str, attempt: int, rank: int, step: int
    ) -> None:
        elapsed_ms = (self._monotonic_ns() - record.arrived_ns) / 1e6
        ack = EmergencyAck(
            version=1,
            signal_id=record.signal_id,
            run_uid=run_uid,
            attempt=attempt,
            rank=rank,
            participant=CONTAINER,
            stage=stage,
            step=step,
            elapsed_ms=elapsed_ms,
        )
        self._stamp(ack.time.FromNanoseconds)
        self._write(pb.RuntimeEvent(ack=ack))

    def notice(self, *, reason: str, message: str) -> None:
        self._write(pb.RuntimeEvent(notice=pb.Notice(reason=reason, message=shorten(message), warning=True)))

    def _stamp(self, setter: Callable[[int], None]) -> None:
        setter(int(self._wall_s() * 1e9))

    def _write(self, event: pb.RuntimeEvent) -> None:
        event.writer = WRITER
        event.monotonic_ns = self._monotonic_ns()
        event.incident = self._incident
        self._stamp(event.time.FromNanoseconds)
        label(event, tell(event))
        if event.WhichOneof("event") != "failure":
            self._lines.tell(event)
        counters = self._counters()
        if counters is not None:
            event.counters.CopyFrom(counters)
        try:
            self._journal.append(event)
        except OSError as error:
            log.error("cannot write %s to the journal: %s", event.WhichOneof("event"), error)


def shorten(message: str) -> str:
    """At most MAX_MESSAGE_BYTES of UTF-8, from the end, because the end of a traceback says most."""
    encoded = message.encode("utf-8", "replace")
    return encoded[-MAX_MESSAGE_BYTES:].decode("utf-8", "ignore")
