"""Terminal states absorb: only clean-up and the time to live remain."""

from datetime import timedelta

from esper_leyline import labels
from esper_leyline.phases import ConditionType
from esper_leyline.reasons import RunReason

from esper_operator.model import Deletion, Ending, Observation, Outcome, Plan, Verdict
from esper_operator.observe.attempt import EndKind, attempt_end, holds, live_job
from esper_operator.policy.plans import record, remaining, remove


def finished(seen: Observation) -> Plan | None:
    """Complete or Failed. A Job that may still hold pods is deleted, one that has ended stays for its logs."""
    status = seen.run.status
    complete, failed = holds(status, ConditionType.COMPLETE), holds(status, ConditionType.FAILED)
    if not complete and not failed:
        return None
    reason = RunReason.COMPLETE if complete else RunReason.JOB_FAILED
    verdict = Verdict(reason, "the run is complete" if complete else "the run has failed")
    live = None if complete else live_job(seen)
    leftovers = [job for job in seen.jobs if not job.deleting and job is live]
    ttl = seen.run.spec.ttl_seconds_after_finished
    if ttl is None or status.completion_time is None:
        return Plan(verdict=verdict, deletions=tuple(remove(job) for job in leftovers))
    left = remaining(seen, status.completion_time + timedelta(seconds=ttl))
    if left > 0:
        return Plan(verdict=verdict, deletions=tuple(remove(job) for job in leftovers), requeue_after_s=left)
    return Plan(verdict=verdict, deletions=(Deletion(kind=labels.KIND, name=seen.run.key.name, uid=seen.run.uid),))


def succeeded(seen: Observation) -> Plan | None:
    """Exit code 0 means that training is complete, whatever else is asked for at the same time."""
    end = attempt_end(seen)
    if end is None or end.kind is not EndKind.COMPLETE:
        return None
    result = f": {end.message}" if end.message else ""
    return record(RunReason.COMPLETE, f"training is complete{result}", Outcome(ending=Ending.SUCCEEDED))
