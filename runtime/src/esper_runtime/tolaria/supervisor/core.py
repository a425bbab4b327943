"""The supervisor's decisions: deaths, hangs, drains and halts put together. Pure: told the time, returns actions.

One object per container. The loop reports what happened and carries out what comes back, in order.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from esper_leyline.exitcodes import ExitCode
from esper_leyline.pages import EmergencyRecord, Heartbeat
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_CHECKPOINT, EMERGENCY_MODE_KILL

from esper_runtime.tolaria.supervisor.hang import MAX_PATIENCE, HangLimits, HangWatch, Pulse
from esper_runtime.tolaria.supervisor.policy import Death, End, Restart, RestartPolicy

DUMP_S = 1.0
"""From the request for a stack dump to SIGKILL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What a start recovers from; becomes the environment of the trainer."""

    cause: RunReason
    detected_s: float
    step: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start the trainer. `recovery` is None for the first start."""

    recovery: Recovery | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminate:
    """SIGTERM to the trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpStacks:
    """SIGUSR1 to the trainer."""

    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """SIGKILL to the trainer and all it started."""

    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRestart:
    """Record a death, or a start that was refused, that another start follows. `number` counts deaths so far."""

    death: Death
    restart: Restart
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledge:
    """The signal's effect is complete: nothing steps any more."""

    record: EmergencyRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """End the container. `death` is the last one; None when no trainer lived."""

    end: End
    death: Death | None = None


Action: TypeAlias = Start | Terminate | DumpStacks | Kill | ReportRestart | Acknowledge | Finish


class Stage(Enum):
    WAITING = "no trainer; one is due at start_at_s"
    ALIVE = "the trainer lives"
    DYING = "SIGKILL is on its way"
    ENDED = "Finish was given out"


