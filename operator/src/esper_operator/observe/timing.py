"""Durations of a run, by the time that arrives with the observation."""

from datetime import datetime, timedelta

from esper_leyline.phases import ConditionType

from esper_operator.api.v1alpha1 import Status
from esper_operator.model import Observation, Pod
from esper_operator.observe.attempt import holds, newest_pods, pod_end

COMPLAINT_PATIENCE_S = 15.0
"""With the claim, once the scheduler complains of it."""
SILENT_PATIENCE_S = 60.0
"""While it does not: the volume may be in the making."""


def paused_since(status: Status) -> datetime | None:
    """Since when the run is frozen, halted or suspended; None while it is not."""
    since = [
        condition.last_transition_time
        for kind in (ConditionType.HALTED, ConditionType.SUSPENDED)
        if holds(status, kind) and (condition := status.condition(kind)) is not None
    ]
    return min(since, default=None)


def active_seconds(seen: Observation) -> float:
    """Time since the first pod that counts against activeDeadlineSeconds."""
    status = seen.run.status
    if status.start_time is None:
        return 0.0
    until = paused_since(status) or seen.now
    return max(0.0, (until - status.start_time).total_seconds() - (status.paused_seconds or 0))


def starting_since(seen: Observation) -> datetime | None:
    """When the oldest pod that has not made its first step was taken by a node. None when there is none.

    Waiting for a node or a claim does not count: the pod goes on by itself as soon as there is one.
    """
    healthy = seen.run.status.condition(ConditionType.HEALTHY)
    if healthy is not None and healthy.status != "Unknown":
        return None  # this attempt's pods have stepped
    waiting = [pod.started for pod in newest_pods(seen) if pod.started is not None and pod_end(pod) is None]
    return min(waiting, default=None)


def claim_patience_s(seen: Observation, pod: Pod) -> float | None:
    """Seconds until a claim that is not bound counts as the reason why `pod` has no place; None when it is not.

    Every claim is unbound for a moment, and one that waits for its first pod is so while its volume is made.
    """
    claim, said = seen.claim, pod.unschedulable
    if claim is None or claim.phase == "Bound" or pod.node or pod_end(pod) is not None:
        return None
    if said and "volume" not in said.lower():
        return None  # something else is missing, and the claim may only wait for a node
    patience = COMPLAINT_PATIENCE_S if said else SILENT_PATIENCE_S
    return max(0.0, patience - (seen.now - pod.created).total_seconds())


def counted_restarts(seen: Observation) -> int:
    """restarts.counted, back at 0 when the run has been healthy for restart.resetAfterSeconds."""
    status = seen.run.status
    counted = status.restarts.counted if status.restarts else 0
    healthy = status.condition(ConditionType.HEALTHY)
    if counted == 0 or healthy is None or healthy.status != "True":
        return counted
    span = timedelta(seconds=seen.run.spec.restart.reset_after_seconds)
    return 0 if seen.now - healthy.last_transition_time >= span else counted
