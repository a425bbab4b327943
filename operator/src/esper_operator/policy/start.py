"""Nothing is left in the way: create the next attempt's Job and all that it needs."""

from esper_leyline.phases import ConditionType
from esper_leyline.reasons import RunReason

from esper_operator import build
from esper_operator.api import restricted
from esper_operator.model import Observation, Plan, Verdict
from esper_operator.observe.attempt import current_job, next_number
from esper_operator.policy.plans import remaining, wait

FIRST_RETRY_S = 5.0
LAST_RETRY_S = 300.0


def missing_job(seen: Observation) -> Plan | None:
    """One Job per attempt, create-only: repeating the order is harmless."""
    if current_job(seen) is not None:
        return None
    due = seen.run.status.next_attempt_time
    if due is not None and due > seen.now:
        return wait(RunReason.NEW_ATTEMPT, "waiting before the next attempt", remaining(seen, due))
    attempt = next_number(seen)
    job = build.job(seen.run, attempt, seen.settings, seen.resume)
    forbidden = restricted.check(job["spec"]["template"])
    if forbidden:  # the last line: whatever went wrong before, such a pod is never asked for
        return wait(RunReason.POD_NOT_RESTRICTED, "; ".join(map(str, forbidden)))
    return Plan(
        verdict=Verdict(RunReason.JOB_CREATED, f"attempt {attempt} starts"),
        children=build.children(seen.run, seen.settings, seen.resume.uid if seen.resume else None),
        job=job,
        attempt=attempt,
        requeue_after_s=_retry_s(seen),
    )


def _retry_s(seen: Observation) -> float:
    """Should the API server refuse the Job: after as long again as it has refused it so far, 5 s to 5 min."""
    ready = seen.run.status.condition(ConditionType.PODS_READY)
    if ready is None or ready.reason != RunReason.POD_REFUSED:
        return FIRST_RETRY_S
    refused_for = (seen.now - ready.last_transition_time).total_seconds()
    return min(LAST_RETRY_S, max(FIRST_RETRY_S, refused_for))
