"""Which halt is in force, and whether the last signal already says so."""

from dataclasses import dataclass

from esper_leyline.phases import ConditionType, EmergencyStop, HaltSource
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Halt, Status
from esper_operator.model import Observation, SignalRecord

STRENGTH = (EmergencyStop.NONE, EmergencyStop.FREEZE, EmergencyStop.CHECKPOINT, EmergencyStop.KILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class HaltRequest:
    """The strongest stop that somebody asks for."""

    mode: EmergencyStop
    source: HaltSource
    reason: str
    id: str
    """Name of the request itself: generation of the spec, or key of the broadcast. Stands in for a signal's id."""


def requested(seen: Observation) -> HaltRequest | None:
    """The strongest of spec.emergencyStop and the matching broadcasts. `suspend` beats Freeze: it wants no pods."""
    spec = seen.run.spec
    asked = [
        HaltRequest(
            mode=spec.emergency_stop,
            source=HaltSource.SPEC,
            reason=f"spec.emergencyStop is {spec.emergency_stop}",
            id=f"spec-{seen.run.generation}",
        )
    ]
    asked += [
        HaltRequest(mode=b.mode, source=HaltSource.BROADCAST, reason=b.reason or f"broadcast {b.id}", id=b.id[:63])
        for b in seen.broadcasts
    ]
    strongest = max(asked, key=lambda halt: STRENGTH.index(halt.mode))  # the first of equals: the spec's own
    weakest = EmergencyStop.CHECKPOINT if spec.suspend else EmergencyStop.FREEZE
    return strongest if STRENGTH.index(strongest.mode) >= STRENGTH.index(weakest) else None


def expresses(signal: SignalRecord | None, halt: HaltRequest, attempt: int) -> bool:
    """The last signal sent to this attempt asks for exactly this."""
    return signal is not None and not signal.clear and signal.mode == halt.mode and signal.attempt == attempt


def in_force(status: Status) -> Halt | None:
    """The halt that the status shows as asked for or complete; None when status.halt is only a memory."""
    condition = status.condition(ConditionType.HALTED)
    if condition is None or status.halt is None:
        return None
    current = condition.status == "True" or condition.reason == RunReason.HALT_REQUESTED
    return status.halt if current else None
