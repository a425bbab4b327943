"""The two tiers of going back: from memory, and from the volume when memory has nothing or fails.

The fast tier is tried first where rollback.target is BeforeAnomaly; the other targets ask for the volume, and memory
is what remains when that fails. Each attempt ends in one of five outcomes, which are kept apart everywhere.

Deadlines. The fast one counts from the detection of the trouble to the state in place. A copy is never interrupted:
between two copies a tier that is late gives up and the next one follows; a state that is verified and in place when
the deadline has passed is kept, counted as late and said to be, because the full tier could only take longer and go
further back. The full one bounds the load from the volume, which touches nothing that lives; the copy follows when
all of it is verified, in one go.

Where seeds will hold state, their participants prepare before the first tier is tried, in the order Tamiyo, Kasmina,
Tolaria, and the refusal of one ends the rollback with the model untouched. Until then Tolaria has all of the state.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from esper_leyline.events import RunEvent
from esper_leyline.phases import RestoreOutcome, RollbackTier
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Rollback

from esper_runtime.checkpoint.wal import Kind
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.memory import APPLY_ERRORS, Memory
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

Result = tuple[RestoreOutcome, int | None]
"""How an attempt ended, and the step that is in place now."""
log = logging.getLogger(__name__)


class TornStateError(RuntimeError):
    """The live state is half of one and half of another and no source could replace it: this process must end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A verified state is in place."""

    step: int
    tier: RollbackTier
    late: bool
    """Its tier took longer than it may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRestored:
    """No tier had a state. The live one may be half overwritten."""

    outcomes: tuple[tuple[RollbackTier, RestoreOutcome], ...]

    @property
    def nothing_there(self) -> bool:
        """Nothing failed; there only is nothing old enough."""
        return all(outcome is RestoreOutcome.NO_CHECKPOINT for _, outcome in self.outcomes)

    def __str__(self) -> str:
        return ", ".join(f"{tier} tier: {outcome}" for tier, outcome in self.outcomes) or "no tier is on"


class Tiers:
    """Tries them in order and keeps the books."""

    def __init__(
        self,
        *,
        memory: Memory,
        checkpoints: Checkpoints,
        facts: Facts,
        events: Events,
        metrics: Metrics,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._checkpoints = checkpoints
        self._facts = facts
        self._events = events
        self._metrics = metrics
        self._monotonic = monotonic

    def restore(
        self, state: TrainState, *, before_step: int, cause: RunReason, config: Rollback, began: float
    ) -> Restored | NotRestored:
        """Puts a state of a step below `before_step` in place. `began`: when the trouble was detected, in seconds of
        the monotonic clock. TornStateError when a copy into the live state broke off and nothing could replace it."""
        fast_first = config.target == "BeforeAnomaly"
        order = (RollbackTier.FAST, RollbackTier.FULL) if fast_first else (RollbackTier.FULL, RollbackTier.FAST)
        outcomes: list[tuple[RollbackTier, RestoreOutcome]] = []
        for tier in order:
            if tier is RollbackTier.FAST and self._memory.snapshots is None:
                self._metrics.add("tolaria.rollback.fast_misses_total")
                continue
            since = began if not outcomes else self._monotonic()
            outcome, step, late = self._attempt(tier, state, before_step=before_step, config=config, since=since)
            took_ms = (self._monotonic() - since) * 1e3
            self._book(tier, RestoreOutcome.DEADLINE_EXCEEDED if late else outcome, took_ms, cause=cause, step=step)
            if step is not None:
                return Restored(step=step, tier=tier, late=late)
            outcomes.append((tier, outcome))
        failed = NotRestored(outcomes=tuple(outcomes))
        if any(outcome is RestoreOutcome.APPLY_FAILED for _, outcome in outcomes):
            raise TornStateError(f"a verified state could not be put in place and nothing else could: {failed}")
        return failed

    def _attempt(
        self, tier: RollbackTier, state: TrainState, *, before_step: int, config: Rollback, since: float
    ) -> tuple[RestoreOutcome, int | None, bool]:
        """(outcome, step in place, whether it came late)"""
        fast = tier is RollbackTier.FAST
        ends = since + (config.fast_deadline_milliseconds / 1e3 if fast else config.full_deadline_seconds)

        def late() -> bool:
            return self._monotonic() > ends

        if fast:
            outcome, step = self._memory.restore_good(state, before_step=before_step, late=late)
        else:
            outcome, step = self._full(state, before_step=before_step, best=config.target == "Best", ends=ends)
        return outcome, step, step is not None and late()

    def _full(self, state: TrainState, *, before_step: int, best: bool, ends: float) -> Result:
        outcome, loaded = RestoreOutcome.NO_CHECKPOINT, None
        checkpoints = self._checkpoints
        for load in (checkpoints.load_best, checkpoints.load_newest) if best else (checkpoints.load_newest,):
            outcome, loaded = load(before_step=before_step, deadline_s=max(0.0, ends - self._monotonic()))
            if loaded is not None or outcome is RestoreOutcome.DEADLINE_EXCEEDED:
                break
        if loaded is None:
            return outcome, None
        if not state.is_sound(loaded):
            log.error("the checkpoint of step %d is as it was written, but not all of it is finite", loaded.step)
            return RestoreOutcome.INTEGRITY_FAILED, None
        try:
            state.restore_generation(loaded)
        except APPLY_ERRORS:
            log.exception("the checkpoint of step %d verifies, but cannot be put in place", loaded.step)
            return RestoreOutcome.APPLY_FAILED, None
        self._memory.start_again_at(state)
        return RestoreOutcome.OK, loaded.step

    def _book(
        self, tier: RollbackTier, outcome: RestoreOutcome, took_ms: float, *, cause: RunReason, step: int | None
    ) -> None:
        metrics = self._metrics
        metrics.add("tolaria.rollback.attempts_total", tier=tier, result=outcome, reason=cause)
        metrics.observe("tolaria.rollback.duration_ms", took_ms, tier=tier)
        metrics.set("tolaria.rollback.restore_latency_ms", took_ms)
        if tier is RollbackTier.FAST:
            metrics.add(f"tolaria.rollback.fast_{'misses' if step is None else 'hits'}_total")
        if outcome is RestoreOutcome.OK:
            return
        late = outcome is RestoreOutcome.DEADLINE_EXCEEDED
        if late:
            metrics.add("tolaria.rollback.deadline_exceeded_total")
        if step is None:
            metrics.add("tolaria.rollback.failures_total")
        self._facts.record(Kind.RESTORE_FAILURE, outcome=outcome, tier=tier)
        message = f"{tier} tier of rollback: {outcome} after {took_ms:.0f} ms"
        if step is not None:
            message += f"; the state of step {step} is verified and in place, and is kept"
        name = RunEvent.ROLLBACK_DEADLINE if late else RunEvent.RESTORE_FAILED
        self._events.notice(RunReason.RESTORE_FAILED, message, warning=True, name=name)
