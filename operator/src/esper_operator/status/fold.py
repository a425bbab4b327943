"""Takes the runtime's reports in, in order, each exactly once.

What a report counts is cumulative, so a lost report costs history entries and never a total. Reports of an attempt
that is over still bring their counts, but move no phase.
"""

from datetime import datetime

from esper_leyline.phases import ConditionType, Phase, RecoveryKind, RollbackTier
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import common_pb2 as wire_common
from esper_leyline.v1 import report_pb2 as wire
from esper_leyline.v1.report_pb2 import RunReport, RuntimePhase

from esper_operator.api.v1alpha1 import LastFailure, LastRecovery, ObservedReport
from esper_operator.observe.attempt import holds, over
from esper_operator.status import bounds, halt
from esper_operator.status.draft import Draft, History
from esper_operator.status.numbers import fold_checkpoint, fold_counters, fold_progress

_KINDS = {
    wire.RECOVERY_KIND_IN_PROCESS: (RecoveryKind.IN_PROCESS, RunReason.ROLLED_BACK),
    wire.RECOVERY_KIND_IN_PLACE: (RecoveryKind.IN_PLACE, RunReason.RESTARTED_IN_PLACE),
    wire.RECOVERY_KIND_POD_REPLACED: (RecoveryKind.POD_REPLACED, RunReason.POD_REPLACED),
    wire.RECOVERY_KIND_NEW_ATTEMPT: (RecoveryKind.NEW_ATTEMPT, RunReason.NEW_ATTEMPT),
}
_TIERS = {wire_common.ROLLBACK_TIER_FAST: RollbackTier.FAST, wire_common.ROLLBACK_TIER_FULL: RollbackTier.FULL}
_PLAIN = {
    RuntimePhase.RUNTIME_PHASE_RUNNING: Phase.RUNNING,
    RuntimePhase.RUNTIME_PHASE_ROLLING_BACK: Phase.ROLLING_BACK,
    RuntimePhase.RUNTIME_PHASE_RESTARTING: Phase.RESTARTING,
    RuntimePhase.RUNTIME_PHASE_FAILED: Phase.RESTARTING,
    RuntimePhase.RUNTIME_PHASE_STOPPING: Phase.RESTARTING,
    RuntimePhase.RUNTIME_PHASE_HALTING: Phase.HALTING,
    RuntimePhase.RUNTIME_PHASE_FROZEN: Phase.HALTED,
}
_STANDING = (Phase.HALTING, Phase.HALTED, Phase.SUSPENDED)


def fold(draft: Draft) -> None:
    """Folds every report that is newer than what the status includes."""
    cursor = _cursor(draft)
    lost = False
    for report in draft.seen.reports:
        at = (report.attempt, report.seq)
        if at <= cursor or report.run_uid != draft.seen.run.uid:
            continue
        if report.attempt > draft.number:
            break  # of a Job that our caches do not show yet: it keeps
        lost = lost or not _follows(cursor, report)
        _one(draft, report)
        cursor = at
    if lost:
        message = "some reports of the runtime were lost: the history has gaps, totals are right"
        draft.say(RunReason.REPORTS_LOST, message, warning=True)
    _catch_up(draft)


def _cursor(draft: Draft) -> tuple[int, int]:
    observed = (draft.observed.attempt, draft.observed.seq) if draft.observed else (0, 0)
    return max(observed, draft.seen.report_cursor or (0, 0))


def _follows(before: tuple[int, int], report: RunReport) -> bool:
    """False when a report with an event came before this one and was not seen. Mere progress may be left out."""
    attempt, seq = before
    return report.previous_event_seq <= (seq if attempt == report.attempt else 0)


def _one(draft: Draft, report: RunReport) -> None:
    late = report.attempt < draft.number or over(draft.seen) or holds(draft.old, ConditionType.FINISHED)
    time = bounds.moment(report.time, draft.now)
    _count_pods(draft, report)
    fold_counters(draft, report)
    fold_checkpoint(draft, report)
    if report.attempt == draft.number:
        fold_progress(draft, report, time)
    _event(draft, report, time, late=late)
    if not late:
        draft.reporter = report.pod_name
        draft.degradations = tuple(d for d in report.degradations if d.degraded)
        if report.phase:
            draft.runtime = report.phase
    draft.observed = ObservedReport(attempt=report.attempt, seq=report.seq)


def _count_pods(draft: Draft, report: RunReport) -> None:
    """Each incarnation after the first of an attempt is a pod that its Job has replaced."""
    observed = draft.observed
    known = observed.seq >> 32 if observed and observed.attempt == report.attempt else min(1, report.seq >> 32)
    more = max(0, (report.seq >> 32) - max(known, 1))
    if more:
        draft.restarts = draft.restarts.changed(total=draft.restarts.total + more)


