"""Observation -> Plan: the ordered chain of policies. The order is the design; each line has a reason."""

from collections.abc import Callable

from esper_operator.model import Observation, Plan
from esper_operator.policy.acceptance import not_accepted
from esper_operator.policy.converged import converged, node_lost
from esper_operator.policy.deadline import active_deadline, startup_deadline
from esper_operator.policy.emergency import emergency
from esper_operator.policy.ended import ended, halted_by_runtime
from esper_operator.policy.finished import finished, succeeded
from esper_operator.policy.ownership import being_deleted, managed_elsewhere
from esper_operator.policy.stale import stale_attempts
from esper_operator.policy.start import missing_job
from esper_operator.policy.suspended import suspended

Policy = Callable[[Observation], Plan | None]

POLICIES: tuple[Policy, ...] = (
    managed_elsewhere,  # another controller's run: hands off
    being_deleted,  # garbage collection does the rest
    finished,  # terminal states absorb; clean-up and time to live only
    succeeded,  # training is complete: no stop, failure or deadline undoes that
    emergency,  # a person said stop, or takes it back; before everything that could start or restart something
    suspended,  # releases the pods; weaker than Checkpoint and Kill, stronger than Freeze
    halted_by_runtime,  # rests until a person decides
    ended,  # an attempt is over: record it, once, before anything of it is deleted
    active_deadline,  # the run's time is up, also between attempts
    stale_attempts,  # earlier pods must be gone before new ones exist
    not_accepted,  # never create from a spec that we refuse
    missing_job,  # create what is absent
    node_lost,  # wait for the node; deadlines below would only delete what cannot be confirmed dead
    startup_deadline,  # a start that leads nowhere is a failure
)


def decide(seen: Observation) -> Plan:
    """What to do about one run, from one consistent look at it. No I/O, no clock, no randomness."""
    for policy in POLICIES:
        plan = policy(seen)
        if plan is not None:
            return plan
    return converged(seen)
