"""A person said stop, or takes it back.

Freeze keeps the pods; Checkpoint and Kill end them with exit code 75. The signal goes out once per attempt and mode.
Pods that do not train yet have nothing to save: their Job is deleted. A halt that nobody acknowledges in time falls
back on the Job's deletion, which is SIGTERM, and so a checkpoint too.
"""

from datetime import timedelta

from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Halt
from esper_operator.model import Job, Observation, Plan, SignalOrder, Verdict
from esper_operator.observe.attempt import live_job, number, training_pods
from esper_operator.observe.halting import HaltRequest, expresses, in_force, requested
from esper_operator.policy.plans import remaining, remove, wait


def emergency(seen: Observation) -> Plan | None:
    halt = requested(seen)
    job = live_job(seen)
    if halt is None:
        return _lift(seen, job)
    if job is None:
        pods = training_pods(seen)
        return (
            wait(RunReason.HALT_REQUESTED, "waiting for pods to end") if pods else wait(RunReason.HALTED, halt.reason)
        )
    if halt.mode is EmergencyStop.FREEZE:
        return _signal(seen, halt) or wait(RunReason.FROZEN, halt.reason)
    if not training_pods(seen):
        return _delete(job, halt, "nothing trains yet")
    return _signal(seen, halt) or _overdue(seen, job, halt)


def _lift(seen: Observation, job: Job | None) -> Plan | None:
    """Clears the signal that still holds this attempt's pods, also one that nobody has on record but its answer."""
    signal, record = seen.signal, in_force(seen.run.status)
    if job is None:
        return None
    if signal is not None and not signal.clear and signal.attempt == number(seen):
        mode, source, signal_id = signal.mode, signal.source, signal.signal_id
    elif record is not None and _frozen_unknown(seen, record):
        mode, source, signal_id = record.mode, record.source, record.id
    else:
        return None
    order = SignalOrder(
        mode=mode,
        source=source,
        reason="the halt was lifted",
        attempt=number(seen),
        clear=True,
        signal_id=signal_id,
    )
    return Plan(verdict=Verdict(RunReason.RESUMED, "the halt was lifted"), signal=order, requeue_after_s=0)


def _frozen_unknown(seen: Observation, record: Halt) -> bool:
    """The pods stand still for a signal that was sent by Redis alone, and no signal that lifts it has been sent."""
    if record.mode is not EmergencyStop.FREEZE or record.source is HaltSource.RUNTIME or not training_pods(seen):
        return False
    return seen.signal is None or seen.signal.signal_id != record.id


def _signal(seen: Observation, halt: HaltRequest) -> Plan | None:
    """None when the last signal already says the same."""
    if expresses(seen.signal, halt, number(seen)):
        return None
    order = SignalOrder(mode=halt.mode, source=halt.source, reason=halt.reason, attempt=number(seen))
    timeout = float(seen.run.spec.emergency.acknowledge_timeout_seconds)
    return Plan(verdict=Verdict(RunReason.HALT_REQUESTED, halt.reason), signal=order, requeue_after_s=timeout)


def _overdue(seen: Observation, job: Job, halt: HaltRequest) -> Plan:
    """Waits for the pods to end; deletes their Job when no answer, or no end, comes in time."""
    record = in_force(seen.run.status)
    spec = seen.run.spec
    patience = spec.emergency.acknowledge_timeout_seconds
    if record is None or record.mode is not halt.mode or record.requested_time is None:
        return wait(RunReason.HALT_REQUESTED, halt.reason, float(patience))  # the status says so in a moment
    answered = record.acknowledged >= record.expected
    if answered and halt.mode is EmergencyStop.CHECKPOINT:
        patience += spec.restart.termination_grace_period_seconds
    left = remaining(seen, record.requested_time + timedelta(seconds=patience))
    if left > 0:
        return wait(RunReason.HALT_REQUESTED, halt.reason, left)
    return _delete(job, halt, "saved but did not end in time" if answered else "did not acknowledge in time")


def _delete(job: Job, halt: HaltRequest, why: str) -> Plan:
    # One second and not 0: without grace the API server would drop a pod that its node may still be running.
    grace = 1 if halt.mode is EmergencyStop.KILL else None
    verdict = Verdict(RunReason.HALT_REQUESTED, f"{halt.reason}; Job {job.name} is deleted: {why}")
    return Plan(verdict=verdict, deletions=(remove(job, grace_seconds=grace),))
