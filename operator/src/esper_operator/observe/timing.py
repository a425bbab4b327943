"""Durations of a run, by the time that arrives with the observation."""

from datetime import datetime, timedelta

from esper_leyline.phases import ConditionType

from esper_operator.api.v1alpha1 import Status
from esper_operator.model import Observation
from esper_operator.observe.attempt import holds, newest_pods, pod_end


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


def counted_restarts(seen: Observation) -> int:
    """restarts.counted, back at 0 when the run has been healthy for restart.resetAfterSeconds."""
    status = seen.run.status
    counted = status.restarts.counted if status.restarts else 0
    healthy = status.condition(ConditionType.HEALTHY)
    if counted == 0 or healthy is None or healthy.status != "True":
        return counted
    span = timedelta(seconds=seen.run.spec.restart.reset_after_seconds)
    return 0 if seen.now - healthy.last_transition_time >= span else counted
