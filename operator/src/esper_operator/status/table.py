"""All ten conditions, worked out from scratch each time; only lastTransitionTime comes from what was written before."""

from collections.abc import Mapping

from esper_leyline import labels
from esper_leyline.phases import ConditionType, Phase
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Condition
from esper_operator.model import Container, Ending, Pod
from esper_operator.observe.acceptance import problems_of
from esper_operator.observe.attempt import newest_pods, pod_end, training, training_pods
from esper_operator.status.bounds import reason, seconds
from esper_operator.status.draft import Draft
from esper_operator.status.halt import Row
from esper_operator.status.podstate import pods_ready

MAX_MESSAGE = 4096
_OBSERVED = frozenset({RunReason.NODE_LOST, RunReason.NO_REPORTS, RunReason.POD_REFUSED})
"""Reasons of Healthy that the operator sees by itself; the others came from the runtime and stay until it says more."""
_BROKEN = ("CrashLoopBackOff", "RunContainerError", "CreateContainerError")


def ends(draft: Draft) -> dict[ConditionType, Row]:
    """Complete, Failed and Finished, by the plan's outcome."""
    outcome = draft.plan.outcome
    ending = outcome.ending if outcome is not None else None
    said = draft.plan.verdict
    complete, failed = ending is Ending.SUCCEEDED, ending is Ending.FAILED
    return {
        ConditionType.COMPLETE: Row("True", RunReason.COMPLETE, said.message)
        if complete
        else Row("False", said.reason if failed else RunReason.NOT_FINISHED, said.message if failed else "not yet"),
        ConditionType.FAILED: Row("True", said.reason, said.message)
        if failed
        else Row("False", RunReason.NOT_FAILED, "the run has not failed"),
        ConditionType.FINISHED: Row("True", said.reason, said.message)
        if complete or failed
        else Row("False", RunReason.NOT_FINISHED, "not yet"),
    }


def accepted(draft: Draft) -> Row:
    problems = problems_of(draft.seen)
    if problems:
        return Row("False", problems[0].reason, "; ".join(map(str, problems)))
    verdict = draft.plan.verdict
    if verdict.reason is RunReason.POD_NOT_RESTRICTED:
        return Row("False", verdict.reason, verdict.message)
    return Row("True", RunReason.ACCEPTED, "the spec is valid and supported")


def suspended(draft: Draft) -> Row:
    if not draft.seen.run.spec.suspend:
        return Row("False", RunReason.NOT_SUSPENDED, "spec.suspend is false")
    if any(pod_end(pod) is None for pod in draft.seen.pods):
        return Row("False", RunReason.SUSPENDED, "waiting for the pods to end")
    return Row("True", RunReason.SUSPENDED, "spec.suspend is true; state is kept")


def ready(draft: Draft, rows: Mapping[ConditionType, Row]) -> Row:
    """PodsReady, where the run is meant to have pods; else why it has none."""
    finished = rows[ConditionType.FINISHED]
    if finished.status == "True":
        return Row("False", finished.reason, "the run has ended")
    stands = next((r for k in (ConditionType.HALTED, ConditionType.SUSPENDED) if (r := rows[k]).status == "True"), None)
    if stands is not None and not training_pods(draft.seen):
        return Row("False", stands.reason, "the run stands still and has no pods")
    return pods_ready(draft)


def healthy(draft: Draft, doing: Phase, rows: Mapping[ConditionType, Row]) -> Row:
    """Unknown until the attempt's pods have made a step; startup_deadline relies on that."""
    old = draft.old.condition(ConditionType.HEALTHY)
    complete, failed = rows[ConditionType.COMPLETE], rows[ConditionType.FAILED]
    if complete.status == "True":
        return Row("True", RunReason.COMPLETE, "training is complete")
    if failed.status == "True":
        return Row("False", failed.reason, failed.message)
    pods = training_pods(draft.seen)
    stepped = old is not None and old.status != "Unknown"
    if not pods or draft.started is not None:
        return Row("Unknown", RunReason.NOT_STARTED, "no pod trains")
    lost = _lost(pods)
    if stepped and lost is not None:
        return lost
    if doing is Phase.RESTARTING and stepped and not _pods_changed(draft):
        cause = reason(draft.last_failure.reason if draft.last_failure else "", RunReason.TRAINER_CRASHED)
        return Row("False", cause, "the trainer is being restarted in its pod")
    if doing not in (Phase.RUNNING, Phase.ROLLING_BACK) and not (stepped and draft.stopping):
        return Row("Unknown", RunReason.NOT_STARTED, "no step yet")
    return lost or _trouble(draft, pods) or _reported(draft, old)


def _pods_changed(draft: Draft) -> bool:
    return not all(training(pod) for pod in newest_pods(draft.seen))


