"""The entry: next_status, its order of work, and what makes a write necessary."""

from datetime import datetime
from typing import Any

from esper_leyline import labels
from esper_leyline.phases import ConditionType, Phase
from esper_leyline.reasons import RunReason

from esper_operator.api.runstatus import MAX_HISTORY
from esper_operator.api.v1alpha1 import LastFailure, ObservedReport, Ranks, Status
from esper_operator.model import Applied, Ending, Observation, Outcome, Plan, StatusChange
from esper_operator.observe.attempt import (
    EndKind,
    current_job,
    holds,
    live_job,
    newest_pods,
    pod_end,
    stopped,
    unrecorded,
)
from esper_operator.observe.launch import launched
from esper_operator.observe.timing import counted_restarts, paused_since
from esper_operator.status import halt, table
from esper_operator.status.bounds import milliseconds, reason
from esper_operator.status.draft import Draft
from esper_operator.status.events import aggregate, announce
from esper_operator.status.fold import fold
from esper_operator.status.halt import Row
from esper_operator.status.numbers import complete_progress
from esper_operator.status.phase import activity, phase
from esper_operator.status.podstate import WAITING

_HANDS_OFF = frozenset({RunReason.MANAGED_ELSEWHERE, RunReason.DELETED})
_QUIET = ("progress", "checkpoint", "observedReport", "topology", "ranks")
"""Sections that may wait for the next progress write."""


def next_status(seen: Observation, plan: Plan, applied: Applied | None = None) -> StatusChange:
    """The complete next status, after `plan` was carried out with the result `applied`. Pure: repeatable at will."""
    draft = Draft.begin(seen, plan, applied or Applied())
    if plan.verdict.reason in _HANDS_OFF:
        return StatusChange(status=draft.old, changed=False)
    if holds(draft.old, ConditionType.FINISHED):
        fold(draft)
        return _change(draft, _absorbed(draft))
    if not holds(draft.old, ConditionType.COMPLETE):
        halt.request(draft)
    fold(draft)
    _take_outcome(draft)
    rows = _rows(draft)
    draft.next_attempt_time = _next_attempt_time(draft, rows)
    now = phase(rows, activity(draft))
    why = _reason(draft, now, rows)
    if draft.halt is not None and draft.halt.acknowledged:
        halt.lead_up(draft, now, draft.now)
    draft.history.move(now, time=draft.now, reason=why, attempt=_attempt(draft), step=draft.progress.step)
    status = _status(draft, now, why, rows)
    announce(draft, status)
    return _change(draft, status)


# --- parts of the status -------------------------------------------------------------------------------------


def _take_outcome(draft: Draft) -> None:
    """An attempt that ended: who failed, and how it counts."""
    counted = counted_restarts(draft.seen)
    total, last_time = draft.restarts.total, draft.restarts.last_time
    outcome = draft.plan.outcome
    if outcome is not None:
        if outcome.ending is Ending.SUCCEEDED:
            complete_progress(draft)
        draft.last_failure = _failure(draft, outcome)
        if outcome.ending in (Ending.RESTART, Ending.FAILED):
            counted = outcome.counted
        if outcome.ending is Ending.RESTART:
            total, last_time = total + 1, draft.now
    if (counted, total) != (draft.restarts.counted, draft.restarts.total):
        draft.restarts = draft.restarts.changed(counted=counted, total=total, last_time=last_time)


def _failure(draft: Draft, outcome: Outcome) -> LastFailure | None:
    """The pod's termination, completed by what its report of the same death said before."""
    found, known = outcome.failure, draft.last_failure
    if found is None or (outcome.ending is Ending.HALTED and found.exit_code == 75):
        return known
    found = found.changed(time=milliseconds(found.time or draft.now))
    if known is None or known.pod_name is None or known.pod_name != found.pod_name:
        return found
    return found.changed(
        message=found.message or known.message,
        reason=known.reason if found.reason == RunReason.CONTAINER_DIED else found.reason,
        node_name=found.node_name or known.node_name,
    )


def _rows(draft: Draft) -> dict[ConditionType, Row]:
    rows = table.ends(draft)
    rows[ConditionType.ACCEPTED] = table.accepted(draft)
    finished = rows[ConditionType.FINISHED].status == "True"
    ended = Row("False", RunReason.NOT_HALTED, "the run has ended")
    rows[ConditionType.HALTED] = ended if finished else halt.settle(draft)
    rows[ConditionType.SUSPENDED] = (
        Row("False", RunReason.NOT_SUSPENDED, "the run has ended") if finished else table.suspended(draft)
    )
    rows[ConditionType.PODS_READY] = table.ready(draft, rows)
    rows[ConditionType.HEALTHY] = table.healthy(draft, activity(draft), rows)
    rows[ConditionType.RECOVERABLE] = table.recoverable(draft, rows)
    rows[ConditionType.ROLLED_BACK] = table.rolled_back(draft)
    return rows


def _next_attempt_time(draft: Draft, rows: dict[ConditionType, Row]) -> datetime | None:
    """Set from the moment that an attempt is over until the next one's Job exists."""
    outcome = draft.plan.outcome
    if draft.started is not None or rows[ConditionType.FINISHED].status == "True":
        return None
    if outcome is not None and outcome.next_time is not None:
        return milliseconds(outcome.next_time)
    if unrecorded(draft.seen):
        return None
    known = draft.next_attempt_time
    stands = draft.stopping or rows[ConditionType.HALTED].status == "True"
    if known is None and stopped(draft.old) and not stands and draft.number and live_job(draft.seen) is None:
        return draft.now  # the halt or suspension that ended this attempt is lifted
    return known


def _attempt(draft: Draft) -> int:
    return draft.started if draft.started is not None else draft.number


