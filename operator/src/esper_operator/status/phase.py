"""status.phase: a pure function of the conditions, and of what the attempt is doing where they leave that open."""

from collections.abc import Mapping

from esper_leyline.phases import ConditionType, EmergencyStop, Phase
from esper_leyline.reasons import RunReason

from esper_operator.model import Ending
from esper_operator.observe.attempt import current_job, newest_pods, over, pod_end, training, training_pods
from esper_operator.status.draft import Draft
from esper_operator.status.halt import Row

KUBELET_LAG_S = 5.0
"""A pod that reports is up, though its status may say so only this much later."""
_TRAINED = (Phase.RUNNING, Phase.ROLLING_BACK)


def phase(rows: Mapping[ConditionType, Row], doing: Phase) -> Phase:
    halted, suspended = rows[ConditionType.HALTED], rows[ConditionType.SUSPENDED]
    if rows[ConditionType.COMPLETE].status == "True":
        return Phase.SUCCEEDED
    if rows[ConditionType.FAILED].status == "True":
        return Phase.FAILED
    if halted.status == "True":
        return Phase.HALTED
    if suspended.status == "True":
        return Phase.SUSPENDED
    if RunReason.HALT_REQUESTED is halted.reason or RunReason.SUSPENDED is suspended.reason:
        return Phase.HALTING
    return doing


def activity(draft: Draft) -> Phase:
    """What the current attempt is doing: Pending, Queued, Starting, Running, RollingBack or Restarting.

    The runtime's word, as the history has it, unless the pods cannot possibly be doing that. Restarting lasts from a
    failure until training goes on, across pods and attempts.
    """
    at = draft.history.phase
    job = current_job(draft.seen)
    outcome = draft.plan.outcome
    between = job is None or over(draft.seen) or draft.started is not None or outcome is not None
    if between:
        failed = at is Phase.RESTARTING or (outcome is not None and outcome.ending is Ending.RESTART)
        lost = job is None and at in _TRAINED
        return Phase.RESTARTING if failed or lost else Phase.PENDING
    if job is not None and job.suspended:
        return Phase.QUEUED
    return _of_pods(draft, at)


def _of_pods(draft: Draft, at: Phase | None) -> Phase:
    pods = newest_pods(draft.seen)
    restarting = at is Phase.RESTARTING or at in _TRAINED
    if not pods or any(pod_end(pod) is not None for pod in pods):
        return Phase.RESTARTING if restarting else Phase.PENDING
    if not all(training(pod) for pod in pods) and not (at in _TRAINED and _reports(draft)):
        placed = all(pod.node for pod in pods)
        return Phase.RESTARTING if restarting else Phase.STARTING if placed else Phase.PENDING
    if any(pod.node_lost for pod in pods) and not _reports(draft):
        return Phase.RESTARTING if restarting else Phase.STARTING
    if at is not None and restarting:
        return at
    if _only_has_to_end(draft):
        return Phase.PENDING
    healthy = draft.old.condition(ConditionType.HEALTHY)
    lifted = at in (Phase.HALTING, Phase.HALTED) and healthy is not None and healthy.status != "Unknown"
    return Phase.RUNNING if lifted and training_pods(draft.seen) else Phase.STARTING


def _only_has_to_end(draft: Draft) -> bool:
    """The newest pods were stopped by a halt that is lifted by now: what trains next is another attempt."""
    halt = draft.old.halt
    if halt is None or halt.mode is EmergencyStop.FREEZE or halt.completed_time is None or halt.requested_time is None:
        return False
    return all(pod.created < halt.requested_time for pod in newest_pods(draft.seen))


def _reports(draft: Draft) -> bool:
    """The newest pod itself has reported just now."""
    if any(pod.name == draft.reporter for pod in newest_pods(draft.seen)):
        return True
    age = draft.seen.report_age_s
    pods = sum(1 for pod in draft.seen.pods if pod.attempt == draft.number and pod.rank == 0)
    return age is not None and age < KUBELET_LAG_S and draft.incarnation >= pods