def _event(draft: Draft, report: RunReport, time: datetime, *, late: bool) -> None:
    match report.WhichOneof("event"):
        case "transition" if not late:
            _transition(draft, report.transition, bounds.moment(report.transition.time, time), report.attempt)
        case "recovery":
            _recovery(draft, report, time)
        case "ack":
            halt.acknowledge(draft, report.ack, report.pod_name)
        case "failure":
            _failure(draft, report, time, late=late)
        case "completion" if report.completion.export_path:
            path = report.completion.export_path[:512]
            draft.checkpoint = draft.checkpoint.changed(export_path=path)
        case "notice":
            reason = bounds.reason(report.notice.reason, RunReason.TRAINING)
            message, warning = bounds.message(report.notice.message), report.notice.warning
            draft.say(reason, message, warning=warning, action="Report", incident=_incident(report))


def _incident(report: RunReport) -> str:
    return report.incident[: bounds.MAX_INCIDENT]


def _transition(draft: Draft, transition: wire.Transition, time: datetime, attempt: int) -> None:
    to = phase_of(transition.to_phase, draft.history.phase, stopping=draft.stopping)
    if to is not None:
        reason = transition.reason[: bounds.MAX_REASON]
        step = bounds.count(transition.step)
        halt.lead_up(draft, to, time)
        draft.history.move(to, time=time, reason=reason, attempt=attempt, step=step)
    if transition.to_phase:
        draft.runtime = transition.to_phase


def phase_of(runtime: RuntimePhase, at: Phase | None, *, stopping: bool) -> Phase | None:
    """Where the runtime's word moves the run's phase that is `at`; None: nowhere."""
    if runtime == RuntimePhase.RUNTIME_PHASE_HALTED:
        return Phase.HALTED if stopping or at is Phase.HALTED else Phase.HALTING
    if runtime == RuntimePhase.RUNTIME_PHASE_STARTING:
        if at in (Phase.RUNNING, Phase.ROLLING_BACK):
            return Phase.RESTARTING
        return Phase.STARTING if at in (None, Phase.PENDING, Phase.QUEUED) else None
    to = _PLAIN.get(runtime)
    if stopping and runtime == RuntimePhase.RUNTIME_PHASE_STOPPING and at not in _STANDING:
        return Phase.HALTING  # drained because somebody said stop, which no status says yet
    if to is Phase.HALTING and at is Phase.HALTED:
        return None
    if stopping and at in _STANDING and to not in (Phase.HALTING, Phase.HALTED):
        return None  # the operator's wish is newer than this word
    return to


def _catch_up(draft: Draft) -> None:
    """Where the newest report's phase is not where its transitions led, some of them were lost."""
    if draft.runtime and not draft.stopping:
        to = phase_of(draft.runtime, draft.history.phase, stopping=False)
        if to in (Phase.STARTING, Phase.RUNNING, Phase.RESTARTING, Phase.ROLLING_BACK):
            step = draft.progress.step
            draft.history.move(to, time=draft.now, reason=RunReason.TRAINING, attempt=draft.number, step=step)


def _recovery(draft: Draft, report: RunReport, time: datetime) -> None:
    recovery = report.recovery
    known = _KINDS.get(recovery.kind)
    if known is None:
        return
    kind, reason = known
    resumed = kind is RecoveryKind.NEW_ATTEMPT and _stood_before(draft.history)
    found = LastRecovery(
        kind=kind,
        tier=_TIERS.get(recovery.tier),
        cause=RunReason.RESUMED if resumed else recovery.cause[: bounds.MAX_REASON],
        from_step=bounds.count(recovery.from_step),
        to_step=bounds.count(recovery.to_step),
        detected_time=bounds.moment(recovery.detected_time, time),
        completed_time=bounds.moment(recovery.completed_time, time),
        detect_milliseconds=bounds.nearest(recovery.detect_ms),
        recover_milliseconds=bounds.nearest(recovery.recover_ms),
        incident=_incident(report) or None,
    )
    draft.last_recovery = found
    message = f"{found.cause}: step {found.from_step} -> {found.to_step} in {found.recover_milliseconds} ms"
    draft.say(reason, message, warning=not resumed, action="Recover", incident=_incident(report))


def _stood_before(history: History) -> bool:
    """The attempt that starts follows a halt or a suspension; nothing was lost, which its trainer cannot know."""
    for entry in reversed(history.entries):
        if entry.from_ in (Phase.HALTED, Phase.SUSPENDED):
            return True
        if entry.from_ not in (Phase.PENDING, Phase.QUEUED, Phase.STARTING):
            return False
    return False


def _failure(draft: Draft, report: RunReport, time: datetime, *, late: bool) -> None:
    failure = report.failure
    known = draft.last_failure
    if late and known is not None and known.pod_name == report.pod_name:
        return  # the pod's termination has told more already
    reason = bounds.reason(failure.reason, RunReason.TRAINER_CRASHED)
    draft.last_failure = LastFailure(
        rank=report.rank,
        pod_name=report.pod_name[:253] or None,
        node_name=report.node_name[:253] or None,
        container_name=failure.container[:63] or None,
        exit_code=failure.exit_code or None,
        reason=reason,
        message=bounds.message(failure.message),
        time=bounds.moment(failure.time, time),
    )
    message = f"pod {report.pod_name}: {failure.message.strip() or reason}"
    draft.say(reason, bounds.message(message), warning=True, action="Report", incident=_incident(report))
