"""Limits of time: on the whole run, and on the start of an attempt."""

from datetime import timedelta

from esper_leyline.reasons import RunReason

from esper_operator.model import Ending, Observation, Outcome, Plan
from esper_operator.observe.attempt import End, EndKind, live_job, newest_pods
from esper_operator.observe.timing import active_seconds, counted_restarts, starting_since
from esper_operator.policy import restart
from esper_operator.policy.plans import record


def active_deadline(seen: Observation) -> Plan | None:
    """spec.activeDeadlineSeconds is over: the run fails. Time frozen, halted or suspended does not count."""
    limit = seen.run.spec.active_deadline_seconds
    if limit is None or active_seconds(seen) < limit:
        return None
    message = f"not complete after spec.activeDeadlineSeconds = {limit}"
    return record(RunReason.DEADLINE_EXCEEDED, message, Outcome(ending=Ending.FAILED, counted=counted_restarts(seen)))


def startup_deadline(seen: Observation) -> Plan | None:
    """No first step within spec.startupDeadlineSeconds of being given a node: the attempt has failed."""
    limit = seen.run.spec.startup_deadline_seconds
    since = starting_since(seen)
    if live_job(seen) is None or since is None or seen.now - since < timedelta(seconds=limit):
        return None
    end = End(
        kind=EndKind.FAILED,
        exit_code=None,
        reason=RunReason.STARTUP_DEADLINE_EXCEEDED,
        message=f"no first step within spec.startupDeadlineSeconds = {limit}",
        pod=newest_pods(seen)[0],
        finished=seen.now,
    )
    return restart.after(seen, end)
