"""What a failed attempt leads to: the exit-code table, the user's own table, back-off and the limit of restarts."""

from datetime import timedelta
from typing import Literal

from esper_leyline.exitcodes import ExitCode
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Restart
from esper_operator.model import Ending, Observation, Outcome, Plan
from esper_operator.observe.attempt import End
from esper_operator.observe.timing import counted_restarts
from esper_operator.policy.plans import record

Action = Literal["Fail", "Halt", "Rollback", "Restart", "RestartUncounted"]
NO_RESTART_HELPS = frozenset(
    {ExitCode.USER_CODE, ExitCode.ROLLBACK_EXHAUSTED, ExitCode.CHECKPOINT_DIR, ExitCode.CONFIG}
)


def after(seen: Observation, end: End) -> Plan:
    """The plan that records a failure. Rollback means Restart here: every new attempt starts from a checkpoint."""
    restart = seen.run.spec.restart
    action = action_for(end, restart)
    counted = counted_restarts(seen)
    what = describe(end)
    if action == "Halt":
        halted = Outcome(ending=Ending.HALTED, failure=end.failure(), saved_step=end.saved_step)
        return record(end.reason, f"{what}; restart.exitCodes says Halt", halted)
    if action == "Fail":
        return record(end.reason, what, Outcome(ending=Ending.FAILED, counted=counted, failure=end.failure()))
    if action != "RestartUncounted":
        counted += 1
        if counted > restart.max_restarts:
            message = f"{restart.max_restarts} restart(s) are used up (restart.maxRestarts); last: {what}"
            failed = Outcome(ending=Ending.FAILED, counted=restart.max_restarts, failure=end.failure())
            return record(RunReason.RESTARTS_EXHAUSTED, message, failed)
    delay = backoff_seconds(restart, counted)
    outcome = Outcome(
        ending=Ending.RESTART,
        next_time=seen.now + timedelta(seconds=delay),
        counted=counted,
        failure=end.failure(),
    )
    of = (
        f"restart {counted} of {restart.max_restarts}"
        if action != "RestartUncounted"
        else "a restart that is not counted"
    )
    return record(end.reason, f"{what}; next attempt in {delay} s, {of}", outcome)


def action_for(end: End, restart: Restart) -> Action:
    """The user's table first, then ours."""
    if end.exit_code is not None:
        for rule in restart.exit_codes:
            if end.exit_code in rule.values:
                return rule.action
    if end.exit_code in NO_RESTART_HELPS or restart.strategy == "InPlace":
        return "Fail"
    if end.reason is RunReason.POD_DISRUPTED and not restart.disruptions_count:
        return "RestartUncounted"
    return "Restart"


def backoff_seconds(restart: Restart, counted: int) -> int:
    """Doubles with each counted restart, from initialBackoffSeconds up to maxBackoffSeconds."""
    doublings = min(max(counted - 1, 0), 32)
    return min(restart.max_backoff_seconds, restart.initial_backoff_seconds << doublings)


def describe(end: End) -> str:
    """One line about a failure, for people."""
    where = f"pod {end.pod.name}" if end.pod else "the Job"
    code = f" with exit code {end.exit_code}" if end.exit_code is not None else ""
    said = end.message.strip().splitlines()
    return f"{where} ended{code} ({end.reason})" + (f": {said[-1][:256]}" if said else "")