def _lost(pods: tuple[Pod, ...]) -> Row | None:
    lost = next((pod for pod in pods if pod.node_lost), None)
    if lost is None:
        return None
    return Row("False", RunReason.NODE_LOST, f"node {lost.node} of pod {lost.name} is unreachable")


def _trouble(draft: Draft, pods: tuple[Pod, ...]) -> Row | None:
    """What the operator sees by itself, besides a lost node."""
    if draft.applied.refused:
        message = f"the API server refused {draft.applied.refused}; the pods train on with what they have"
        return Row("False", RunReason.POD_REFUSED, message)
    for pod in pods:
        for name in labels.SIDECARS:
            container = pod.container(name)
            if container is not None and _down(container):
                message = f"container {name} of pod {pod.name} is down; training goes on, the kubelet restarts it"
                return Row("False", RunReason.SIDECAR_DOWN, message)
    age, limit = draft.seen.report_age_s, draft.seen.run.spec.health.heartbeat_timeout_seconds
    if age is not None and age >= limit:
        message = f"no report for more than {limit} s: neither Redis nor the pod's own log answers; training may go on"
        return Row("False", RunReason.NO_REPORTS, message)
    return None


def _down(container: Container) -> bool:
    """It ended, or it was started again and does not answer yet."""
    broken = container.terminated is not None or container.waiting_reason in _BROKEN
    return broken or (container.restarts > 0 and not container.ready)


def _reported(draft: Draft, old: Condition | None) -> Row:
    """What the runtime's newest report says, or said."""
    if draft.degradations is None:
        return _said_before(old)
    told = [d for d in draft.degradations if d.reason != RunReason.CONSERVATIVE_MODE]
    if told:
        message = "; ".join(f"{d.component}: {d.message or d.reason}" for d in told[:8])
        return Row("False", reason(told[0].reason, RunReason.SIDECAR_DOWN), message)
    if draft.checkpoint.last_error:
        return Row("False", RunReason.CHECKPOINT_FAILED, f"checkpoint: {draft.checkpoint.last_error}")
    if draft.degradations:  # a way to train, chosen by Tamiyo: nothing is broken
        why = draft.degradations[0]
        return Row("True", RunReason.CONSERVATIVE_MODE, f"{why.component}: {why.message or 'conservative mode'}")
    return Row("True", RunReason.TRAINING, "training")


def _said_before(old: Condition | None) -> Row:
    """No report has come since: what the runtime said last still counts."""
    said = reason(old.reason, RunReason.TRAINING) if old is not None else RunReason.TRAINING
    if old is not None and old.status == "False" and said not in _OBSERVED:
        return Row("False", said, old.message)
    if old is not None and old.status == "True" and said is RunReason.CONSERVATIVE_MODE:
        return Row("True", said, old.message)
    return Row("True", RunReason.TRAINING, "training")


def recoverable(draft: Draft, rows: Mapping[ConditionType, Row]) -> Row:
    lost = next((p for p in draft.seen.pods if p.node_lost and pod_end(p) is None), None)
    if lost is not None and rows[ConditionType.FINISHED].status != "True":
        message = f"pod {lost.name} cannot be confirmed dead: bring node {lost.node} back, or delete the node"
        return Row("False", RunReason.NODE_LOST, message)
    if rows[ConditionType.FAILED].reason is RunReason.NO_VALID_CHECKPOINT:
        return Row("False", RunReason.NO_VALID_CHECKPOINT, rows[ConditionType.FAILED].message)
    step = draft.checkpoint.latest_verified_step
    bad = "".join(f"; did not verify: {name}" for name in draft.checkpoint.corrupt_files)
    if step is None:
        return Row("Unknown", RunReason.NO_CHECKPOINT, f"no verified checkpoint yet{bad}")
    return Row("True", RunReason.RECOVERABLE, f"the checkpoint of step {step} is verified{bad}")


def rolled_back(draft: Draft) -> Row:
    total = draft.rollbacks.total
    if not total:
        return Row("False", RunReason.NO_ROLLBACK, "no rollback so far")
    return Row(
        "True", RunReason.ROLLED_BACK, f"{total} rollback(s) so far; status.lastRecovery and status.history say more"
    )


def merged(draft: Draft, rows: Mapping[ConditionType, Row]) -> tuple[Condition, ...]:
    """The conditions as written, in the order of ConditionType."""
    return tuple(_condition(draft, kind, rows[kind]) for kind in ConditionType)


def _condition(draft: Draft, kind: ConditionType, row: Row) -> Condition:
    old = draft.old.condition(kind)
    same = old is not None and old.status == row.status
    return Condition.model_validate(
        {
            "type": kind.value,
            "status": row.status,
            "observedGeneration": draft.seen.run.generation,
            "lastTransitionTime": old.last_transition_time if old is not None and same else seconds(draft.now),
            "reason": row.reason.value,
            "message": row.message[:MAX_MESSAGE],
        }
    )
