"""The current attempt has ended and nobody asked for it: record how, so that an operator killed now loses nothing."""

from esper_leyline.labels import TOLARIA
from esper_leyline.phases import ConditionType, EmergencyStop, HaltSource
from esper_leyline.reasons import RunReason

from esper_operator.model import Ending, Observation, Outcome, Plan
from esper_operator.observe.attempt import (
    End,
    EndKind,
    attempt_end,
    holds,
    number,
    over,
    stopped,
    training_pods,
    unrecorded,
)
from esper_operator.observe.halting import in_force
from esper_operator.policy import restart
from esper_operator.policy.plans import record, wait


def halted_by_runtime(seen: Observation) -> Plan | None:
    """The runtime (or restart.exitCodes) halted the run: it rests until a person halts or suspends it and goes on."""
    halt = in_force(seen.run.status)
    if halt is None or halt.source is not HaltSource.RUNTIME or not holds(seen.run.status, ConditionType.HALTED):
        return None
    message = "set spec.emergencyStop to Checkpoint and back to None to go on"
    return None if training_pods(seen) else wait(RunReason.HALTED, message)


def ended(seen: Observation) -> Plan | None:
    end = None if over(seen) else attempt_end(seen)
    if end is None or end.kind is EndKind.DRAINED:
        return None
    rests = end.kind is EndKind.HALTED or restart.action_for(end, seen.run.spec.restart) == "Halt"
    if rests and _lifted(seen, end):
        resume = Outcome(ending=Ending.RESUME, next_time=seen.now, saved_step=end.saved_step)
        return record(RunReason.RESUMED, "the halt was lifted", resume)
    return _halted(end) if end.kind is EndKind.HALTED else restart.after(seen, end)


def _halted(end: End) -> Plan:
    """Exit code 75 that nobody asked for: the runtime halted by itself."""
    halted = Outcome(ending=Ending.HALTED, saved_step=end.saved_step, failure=end.failure())
    return record(end.reason, end.message or "the runtime halted the run", halted)


def _lifted(seen: Observation, end: End) -> bool:
    """A person has stopped this attempt and taken that back: what it ended with is answered by that."""
    halt, signal, answer = in_force(seen.run.status), seen.signal, end.kind is EndKind.HALTED
    if halt is not None:  # a crash under Freeze is news to the person who thaws the run
        return halt.source is not HaltSource.RUNTIME and (answer or halt.mode is not EmergencyStop.FREEZE)
    if stopped(seen.run.status) and not unrecorded(seen):
        return True  # suspended
    sent = signal is not None and signal.attempt == number(seen)
    stopping = signal is not None and signal.mode in (EmergencyStop.CHECKPOINT, EmergencyStop.KILL)
    if answer and (signal is None or signal.attempt != number(seen)) and _answered(seen):
        return True  # its sender was killed when only Redis had it
    return answer and sent and stopping and end.reason is not RunReason.ROLLBACKS_EXHAUSTED


def _answered(seen: Observation) -> bool:
    """A trainer of this attempt has answered a stop."""
    acks = (report.ack for report in seen.reports if report.attempt == number(seen) and report.HasField("ack"))
    return any(ack.participant == TOLARIA and not ack.clear for ack in acks)
