"""What stops training from outside: emergency signals in shared memory, and SIGTERM.

Looked at once per step (one word of memory), inside validation, and every 2 ms while frozen. Signals for another
attempt are ignored. A halt that is in force when the process starts is honoured before the first step.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EMERGENCY_ORDER_WORD, EmergencyPage, EmergencyRecord, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import (
    ACK_STAGE_DONE,
    ACK_STAGE_SEEN,
    EMERGENCY_MODE_CHECKPOINT,
    EMERGENCY_MODE_FREEZE,
    EMERGENCY_MODE_KILL,
    EMERGENCY_SOURCE_BROADCAST,
    AckStage,
    EmergencyAck,
    EmergencyMode,
)

from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.telemetry import WRITER, Events, Heart

FROZEN_POLL_S = 0.002
REOPEN_S = 0.25
"""How often a missing emergency page is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    run_uid: str
    attempt: int
    rank: int


class Control:
    """`save` writes a durable checkpoint now and gives its step, or None when that failed."""

    def __init__(
        self,
        run_dir: Path,
        *,
        identity: Identity,
        heart: Heart,
        events: Events,
        step: Callable[[], int],
        save: Callable[[], int | None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = run_dir / paths.EMERGENCY_PAGE
        self._identity = identity
        self._heart = heart
        self._events = events
        self._step = step
        self._save = save
        self._sleep = sleep
        self._page: EmergencyPage | None = None
        self._waiting: deque[EmergencyRecord] = deque()
        """Read and not yet obeyed, in order; as many as the page's ring holds."""
        self._words: memoryview | None = None
        self._look_again = 0.0
        self._order = 0
        self._terminate = False

    def listen(self) -> None:
        """SIGTERM asks for a drain from now on. Call from the main thread."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._terminate = True

    def poll(self) -> Outcome | None:
        """Freezes as long as it must; an Outcome when training has to end here."""
        if self._words is None:
            self._open()
        if self._words is not None and self._news():
            outcome = self._obey()
            if outcome is not None:
                return outcome
        return self._drain() if self._terminate else None

    def _open(self) -> None:
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + REOPEN_S
        try:
            page = EmergencyPage.open(self._path)
            standing = page.standing(self._identity.attempt)
        except PageError:
            return  # weatherlight has not made it yet, or is writing
        self._page, self._words = page, page.page.words
        if standing:
            self._take(standing)

    def _news(self) -> bool:
        """Whether there is a signal that was not obeyed yet. One word of memory when there is none."""
        assert self._words is not None
        return self._words[EMERGENCY_ORDER_WORD] != self._order or bool(self._waiting)

    def _record(self) -> EmergencyRecord | None:
        """The next signal for this attempt."""
        self._read()
        while self._waiting:
            record = self._waiting.popleft()
            lift = next((one for one in self._waiting if one.clear and one.signal_id == record.signal_id), None)
            if record.clear or lift is None:
                return record
            self._waiting.remove(lift)
            self._lifted(record, lift)
        return None

    def _read(self) -> None:
        assert self._page is not None
        try:
            records = self._page.since(self._order)
        except PageError:
            return  # half written: its order word still differs, so it is read again
        if records:
            self._take(records)

    def _take(self, records: Sequence[EmergencyRecord]) -> None:
        self._order = records[-1].order
        self._waiting += [one for one in records if one.attempt in (0, self._identity.attempt)]

    def _lifted(self, record: EmergencyRecord, lift: EmergencyRecord) -> None:
        """A signal that was taken back before it could act is answered all the same, and so is what took it back."""
        for one, stage in ((record, ACK_STAGE_SEEN), (lift, ACK_STAGE_DONE)):
            self._heart.order = one.order
            with self._events.incident(one.signal_id):
                self._ack(one, stage)

    def _obey(self) -> Outcome | None:
        record = self._record()
        if record is None or record.clear:
            return None
        while True:
            self._heart.order = record.order
            with self._events.incident(record.signal_id):
                self._ack(record, ACK_STAGE_SEEN)
                if record.mode != EMERGENCY_MODE_FREEZE:
                    return self._stop(record)
                following = self._freeze(record)
            if following is None:
                return None
            record = following

    def _stop(self, record: EmergencyRecord) -> Outcome:
        name = EmergencyMode.Name(record.mode).removeprefix("EMERGENCY_MODE_").capitalize()
        reason = _reason(record)
        self._events.transition(pb.RUNTIME_PHASE_HALTING, reason=reason, message=name, step=self._step())
        saved: int | None = None
        if record.mode == EMERGENCY_MODE_CHECKPOINT:
            saved = self._save()
        else:
            assert record.mode == EMERGENCY_MODE_KILL
        self._ack(record, ACK_STAGE_DONE, saved_step=saved)
        message = f"{name}: " + (f"saved step {saved}" if saved is not None else "nothing was saved for it")
        self._events.transition(pb.RUNTIME_PHASE_HALTED, reason=reason, message=message, step=self._step())
        return Outcome(exit_code=ExitCode.HALTED, reason=reason, message=message, saved_step=saved)

    def _freeze(self, record: EmergencyRecord) -> EmergencyRecord | None:
        """Waits until the halt is lifted (None) or something else is ordered. SIGTERM ends the wait too."""
        events, step = self._events, self._step()
        before = self._heart.phase
        reason = _reason(record)
        events.transition(pb.RUNTIME_PHASE_HALTING, reason=reason, message="Freeze", step=step)
        events.transition(pb.RUNTIME_PHASE_FROZEN, reason=RunReason.FROZEN, step=step)
        self._ack(record, ACK_STAGE_DONE)
        while not self._terminate:
            self._heart.beat()
            self._sleep(FROZEN_POLL_S)
            news = self._record() if self._news() else None
            if news is None:
                continue
            if not news.clear:
                return news
            if news.signal_id == record.signal_id:
                self._resume(record, news, before)
                return None
        return None

    def _resume(self, record: EmergencyRecord, clear: EmergencyRecord, before: pb.RuntimePhase) -> None:
        started = before in (pb.RUNTIME_PHASE_RUNNING, pb.RUNTIME_PHASE_FROZEN, pb.RUNTIME_PHASE_HALTING)
        to = pb.RUNTIME_PHASE_RUNNING if started else before
        self._events.transition(to, reason=RunReason.RESUMED, step=self._step())
        self._heart.order = clear.order
        self._ack(clear, ACK_STAGE_DONE)

    def _drain(self) -> Outcome:
        self._events.transition(pb.RUNTIME_PHASE_STOPPING, reason=RunReason.DRAINED, step=self._step())
        saved = self._save()
        message = f"saved step {saved}" if saved is not None else "the state could not be saved"
        return Outcome(exit_code=ExitCode.DRAINED, reason=RunReason.DRAINED, message=message, saved_step=saved)

    def _ack(self, record: EmergencyRecord, stage: AckStage, *, saved_step: int | None = None) -> None:
        ack = EmergencyAck(
            version=1,
            signal_id=record.signal_id,
            run_uid=self._identity.run_uid,
            attempt=self._identity.attempt,
            rank=self._identity.rank,
            participant=WRITER,
            stage=stage,
            step=self._step(),
            elapsed_ms=(time.monotonic_ns() - record.arrived_ns) / 1e6,
            clear=record.clear,
        )
        if saved_step is not None:
            ack.saved_step = saved_step
        ack.time.GetCurrentTime()
        self._events.ack(ack)


def _reason(record: EmergencyRecord) -> RunReason:
    if record.source == EMERGENCY_SOURCE_BROADCAST:
        return RunReason.EMERGENCY_BROADCAST
    return RunReason.EMERGENCY_STOP