def _reason(draft: Draft, now: Phase, rows: dict[ConditionType, Row]) -> RunReason:
    """Why this phase: the reason of the condition that decided."""
    accepted, ready = rows[ConditionType.ACCEPTED], rows[ConditionType.PODS_READY]
    match now:
        case Phase.SUCCEEDED | Phase.FAILED:
            return rows[ConditionType.FINISHED].reason
        case Phase.SUSPENDED:
            return rows[ConditionType.SUSPENDED].reason
        case Phase.HALTED | Phase.HALTING:
            halted = rows[ConditionType.HALTED]
            return halted.reason if halted.reason is not RunReason.NOT_HALTED else RunReason.SUSPENDED
        case Phase.RUNNING:
            return RunReason.TRAINING  # steady; how well it trains is the condition Healthy
        case Phase.ROLLING_BACK | Phase.RESTARTING:
            return _cause(draft, now, ready)
    if accepted.status == "False" and current_job(draft.seen) is None:
        return accepted.reason
    return ready.reason if ready.status == "False" else RunReason.STARTING


def _cause(draft: Draft, now: Phase, ready: Row) -> RunReason:
    if ready.reason in WAITING:
        return ready.reason
    last = draft.history.entries[-1] if draft.history.entries else None
    if last is not None and last.to == now:
        return reason(last.reason, RunReason.STARTING)
    if draft.plan.outcome is not None:
        return draft.plan.verdict.reason
    if any((end := pod_end(pod)) is not None and end.kind is EndKind.DRAINED for pod in newest_pods(draft.seen)):
        return RunReason.POD_DISRUPTED
    lost = any(pod.node_lost for pod in newest_pods(draft.seen))
    return RunReason.NODE_LOST if lost else RunReason.POD_LOST


def _status(draft: Draft, now: Phase, why: RunReason, rows: dict[ConditionType, Row]) -> Status:
    seen, old = draft.seen, draft.old
    attempt = _attempt(draft)
    fresh = draft.started is not None or unrecorded(seen)
    finished = rows[ConditionType.FINISHED].status == "True"
    return old.changed(
        observed_generation=seen.run.generation,
        phase=now,
        reason=why,
        conditions=table.merged(draft, rows),
        attempt=attempt,
        job_name=labels.job_name(seen.run.key.name, attempt) if attempt else None,
        next_attempt_time=draft.next_attempt_time,
        start_time=old.start_time or min((pod.created for pod in seen.pods if pod.node), default=None),
        completion_time=draft.now if finished else None,
        paused_seconds=_paused(draft, rows),
        observed_report=draft.observed or ObservedReport(),
        launched=launched(seen.run.spec) if fresh and seen.run.readable else old.launched,
        ranks=_ranks(draft),
        progress=draft.progress,
        topology=draft.topology,
        checkpoint=draft.checkpoint,
        restarts=draft.restarts,
        rollbacks=draft.rollbacks,
        rejections=draft.rejections,
        last_recovery=draft.last_recovery,
        halt=draft.halt,
        last_failure=draft.last_failure,
        history=tuple(draft.history.entries[-MAX_HISTORY:]),
    )


def _absorbed(draft: Draft) -> Status:
    """A finished run: late reports complete its figures, nothing else moves."""
    if holds(draft.old, ConditionType.COMPLETE):
        complete_progress(draft)
    return draft.old.changed(
        observed_report=draft.observed,
        progress=draft.progress,
        topology=draft.topology,
        checkpoint=draft.checkpoint,
        restarts=draft.restarts,
        rollbacks=draft.rollbacks,
        rejections=draft.rejections,
        last_recovery=draft.last_recovery,
        last_failure=draft.last_failure,
    )


def _paused(draft: Draft, rows: dict[ConditionType, Row]) -> int:
    """Adds the time of a standstill when it ends."""
    before = draft.old.paused_seconds or 0
    since = paused_since(draft.old)
    still = any(rows[kind].status == "True" for kind in (ConditionType.HALTED, ConditionType.SUSPENDED))
    return before if since is None or still else before + max(0, int((draft.now - since).total_seconds()))


def _ranks(draft: Draft) -> Ranks:
    pods = newest_pods(draft.seen)
    ends = [end.kind for pod in pods if (end := pod_end(pod)) is not None]
    desired, ready = draft.seen.run.spec.workers.count, sum(pod.ready for pod in pods)
    return Ranks(
        desired=desired,
        ready=ready,
        failed=ends.count(EndKind.FAILED),
        succeeded=ends.count(EndKind.COMPLETE),
        summary=f"{ready}/{desired}",
    )


# --- is it worth a write? ------------------------------------------------------------------------------------


def _change(draft: Draft, status: Status) -> StatusChange:
    """Compares dictionary with dictionary. A mere heartbeat changes nothing and is not written down."""
    events = aggregate(draft.events)
    old, new = draft.old.to_dict(), status.to_dict()
    same = {**new, "observedReport": old.get("observedReport")} == old if "observedReport" in old else new == old
    if same and not events:
        last = draft.observed
        return StatusChange(
            status=draft.old, changed=False, folded=(last.attempt, last.seq) if last is not None else None
        )
    return StatusChange(status=status, events=events, urgent=bool(events) or _loud(old) != _loud(new))


def _loud(status: dict[str, Any]) -> dict[str, Any]:
    """What people wait for: everything but figures and the wording of conditions."""
    kept = {name: value for name, value in status.items() if name not in _QUIET}
    conditions = [
        {k: c[k] for k in ("type", "status", "reason")}
        for c in status.get("conditions", ())
        if c["type"] != ConditionType.PODS_READY or c["reason"] in WAITING  # what pods do otherwise, the phase says
    ]
    return {**kept, "conditions": conditions}
