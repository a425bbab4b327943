"""Runs that are not ours to touch: another controller's, or on their way out."""

from esper_leyline import labels
from esper_leyline.reasons import RunReason

from esper_operator.model import Observation, Plan
from esper_operator.policy.plans import wait


def managed_elsewhere(seen: Observation) -> Plan | None:
    """spec.managedBy names another controller (MultiKueue): not even the status is ours."""
    owner = seen.run.spec.managed_by
    if owner is None or owner == labels.MANAGED_BY:
        return None
    return wait(RunReason.MANAGED_ELSEWHERE, f"spec.managedBy is {owner}")


def being_deleted(seen: Observation) -> Plan | None:
    """Owner references take every child away; a write would only come too late."""
    return wait(RunReason.DELETED, "the run is being deleted") if seen.run.deleting else None
