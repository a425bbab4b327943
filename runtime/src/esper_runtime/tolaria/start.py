"""Where training starts from, and how a recovery is reported once the first step after it is done."""

import logging
import time
from dataclasses import dataclass

from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import ResumeFrom
from esper_leyline.v1 import report_pb2 as pb

from esper_runtime.checkpoint import LoadedGeneration
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events, Heart

log = logging.getLogger(__name__)


class Laps:
    """How long the parts of a start took, from `began_ns` (CLOCK_MONOTONIC) on; for the log."""

    def __init__(self, began_ns: int) -> None:
        self._began_ns = self._last_ns = began_ns
        self._parts: list[str] = []

    def mark(self, part: str, *, at_ns: int | None = None) -> None:
        """`part` is over, now or at `at_ns`. A start has a handful of parts."""
        now_ns = time.monotonic_ns() if at_ns is None else at_ns
        self._parts.append(f"{part} {(now_ns - self._last_ns) / 1e6:.1f}")
        self._last_ns = now_ns

    def __str__(self) -> str:
        return f"{(self._last_ns - self._began_ns) / 1e6:.1f} ms: {', '.join(self._parts)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the state came from."""

    source: str
    """memory, checkpoint or fresh."""
    step: int


def restore(
    state: TrainState, *, memory: Memory, checkpoints: Checkpoints, resume_from: ResumeFrom | None, events: Events
) -> Origin:
    """Puts the newest state that verifies in place: memory, then the volume, then resumeFrom, else as built.

    NoValidCheckpointError when checkpoints exist and none verifies; StateMismatchError when one does not fit.
    """
    step = memory.restore_newest(state)
    if step is not None:
        return Origin(source="memory", step=step)
    loaded = checkpoints.load_first(resume_from)
    if loaded is None:
        memory.capture(state, good=True)
        return Origin(source="fresh", step=0)
    _name_corrupt(loaded, events)
    checkpoints.report_state()  # whoever reads of the recovery knows what it went on from
    state.restore_generation(loaded)
    memory.start_again_at(state)
    return Origin(source="checkpoint", step=loaded.step)


def _name_corrupt(loaded: LoadedGeneration, events: Events) -> None:
    for corrupt in loaded.corrupt[:8]:
        message = f"{corrupt}; the checkpoint of step {loaded.step} is used instead"
        events.notice(RunReason.CHECKPOINT_CORRUPT, message, warning=True)


class Start:
    """Reports the start when the first step is done: only then does training really run."""

    def __init__(
        self,
        place: Place,
        origin: Origin,
        *,
        events: Events,
        heart: Heart,
        laps: Laps,
        began_ns: int,
        last_beat_ns: int,
    ) -> None:
        self._place = place
        self._origin = origin
        self._events = events
        self._heart = heart
        self._laps = laps
        self._began_ns = began_ns
        self._last_beat_ns = last_beat_ns
        self._reported = False

    def after_step(self, state: TrainState) -> None:
        if self._reported:
            return
        self._reported = True
        self._laps.mark("first step")
        log.info("first step after %s", self._laps)
        kind = self._kind()
        if kind is None:
            self._running(RunReason.TRAINING, f"from {self._origin.source}", state)
            return
        reason = {
            pb.RECOVERY_KIND_IN_PLACE: RunReason.RESTARTED_IN_PLACE,
            pb.RECOVERY_KIND_POD_REPLACED: RunReason.POD_REPLACED,
            pb.RECOVERY_KIND_NEW_ATTEMPT: RunReason.NEW_ATTEMPT,
        }[kind]
        with self._events.incident(self._place.recovers_from):
            self._events.recovery(self._recovery(kind))
            self._running(reason, f"from {self._origin.source} at step {self._origin.step}", state)

    def _running(self, reason: RunReason, message: str, state: TrainState) -> None:
        if self._heart.phase == pb.RUNTIME_PHASE_STARTING:
            restarted = self._place.trainer_start > 1
            before = pb.RUNTIME_PHASE_RESTARTING if restarted else pb.RUNTIME_PHASE_STARTING
            self._events.move(before, pb.RUNTIME_PHASE_RUNNING, reason=reason, message=message, step=state.step)

    def _kind(self) -> pb.RecoveryKind | None:
        if self._place.trainer_start > 1:
            return pb.RECOVERY_KIND_IN_PLACE
        if self._place.incarnation > 1:
            return pb.RECOVERY_KIND_POD_REPLACED
        if self._place.attempt > 1 and self._origin.source != "fresh":
            return pb.RECOVERY_KIND_NEW_ATTEMPT
        return None

    def _recovery(self, kind: pb.RecoveryKind) -> pb.Recovery:
        now_ns, now = time.monotonic_ns(), time.time_ns()
        died = self._place.recovering
        detected_ns = died.detected_ns if died is not None and died.detected_ns is not None else self._began_ns
        from_step = died.step if died is not None and died.step is not None else self._origin.step
        recovery = pb.Recovery(
            kind=kind,
            cause=died.cause if died is not None else RunReason.POD_LOST,
            from_step=from_step,
            to_step=self._origin.step,
            recover_ms=(now_ns - detected_ns) / 1e6,
            verified=self._origin.source != "fresh",
        )
        if self._last_beat_ns and self._last_beat_ns <= detected_ns:
            recovery.detect_ms = (detected_ns - self._last_beat_ns) / 1e6
        recovery.detected_time.FromNanoseconds(now - (now_ns - detected_ns))
        recovery.completed_time.FromNanoseconds(now)
        return recovery
