"""A run that may not start: its spec is wrong, not supported, or its place is taken."""

from esper_leyline.reasons import RunReason

from esper_operator.model import Observation, Plan
from esper_operator.observe.acceptance import problems_of
from esper_operator.observe.attempt import current_job
from esper_operator.policy.plans import wait

OTHERS_POLL_S = 30.0
"""What another run holds up goes on by itself; nothing wakes this run when it does."""


def not_accepted(seen: Observation) -> Plan | None:
    """Creates nothing while there is a problem. A Job that lives goes on as it was started."""
    problems = problems_of(seen)
    if not problems or current_job(seen) is not None:
        return None
    outside = {RunReason.CHECKPOINT_CLAIM_IN_USE, RunReason.RESUME_SOURCE_NOT_FOUND}
    others = any(p.reason in outside for p in problems) or len(problems) > len(seen.run.problems)
    poll = OTHERS_POLL_S if others else None
    return wait(problems[0].reason, "; ".join(map(str, problems)), poll)
