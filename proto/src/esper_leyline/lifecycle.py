"""A seed's life: which stage may follow which, and the gate that is passed on the way.

Gates belong to the stage that is left. G0 is asked twice: when a seed is admitted, and before it begins to train.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from esper_leyline.v1 import seed_pb2 as pb
from esper_leyline.v1.seed_pb2 import SeedLifecycleGate, SeedLifecycleStage

_DORMANT, _GERMINATED = pb.SEED_LIFECYCLE_STAGE_DORMANT, pb.SEED_LIFECYCLE_STAGE_GERMINATED
_TRAINING, _BLENDING = pb.SEED_LIFECYCLE_STAGE_TRAINING, pb.SEED_LIFECYCLE_STAGE_BLENDING
_SHADOWING, _PROBATIONARY = pb.SEED_LIFECYCLE_STAGE_SHADOWING, pb.SEED_LIFECYCLE_STAGE_PROBATIONARY
_FOSSILIZED, _TERMINATED = pb.SEED_LIFECYCLE_STAGE_FOSSILIZED, pb.SEED_LIFECYCLE_STAGE_TERMINATED
_CULLED, _EMBARGOED, _RESETTING = (
    pb.SEED_LIFECYCLE_STAGE_CULLED,
    pb.SEED_LIFECYCLE_STAGE_EMBARGOED,
    pb.SEED_LIFECYCLE_STAGE_RESETTING,
)

Step = tuple[SeedLifecycleStage, SeedLifecycleStage]

GATES: Final[Mapping[Step, SeedLifecycleGate]] = MappingProxyType(
    {
        (_DORMANT, _GERMINATED): pb.SEED_LIFECYCLE_GATE_G0_SANITY,
        (_GERMINATED, _TRAINING): pb.SEED_LIFECYCLE_GATE_G0_SANITY,
        (_TRAINING, _BLENDING): pb.SEED_LIFECYCLE_GATE_G1_GRADIENT_HEALTH,
        (_BLENDING, _SHADOWING): pb.SEED_LIFECYCLE_GATE_G2_STABILITY,
        (_SHADOWING, _PROBATIONARY): pb.SEED_LIFECYCLE_GATE_G3_INTERFACE,
        (_PROBATIONARY, _FOSSILIZED): pb.SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT,
        (_RESETTING, _DORMANT): pb.SEED_LIFECYCLE_GATE_G5_RESET,
    }
)
"""Steps that a gate guards."""

FREE: Final[frozenset[Step]] = frozenset(
    {
        (pb.SEED_LIFECYCLE_STAGE_UNSPECIFIED, _DORMANT),
        (_DORMANT, _TERMINATED),
        (_FOSSILIZED, _TERMINATED),
        (_CULLED, _EMBARGOED),
        (_EMBARGOED, _RESETTING),
        *((stage, _CULLED) for stage in (_GERMINATED, _TRAINING, _BLENDING, _SHADOWING, _PROBATIONARY)),
    }
)
"""Steps that need none."""


class TransitionError(ValueError):
    """A step that no seed may take."""


def gate_of(before: SeedLifecycleStage, after: SeedLifecycleStage) -> SeedLifecycleGate | None:
    """What a seed has to pass on this step; None: nothing. TransitionError for a step that is none."""
    step = (before, after)
    gate = GATES.get(step)
    if gate is None and step not in FREE:
        raise TransitionError(f"no seed goes from {_name(before)} to {_name(after)}")
    return gate


def _name(stage: SeedLifecycleStage) -> str:
    known = SeedLifecycleStage.DESCRIPTOR.values_by_number.get(stage)
    return known.name.removeprefix("SEED_LIFECYCLE_STAGE_") if known else str(stage)
