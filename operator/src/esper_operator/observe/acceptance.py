"""Why a run may not start, from all that was seen; the condition Accepted and the policy of that name share it."""

from esper_leyline.reasons import RunReason

from esper_operator.model import Observation, Problem
from esper_operator.observe.attempt import current_job, number


def problems_of(seen: Observation) -> tuple[Problem, ...]:
    """The spec's own problems, then those that only other objects show."""
    found = list(seen.run.problems)
    storage = seen.run.spec.checkpoint.storage
    if seen.claim_user and current_job(seen) is None:
        where = f"claim {storage.claim_name}" + (f", subPath {storage.sub_path}" if storage.sub_path else "")
        message = f"{where} is in use by run {seen.claim_user}: give this run another claimName or subPath"
        found.append(Problem("spec.checkpoint.storage", message, RunReason.CHECKPOINT_CLAIM_IN_USE))
    source = seen.run.spec.checkpoint.resume_from
    if source is not None and seen.resume_uid is None and number(seen) == 0:
        where = f"run {source.run_name} does not exist in namespace {seen.run.key.namespace}"
        message = f"{where}: create it or remove resumeFrom"
        found.append(Problem("spec.checkpoint.resumeFrom.runName", message, RunReason.RESUME_SOURCE_NOT_FOUND))
    return tuple(found)