class Core:
    """Knows one trainer at a time. Every method takes the monotonic time in seconds."""

    def __init__(
        self, *, attempt: int, policy: RestartPolicy, limits: HangLimits, drain_s: float, now_s: float
    ) -> None:
        self.stage = Stage.WAITING
        self.restarts = 0
        self.hangs = 0
        self._attempt = attempt
        self._policy = policy
        self._limits = limits
        self._drain_s = drain_s
        self._start_at_s = now_s
        self._recovery: Recovery | None = None
        self._watch = HangWatch(limits=limits, now_s=now_s)
        self._beat: Heartbeat | None = None
        self._hang = ""
        self._hang_step = -1
        self._kill_at_s = math.inf
        self._stop_asked = False
        self._signal: EmergencyRecord | None = None
        self._signal_seen_s = -math.inf
        self._started_s = now_s
        self._halted_by: EmergencyRecord | None = None

    @property
    def beat(self) -> Heartbeat | None:
        """Newest heartbeat of the trainer that lives now."""
        return self._beat

    @property
    def stopping(self) -> bool:
        return self._stop_asked

    @property
    def halting(self) -> bool:
        return self._halted_by is not None

    @property
    def silent_s(self) -> float:
        return self._watch.silent_s

    @property
    def doubts(self) -> bool:
        """Whether the next tick() wants a Pulse of the trainer."""
        return self._judged and self._watch.doubts

    @property
    def _judged(self) -> bool:
        """Whether a hang would still be news."""
        return self.stage is Stage.ALIVE and not self._hang and not self._stop_asked

    @property
    def deadline_s(self) -> float:
        """When to call tick() at the latest."""
        if self.stage is Stage.WAITING:
            return self._start_at_s
        return min(self._kill_at_s, self._watch.look_at_s) if self._judged else self._kill_at_s

    def tick(self, beat: Heartbeat | None, *, now_s: float, pulse: Pulse | None = None) -> list[Action]:
        """Looks at the clock and at the newest heartbeat of the living trainer."""
        if self.stage is Stage.WAITING:
            return self._start(now_s) if now_s >= self._start_at_s else []
        if self.stage is not Stage.ALIVE:
            return []
        self._heed_rollback(beat)
        self._beat = beat
        hang = self._watch.look(beat, now_s=now_s, pulse=pulse)
        if self._hang and not self._stop_asked and beat is not None and beat.step != self._hang_step:
            self._hang, self._kill_at_s = "", math.inf  # it goes on: it was slow
            self._watch.patience = min(2 * self._watch.patience, MAX_PATIENCE)
        if now_s >= self._kill_at_s:
            return self._kill(self._hang or "it did not stop within the grace")
        if self._halt_unanswered(hang, now_s):
            assert self._signal is not None
            self._halted_by = self._signal
            return self._kill("it did not answer the emergency stop")
        if hang and not self._hang and not self._stop_asked:
            self._hang, self._hang_step = hang, self._beat.step if self._beat is not None else -1
            self.hangs += 1
            self._kill_at_s = now_s + DUMP_S
            return [DumpStacks(why=hang)]
        return []

    def _heed_rollback(self, beat: Heartbeat | None) -> None:
        """A trainer that went back makes progress from there."""
        if beat is not None and self._beat is not None and beat.step < self._beat.step:
            self._policy = replace(self._policy, highest_step=min(self._policy.highest_step, beat.step))

    def stop(self, *, now_s: float) -> list[Action]:
        """SIGTERM came for the container. A second one changes nothing."""
        if self._stop_asked or self.stage is Stage.ENDED:
            return []
        self._stop_asked = True
        if self.stage is Stage.WAITING:
            return self._finish(End(exit_code=ExitCode.DRAINED, reason=RunReason.DRAINED, message="no trainer lived"))
        self._kill_at_s = min(self._kill_at_s, now_s + self._drain_s)
        return [Terminate()]

    def signalled(self, record: EmergencyRecord, *, now_s: float) -> list[Action]:
        """The emergency page holds `record`. Calling it again with the same record changes nothing."""
        if self.stage is Stage.ENDED or record.attempt not in (0, self._attempt):
            return []
        if self._signal is not None and record.order <= self._signal.order:
            return []
        self._signal = record
        self._signal_seen_s = now_s
        if record.clear or record.mode != EMERGENCY_MODE_KILL:
            return []
        self._halted_by = record
        if self.stage is Stage.WAITING:
            return self._halted(None)
        return self._kill("emergency stop") if self.stage is Stage.ALIVE else []

    def note(self, beat: Heartbeat | None) -> None:
        """What a trainer left on its page when it died."""
        self._beat = beat or self._beat

    def died(self, status: int, *, now_s: float, out_of_memory: bool = False) -> list[Action]:
        """The trainer is gone and reaped."""
        assert self.stage in (Stage.ALIVE, Stage.DYING), self.stage
        death = Death(
            status=status,
            step=None if self._beat is None else self._beat.step,
            phase=None if self._beat is None else self._beat.phase,
            hung=bool(self._hang) and status < 0,
            out_of_memory=out_of_memory,
        )
        return self._after(death, now_s)

    def refused(self, why: str, *, now_s: float) -> list[Action]:
        """The system did not start the process that Start asked for: an attempt that failed, like one that died."""
        assert self.stage is Stage.ALIVE, self.stage
        return self._after(Death(status=None, refusal=why), now_s)

    def _after(self, death: Death, now_s: float) -> list[Action]:
        self._policy, verdict = self._policy.after(death)
        complete = death.status == ExitCode.COMPLETE
        if self._halted_by is not None and not complete:
            return self._halted(death)
        if self._stop_asked and not _meant(verdict):
            message = f"{death.words} after SIGTERM; the newest checkpoint stands"
            return self._finish(End(exit_code=ExitCode.DRAINED, reason=RunReason.DRAINED, message=message), death)
        if isinstance(verdict, End):
            return self._finish(verdict, death)
        return self._restart(death, verdict, now_s)

    def _start(self, now_s: float) -> list[Action]:
        self.stage = Stage.ALIVE
        self._started_s = now_s
        self._watch = self._watch.successor(now_s=now_s)
        self._beat = None
        self._hang = ""
        self._kill_at_s = math.inf
        return [Start(recovery=self._recovery)]

    def _restart(self, death: Death, restart: Restart, now_s: float) -> list[Action]:
        if not death.refused:  # else the next one still recovers from the death before, if there was one
            self.restarts += 1
            self._recovery = Recovery(cause=restart.cause, detected_s=now_s, step=death.step)
        self._start_at_s = now_s + restart.delay_s
        self.stage = Stage.WAITING
        report = ReportRestart(death=death, restart=restart, number=self.restarts)
        return [report, *(self._start(now_s) if restart.delay_s == 0 else [])]

    def _kill(self, why: str) -> list[Action]:
        self.stage = Stage.DYING
        self._kill_at_s = math.inf
        return [Kill(why=why)]

    def _halt_unanswered(self, hang: str, now_s: float) -> bool:
        """True when a Checkpoint stop waits for a trainer that is hung or that never came to look."""
        record = self._signal
        if record is None or record.clear or record.mode != EMERGENCY_MODE_CHECKPOINT or self._stop_asked:
            return False
        beat = self._beat
        if beat is not None and beat.emergency_order >= record.order:
            return False
        waited_s = now_s - max(self._signal_seen_s, self._started_s)
        starting = beat is None or beat.phase == pb.RUNTIME_PHASE_STARTING
        limit_s = self._limits.heartbeat_s if starting or hang else self._limits.progress_s
        return waited_s > limit_s or bool(hang)

    def _halted(self, death: Death | None) -> list[Action]:
        record = self._halted_by
        assert record is not None
        message = "stopped by emergency; nothing was saved for it"
        end = End(exit_code=ExitCode.HALTED, reason=RunReason.EMERGENCY_STOP, message=message)
        return [Acknowledge(record=record), *self._finish(end, death)]

    def _finish(self, end: End, death: Death | None = None) -> list[Action]:
        self.stage = Stage.ENDED
        return [Finish(end=end, death=death)]


def _meant(verdict: Restart | End) -> bool:
    """True for an end that the trainer itself chose."""
    return isinstance(verdict, End) and verdict.exit_code not in (ExitCode.TRAINER_CRASHED, ExitCode.HUNG)
