"""What is left of earlier attempts must be gone before another one may exist."""

from esper_leyline.reasons import RunReason

from esper_operator.model import Observation, Plan, Verdict
from esper_operator.observe.attempt import number, over
from esper_operator.policy.plans import remove


def stale_attempts(seen: Observation) -> Plan | None:
    """Deletes Jobs of earlier attempts, and of this one once it is over; waits for their pods, however long."""
    at, done = number(seen), over(seen)
    old = [job for job in seen.jobs if job.deleting or done or job.attempt < at]
    kept = {job.uid for job in seen.jobs} - {job.uid for job in old}
    pods = [pod for pod in seen.pods if pod.job_uid not in kept]
    if not old and not pods:
        return None
    lost = next((pod for pod in pods if pod.node_lost), None)
    if lost is not None:
        remedy = f"bring node {lost.node} back, or delete the node"
        message = f"pod {lost.name} cannot be confirmed dead: {remedy}"
        verdict = Verdict(RunReason.NODE_LOST, message)
    else:
        verdict = Verdict(RunReason.PODS_PENDING, "waiting for the previous attempt's pods to be gone")
    return Plan(verdict=verdict, deletions=tuple(remove(job) for job in old if not job.deleting))
