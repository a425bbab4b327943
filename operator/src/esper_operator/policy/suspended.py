"""spec.suspend releases the pods; state stays on the volume."""

from esper_leyline.reasons import RunReason

from esper_operator.model import Observation, Plan, Verdict
from esper_operator.policy.plans import remove


def suspended(seen: Observation) -> Plan | None:
    if not seen.run.spec.suspend:
        return None
    jobs = tuple(remove(job) for job in seen.jobs if not job.deleting)
    message = "waiting for the pods to end" if seen.jobs else "spec.suspend is true"
    return Plan(verdict=Verdict(RunReason.SUSPENDED, message), deletions=jobs)
