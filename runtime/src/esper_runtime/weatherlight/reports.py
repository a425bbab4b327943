"""From events and heartbeats to reports: the pure core of weatherlight. No I/O, no clock.

A report is cumulative. It carries the phase, progress, counters, checkpoint state and degradations as they are after
the event that it is about, so that the newest report alone is the whole truth and the older ones are its history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from esper_leyline.incidents import incident_at
from esper_leyline.labels import WEATHERLIGHT
from esper_leyline.metrics.weatherlight import COMPONENTS
from esper_leyline.pages import Heartbeat
from esper_leyline.reasons import RunReason, SignalRejection
from esper_leyline.v1.report_pb2 import (
    CheckpointState,
    Counters,
    Degradation,
    Failure,
    Notice,
    Progress,
    RunReport,
    RuntimeEvent,
    RuntimePhase,
    Transition,
)
from google.protobuf.message import Message

from esper_runtime.weatherlight.bounds import bounded, cut
from esper_runtime.weatherlight.clock import Moment

PROGRESS_NS: Final = 1_000_000_000
"""At most one report of mere progress in this time."""
HEARTBEAT_NS: Final = 5_000_000_000
"""A report at least this often."""
REJECTION_NOTICE_NS: Final = 10_000_000_000
"""At most one notice of rejected signals in this time; the counter misses none."""

OWN_COMPONENTS: Final = frozenset(COMPONENTS)
"""What weatherlight itself watches; the trainer speaks for all others."""
_MAX_DEGRADATIONS: Final = 16
_EVENT_OF: Final = {
    "transition": "transition",
    "recovery": "recovery",
    "checkpoint": "saved",
    "ack": "ack",
    "failure": "failure",
    "completion": "completion",
    "notice": "notice",
}
"""Event of the journal to event of the report. Boot, epoch and degradation are state, not history."""
_BEFORE_STEPPING: Final = frozenset(
    {
        RuntimePhase.RUNTIME_PHASE_UNSPECIFIED,
        RuntimePhase.RUNTIME_PHASE_STARTING,
        RuntimePhase.RUNTIME_PHASE_RESTARTING,
    }
)
_LIVE: Final = _BEFORE_STEPPING | {
    RuntimePhase.RUNTIME_PHASE_RUNNING,
    RuntimePhase.RUNTIME_PHASE_ROLLING_BACK,
    RuntimePhase.RUNTIME_PHASE_HALTING,
    RuntimePhase.RUNTIME_PHASE_FROZEN,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What every report says about its sender."""

    run_uid: str
    run: str
    """<namespace>/<name>"""
    attempt: int
    rank: int
    pod_name: str = ""
    node_name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What must outlive this process besides the newest report."""

    dead_incarnation: int = 0
    """The newest incarnation of the tolaria container whose death was reported."""
    rejected_signals: int = 0


class Reporter:
    """Folds what happens into reports and numbers them. Every method returns the reports that follow, often none."""

    def __init__(self, identity: Identity, *, last: RunReport | None = None, memory: Memory | None = None) -> None:
        """`last` and `memory` are what an earlier process left."""
        self._identity = identity
        self.memory = memory or Memory()
        self.incarnation = 0
        """0: no Boot was seen, so nothing can be numbered."""
        self._number = 0
        self._last_event_seq = 0
        self.phase: RuntimePhase = RuntimePhase.RUNTIME_PHASE_UNSPECIFIED
        self._phase_before_death: RuntimePhase | None = None
        self._progress = Progress()
        self._counters = Counters()
        self._counted = False
        """The run's totals are known."""
        self._checkpoint: CheckpointState | None = None
        self._degradations: dict[str, Degradation] = {}
        self._beat: Heartbeat | None = None
        self._reported_ns = 0
        self._reported_step = 0
        self._noticed_ns: int | None = None
        self._unnoticed = 0
        if last is not None:
            self._resume(last)

    def _resume(self, last: RunReport) -> None:
        self.incarnation, self._number = last.seq >> 32, last.seq & 0xFFFFFFFF
        self._last_event_seq = last.seq if last.WhichOneof("event") else last.previous_event_seq
        self.phase = last.phase
        self._progress.CopyFrom(last.progress)
        self._counters.CopyFrom(last.counters)
        self._counters.rejected_signals = max(0, last.counters.rejected_signals - self.memory.rejected_signals)
        self._counted = last.counters != Counters()
        if last.HasField("checkpoint"):
            self._checkpoint = CheckpointState()
            self._checkpoint.CopyFrom(last.checkpoint)
        self._degradations = {item.component: item for item in last.degradations}
        self._reported_step = last.progress.step

    # --- the journal ---------------------------------------------------------------------------------------------

    def event(self, event: RuntimeEvent, at: Moment) -> list[RunReport]:
        """One frame of the journal: exactly one report, once a Boot was seen. None of weatherlight's own, which are
        for the bus: what it has to say to the operator it says here."""
        if event.writer == WEATHERLIGHT:
            return []
        event = bounded(event)
        if event.HasField("counters"):
            self._counters.CopyFrom(event.counters)
            self._counted = True
        kind = event.WhichOneof("event")
        if kind is None:
            return []
        content: Message = getattr(event, kind)
        self._fold(kind, event)
        name = _EVENT_OF.get(kind)
        if name is not None and hasattr(content, "time") and not content.HasField("time"):
            content.time.CopyFrom(event.time)
        return self._reports(at, [] if name is None else [(name, content)], event.incident)

    def _fold(self, kind: str, event: RuntimeEvent) -> None:
        match kind:
            case "boot":
                self._boot(event.boot.incarnation)
            case "transition":
                self.phase = event.transition.to_phase
                self._phase_before_death = None
                self._advance(event, event.transition.step)
            case "ack":
                self._advance(event, event.ack.saved_step)
            case "recovery":
                self._progress.step = event.recovery.to_step
            case "checkpoint":
                self._checkpoint = event.checkpoint
            case "epoch":
                self._epoch(event)
            case "degradation":
                self._set_degradation(event.degradation)

    def _boot(self, incarnation: int) -> None:
        if incarnation <= self.incarnation:
            return
        self.incarnation = incarnation
        self._number = 0
        self.phase = RuntimePhase.RUNTIME_PHASE_STARTING
        self._phase_before_death = None
        # A new trainer finds out anew what does not work.
        self._degradations = {k: v for k, v in self._degradations.items() if k in OWN_COMPONENTS}

    def _advance(self, event: RuntimeEvent, step: int) -> None:
        """An event may name a step (0: none) that the page was not yet looked at for."""
        if step and not self._is_behind(event):
            self._progress.step = step

    def _epoch(self, event: RuntimeEvent) -> None:
        step = self._progress.step
        self._progress.CopyFrom(event.epoch)
        if self._is_behind(event):
            self._progress.step = step

    def _is_behind(self, event: RuntimeEvent) -> bool:
        """Older than the last look at the page."""
        return self._beat is not None and self._beat.beat_ns > event.monotonic_ns

    # --- the pages -----------------------------------------------------------------------------------------------

    def beat(self, beat: Heartbeat | None, at: Moment) -> list[RunReport]:
        """A look at the trainer's page (None: nothing to see). A report when it is time for one."""
        if beat is not None and beat.beat_ns:
            self._beat = beat
            if beat.phase not in _BEFORE_STEPPING:  # before that its step is no progress, only a way back to it
                self._progress.step = beat.step
                self._progress.epoch = beat.epoch
                if beat.total_steps:
                    self._progress.total_steps = beat.total_steps
                if abs(beat.loss) < float("inf"):  # False for NaN: an unknown loss is left as it was
                    self._progress.loss = beat.loss
        waited_ns = at.monotonic_ns - self._reported_ns
        moved = self._progress.step != self._reported_step
        if waited_ns >= (PROGRESS_NS if moved else HEARTBEAT_NS):
            return self._reports(at)
        return []

    # --- the supervisor's connection -----------------------------------------------------------------------------

    @property
    def expects_supervisor(self) -> bool:
        """True while a supervisor should be connected: the container was seen alive and has not ended."""
        return self.incarnation > 0 and self.phase in _LIVE and self.memory.dead_incarnation < self.incarnation

    def died(self, at: Moment) -> list[RunReport]:
        """The tolaria container ended without saying so. Reported once per incarnation."""
        if not self.expects_supervisor:
            return []
        self.memory = Memory(dead_incarnation=self.incarnation, rejected_signals=self.memory.rejected_signals)
        before, step = self.phase, self._progress.step
        self._phase_before_death = before
        message = "the connection of the supervisor in container tolaria ended without notice"
        failure = Failure(reason=RunReason.CONTAINER_DIED, message=message, container="tolaria", step=step)
        failure.time.FromDatetime(at.time)
        self.phase = RuntimePhase.RUNTIME_PHASE_RESTARTING
        transition = self._transition(before, RunReason.CONTAINER_DIED, message, at)
        return self._reports(at, [("failure", failure), ("transition", transition)], self._of_container)

    def returned(self, incarnation: int, at: Moment) -> list[RunReport]:
        """A supervisor connected. Takes a reported death back when it is the same container after all."""
        before = self._phase_before_death
        if incarnation != self.incarnation or incarnation != self.memory.dead_incarnation or before is None:
            return []
        self._phase_before_death = None
        self.memory = Memory(dead_incarnation=incarnation - 1, rejected_signals=self.memory.rejected_signals)
        dead, self.phase = self.phase, before
        message = "the supervisor is connected again; its container never died"
        events = [("transition", self._transition(dead, RunReason.RESUMED, message, at))]
        return self._reports(at, events, self._of_container)

    @property
    def _of_container(self) -> str:
        """The incident that the present container's death is."""
        return incident_at(self._identity.run_uid, self._identity.attempt, self._identity.rank, self.incarnation)

    def _transition(self, before: RuntimePhase, reason: RunReason, message: str, at: Moment) -> Transition:
        made = Transition(
            from_phase=before, to_phase=self.phase, reason=reason, message=message, step=self._progress.step
        )
        made.time.FromDatetime(at.time)
        return made

    # --- what weatherlight sees itself ---------------------------------------------------------------------------

    def degraded(self, component: str, reason: RunReason, message: str, at: Moment) -> list[RunReport]:
        """A report when this is new or its reason is."""
        known = self._degradations.get(component)
        if known is not None and known.reason == reason:
            return []
        self._set_degradation(Degradation(component=component, degraded=True, reason=reason, message=message[:1024]))
        return self._reports(at)

    def restored(self, component: str, at: Moment) -> list[RunReport]:
        if self._degradations.pop(component, None) is None:
            return []
        return self._reports(at)

    def notice(self, reason: RunReason, message: str, warning: bool, at: Moment) -> list[RunReport]:
        return self._reports(at, [("notice", Notice(reason=reason, message=cut(message, 1024), warning=warning))])

    @property
    def totals(self) -> Counters | None:
        """Since the run began; None before the trainer has told them."""
        return self._totals() if self._counted else None

    def _totals(self) -> Counters:
        totals = Counters()
        totals.CopyFrom(self._counters)
        totals.rejected_signals += self.memory.rejected_signals
        return totals

    @property
    def degradations(self) -> frozenset[str]:
        return frozenset(self._degradations)

    def _set_degradation(self, item: Degradation) -> None:
        self._degradations.pop(item.component, None)
        if item.degraded:
            self._degradations[item.component] = item
            while len(self._degradations) > _MAX_DEGRADATIONS:
                del self._degradations[next(iter(self._degradations))]

    def rejected(self, reason: SignalRejection, leg: str, at: Moment) -> list[RunReport]:
        """An emergency signal was ignored. Counted always, noticed at intervals: a flood must not push history out."""
        self.memory = Memory(
            dead_incarnation=self.memory.dead_incarnation, rejected_signals=self.memory.rejected_signals + 1
        )
        if self._noticed_ns is not None and at.monotonic_ns - self._noticed_ns < REJECTION_NOTICE_NS:
            self._unnoticed += 1
            return []
        more = f" ({self._unnoticed} more since the last notice)" if self._unnoticed else ""
        self._noticed_ns, self._unnoticed = at.monotonic_ns, 0
        message = f"an emergency signal that came by {leg} was ignored: {reason}{more}"
        return self._reports(at, [("notice", Notice(reason=RunReason.SIGNAL_REJECTED, message=message, warning=True))])

    # --- reports -------------------------------------------------------------------------------------------------

    def _reports(self, at: Moment, events: Sequence[tuple[str, Message]] = (), incident: str = "") -> list[RunReport]:
        """One report per event, or one of plain progress; none before there is an incarnation to number by."""
        if self.incarnation == 0:
            return []
        self._reported_ns = at.monotonic_ns
        self._reported_step = self._progress.step
        return [self._report(at, event, incident) for event in events] if events else [self._report(at, None, "")]

    def _report(self, at: Moment, event: tuple[str, Message] | None, incident: str) -> RunReport:
        self._number += 1
        identity = self._identity
        report = RunReport(
            version=1,
            run_uid=identity.run_uid,
            run=identity.run,
            attempt=identity.attempt,
            rank=identity.rank,
            seq=(self.incarnation << 32) | self._number,
            pod_name=identity.pod_name,
            node_name=identity.node_name,
            phase=self.phase,
            progress=self._progress,
            counters=self._totals(),
            checkpoint=self._checkpoint,
            degradations=self._degradations.values(),
            previous_event_seq=self._last_event_seq,
            incident=incident,
        )
        report.time.FromDatetime(at.time)
        if self._beat is not None:
            report.heartbeat_age_ms = max(0, at.monotonic_ns - self._beat.beat_ns) / 1e6
        if event is not None:
            name, content = event
            getattr(report, name).CopyFrom(content)
            self._last_event_seq = report.seq
        return report
