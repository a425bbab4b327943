"""The status in the making: everything that one `next_status` call has worked out so far."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from esper_leyline.phases import Phase
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import Degradation, RuntimePhase

from esper_operator.api.v1alpha1 import (
    CheckpointStatus,
    Halt,
    HistoryEntry,
    LastFailure,
    LastRecovery,
    ObservedReport,
    Progress,
    Rejections,
    Restarts,
    Rollbacks,
    Status,
    Topology,
)
from esper_operator.model import Applied, EventRecord, Observation, Plan
from esper_operator.observe.attempt import number
from esper_operator.observe.halting import requested
from esper_operator.status.bounds import milliseconds

UNREPORTED = RuntimePhase.RUNTIME_PHASE_UNSPECIFIED


@dataclass(slots=True)
class History:
    """The chain of phases: each entry begins where the one before it ended."""

    phase: Phase | None
    entries: list[HistoryEntry]
    added: int = 0

    def move(self, to: Phase, *, time: datetime, reason: str, attempt: int, step: int | None) -> bool:
        """Appends a transition. False when the chain is at `to` already.

        Two clocks speak here, the operator's and that of the pod's node, and news may arrive late: no entry begins
        before the one that it follows.
        """
        if to == self.phase:
            return False
        if self.entries:
            time = max(time, self.entries[-1].time)
        entry = HistoryEntry(time=time, from_=self.phase, to=to, reason=reason, attempt=attempt or None, step=step)
        self.entries.append(entry)
        self.phase = to
        self.added += 1
        return True


@dataclass(slots=True)
class Draft:
    seen: Observation
    plan: Plan
    applied: Applied
    old: Status
    now: datetime
    number: int
    """The current attempt, before the plan creates another."""
    stopping: bool
    """Somebody wants the run to stand still: a halt or suspend."""

    history: History
    progress: Progress
    checkpoint: CheckpointStatus
    topology: Topology | None
    restarts: Restarts
    rollbacks: Rollbacks
    rejections: Rejections
    last_recovery: LastRecovery | None
    last_failure: LastFailure | None
    halt: Halt | None
    observed: ObservedReport | None
    next_attempt_time: datetime | None

    runtime: RuntimePhase = UNREPORTED
    """What the newest report of the current attempt says; unspecified: none arrived."""
    reporter: str = ""
    """Pod of that report."""
    degradations: tuple[Degradation, ...] | None = None
    """Of that report. None: no report arrived."""
    halt_done: bool = False
    """The trainer has frozen, saved or stopped, as the halt in force wants."""
    events: list[EventRecord] = field(default_factory=list)

    @classmethod
    def begin(cls, seen: Observation, plan: Plan, applied: Applied) -> "Draft":
        old = seen.run.status
        return cls(
            seen=seen,
            plan=plan,
            applied=applied,
            old=old,
            now=milliseconds(seen.now),
            number=number(seen),
            stopping=seen.run.spec.suspend or requested(seen) is not None,
            history=History(old.phase, list(old.history)),
            progress=old.progress or Progress(epoch=0, step=0, percentage=0),
            checkpoint=old.checkpoint or CheckpointStatus(),
            topology=old.topology,
            restarts=old.restarts or Restarts(),
            rollbacks=old.rollbacks or Rollbacks(),
            rejections=old.rejections or Rejections(),
            last_recovery=old.last_recovery,
            last_failure=old.last_failure,
            halt=old.halt,
            observed=old.observed_report,
            next_attempt_time=old.next_attempt_time,
        )

    @property
    def incarnation(self) -> int:
        """Starts of the trainer's container in the current attempt that reports have told of."""
        if self.observed is None or self.observed.attempt != self.number:
            return 0
        return self.observed.seq >> 32

    @property
    def started(self) -> int | None:
        """Attempt of the Job that this plan has created; None when it created none."""
        created = self.plan.job is not None and not self.applied.refused and not self.applied.waiting
        return self.plan.attempt if created else None

    def say(
        self, reason: RunReason, message: str, *, warning: bool = False, action: str = "Reconcile", incident: str = ""
    ) -> None:
        self.events.append(
            EventRecord(reason=reason, message=message, warning=warning, action=action, incident=incident)
        )

    def said(self, reasons: Iterable[RunReason]) -> bool:
        wanted = set(reasons)
        return any(event.reason in wanted for event in self.events)
