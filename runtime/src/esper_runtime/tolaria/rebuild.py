"""Changes to what is trained, and by which optimizer: at a boundary only, and not too often.

The breaker `optimizer_rebuild` is asked and told by whoever wants a rebuild (commands.py); how often there may be one,
what it keeps, and what is told of it is decided here.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from esper_leyline.reasons import RunReason
from torch import nn

from esper_runtime.schedules import Schedule
from esper_runtime.tolaria.commands import Refused
from esper_runtime.tolaria.groups import seed_group
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.optimizers import Carried, Factory, OptimizerRebuildError, factory_for
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events


class RebuildSkippedError(Exception):
    """Not now: the message says why. Nothing was tried, and nothing has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StormGuard:
    """The least distance between two rebuilds; both must be kept. One step: no two at one boundary."""

    steps: int = 1
    seconds: float = 10.0


class Rebuilds:
    """Of one trainer. Counts time by `monotonic`."""

    def __init__(
        self,
        *,
        memory: Memory,
        metrics: Metrics,
        events: Events,
        guard: StormGuard | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._metrics = metrics
        self._events = events
        self._guard = guard or StormGuard()
        self._monotonic = monotonic
        self._last: tuple[int, float] | None = None
        """Step and time of the last rebuild, failed ones too."""

    def rebuild_for(self, state: TrainState, optimizer_id: str) -> Carried:
        """An optimizer of another class (optimizers.KINDS) with the same groups and base rates. Errors as `rebuild`."""
        return self.rebuild(state, lambda: factory_for(optimizer_id, state.update.optimizer), why=f"as {optimizer_id}")

    def rebuild(self, state: TrainState, factory: Callable[[], Factory], *, why: str) -> Carried:
        """Puts what the factory makes in the optimizer's place.

        OptimizerRebuildError when that fails, and RebuildSkippedError when it may not be tried now; the optimizer is
        the old one then, with its state.
        """
        self._require_calm(state)
        began = self._monotonic()
        self._last = state.step, began
        try:
            carried = state.update.rebuild(factory())
        except OptimizerRebuildError as error:
            self._metrics.add("tolaria.opt.rebuild_failures_total")
            message = f"the optimizer is not rebuilt {why[:64]}: {error}"
            self._events.notice(RunReason.OPTIMIZER_REBUILD_FAILED, message, warning=True)
            raise
        took_ms = (self._monotonic() - began) * 1e3
        self._metrics.add("tolaria.opt.rebuilds_total")
        self._metrics.set("tolaria.opt.rebuild_latency_ms", took_ms)
        self._metrics.set("tolaria.opt.state_preserved_ratio", carried.ratio)
        name = type(state.update.optimizer).__name__
        kept = f"{carried.preserved} of {carried.total} values of its state kept"
        message = f"the optimizer is {name} from step {state.step + 1}, {kept}, in {took_ms:.1f} ms"
        self._events.notice(RunReason.OPTIMIZER_REBUILT, message)
        return carried

    def _require_calm(self, state: TrainState) -> None:
        try:
            _require_boundary(state)
            self._require_distance(state)
        except RebuildSkippedError:
            self._metrics.add("tolaria.opt.rebuild_skipped_total")
            raise

    def _require_distance(self, state: TrainState) -> None:
        if self._last is None:
            return
        steps, seconds = state.step - self._last[0], self._monotonic() - self._last[1]
        if 0 <= steps < self._guard.steps:  # less than 0 after a rollback
            raise RebuildSkippedError(f"the last rebuild was {steps} steps ago; at least {self._guard.steps} must pass")
        if seconds < self._guard.seconds:
            raise RebuildSkippedError(
                f"the last rebuild was {seconds:.1f} s ago; at least {self._guard.seconds:g} s must pass"
            )

    # Parameters

    def add_parameters(
        self,
        state: TrainState,
        parameters: Sequence[nn.Parameter],
        *,
        name: str,
        warmup_steps: int,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        """A new group for parameters that the model has got: a tenth of the first group's base rate, warmed up.

        `schedule` takes the place of the warm-up and reduction on plateaus; `options` are torch's. RebuildSkippedError
        within an epoch, ValueError for parameters that cannot be added; nothing has changed then.
        """
        _require_boundary(state)
        group = seed_group(
            name,
            state.update.groups[0],
            warmup_steps=warmup_steps,
            step=state.step,
            epoch=state.epoch,
            schedule=schedule,
        )
        state.update.add_parameters(parameters, group, **options)
        self._changed(state)

    def remove_parameters(self, state: TrainState, names: Collection[str]) -> None:
        """No longer trained, by name; their optimizer state is dropped. Errors as `add_parameters`."""
        _require_boundary(state)
        state.update.remove_parameters(names)
        self._changed(state)

    def _changed(self, state: TrainState) -> None:
        state.parameters_changed()
        self._memory.parameters_changed(state)


def as_command(rebuilds: Rebuilds) -> Callable[[TrainState, str], None]:
    """What Commands calls for an optimizer_id."""

    def rebuild(state: TrainState, optimizer_id: str) -> None:
        try:
            rebuilds.rebuild_for(state, optimizer_id)
        except RebuildSkippedError as skipped:
            raise Refused(str(skipped)) from skipped

    return rebuild


def _require_boundary(state: TrainState) -> None:
    if state.loader.position.batch != 0:
        raise RebuildSkippedError("an epoch is going on: parameters and optimizer change between epochs only")
