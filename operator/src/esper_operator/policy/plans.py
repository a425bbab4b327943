"""Small plans that several policies share."""

from datetime import datetime

from esper_leyline.reasons import RunReason

from esper_operator.model import Deletion, Job, Observation, Outcome, Plan, Verdict


def wait(reason: RunReason, message: str, seconds: float | None = None) -> Plan:
    """Do nothing now; look again after `seconds`, or when something changes."""
    return Plan(verdict=Verdict(reason, message), requeue_after_s=seconds)


def record(reason: RunReason, message: str, outcome: Outcome) -> Plan:
    """Write the end down first; the next look acts on it."""
    return Plan(verdict=Verdict(reason, message), outcome=outcome, requeue_after_s=0)


def remove(job: Job, *, grace_seconds: int | None = None) -> Deletion:
    return Deletion(kind="Job", name=job.name, uid=job.uid, grace_seconds=grace_seconds)


def remaining(seen: Observation, until: datetime) -> float:
    """Seconds from now to `until`; never negative."""
    return max(0.0, (until - seen.now).total_seconds())
