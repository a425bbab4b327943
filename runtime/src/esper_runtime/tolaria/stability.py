"""How well the run stands: breakers, conservative mode and the emergency level, behind one door.

The parts of Tolaria tell what went wrong or right; this module decides what may go on. It never acts on the model.
"""

from enum import StrEnum
from typing import Protocol

from esper_leyline.reasons import RunReason


class Part(StrEnum):
    """What has a breaker of its own; the label `name` of tolaria.breaker.state."""

    TAMIYO = "tamiyo"
    KASMINA = "kasmina"
    BOUNDARY_TIMING = "boundary_timing"
    LR_INTEGRITY = "lr_integrity"
    OPTIMIZER_REBUILD = "optimizer_rebuild"
    CHECKPOINT = "checkpoint"


class Stability(Protocol):
    """What the other parts of Tolaria may ask and tell."""

    @property
    def conservative(self) -> bool:
        """No optimizer rebuild, no profiling, no structural change; training, snapshots and checkpoints go on."""

    def allows(self, part: Part) -> bool:
        """Whether the protected call may be made now: closed, or the one probe of a half-open breaker.

        A denied call is no failure and is not to be told.
        """

    def succeeded(self, part: Part) -> None:
        """A protected call went well."""

    def failed(self, part: Part, why: str) -> None:
        """A protected call failed, or an integrity check did."""

    def anomaly(self, reason: RunReason, message: str) -> None:
        """A NaN, an infinity, a loss spike or a gradient explosion: level 3."""

    def rolled_back(self, reason: RunReason, message: str) -> None:
        """A rollback was done: level 3; open breakers become half-open."""

    def halted(self, reason: RunReason, message: str) -> None:
        """The run is going to halt by its own decision: level 4."""


class Calm:
    """Stands in where nothing is watched, such as in tests of one part: everything is allowed, nothing kept."""

    conservative = False

    def allows(self, part: Part) -> bool:
        return True

    def succeeded(self, part: Part) -> None:
        return

    def failed(self, part: Part, why: str) -> None:
        return

    def anomaly(self, reason: RunReason, message: str) -> None:
        return

    def rolled_back(self, reason: RunReason, message: str) -> None:
        return

    def halted(self, reason: RunReason, message: str) -> None:
        return
