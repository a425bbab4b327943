"""Takes memory snapshots at their cadence and says which of them are good, and when a state is not sound."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esper_leyline.phases import RestoreOutcome
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Checkpoint

from esper_runtime.tolaria import ring, soundness
from esper_runtime.tolaria.data import Position
from esper_runtime.tolaria.judge import Call, Verdict
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.ring import Held
from esper_runtime.tolaria.slot import Ranges
from esper_runtime.tolaria.snapshot import SnapshotError, Snapshots
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

COMPONENT = "snapshot"
MAX_SUSPECTS = 1000
"""Batches since the last sound snapshot that are remembered; as many as the run's log remembers skipped ones."""
APPLY_ERRORS = (LookupError, TypeError, ValueError, RuntimeError, OverflowError)
"""What putting back a verified state that does not fit may raise."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsound:
    """A state with values that are not finite, found when a snapshot of it was taken."""

    message: str
    first_suspect: int
    """The step after the last snapshot that was sound."""
    batches: tuple[Position, ...]
    """Of the steps since then: one of them did it."""


def never() -> bool:
    """Nothing is late."""
    return False


class Memory:
    """`open_snapshots` gives the slots, whose identity depends on the model's layout; None = spec says Disabled."""

    def __init__(
        self,
        open_snapshots: Callable[[], Snapshots] | None,
        *,
        config: Checkpoint,
        events: Events,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self._events = events
        self._metrics = metrics
        self._open = open_snapshots
        self._snapshots = None if open_snapshots is None else open_snapshots()
        self._exempt: frozenset[str] | None = None
        """Buffers that may hold anything, by name; None until the first state is seen."""
        self._sound_step = 0
        self._since: deque[Position] = deque(maxlen=MAX_SUSPECTS)
        """Batches applied after the last sound snapshot."""
        self._warned = False

    @property
    def snapshots(self) -> Snapshots | None:
        """None when there are none: switched off, or the volume is too small."""
        return self._snapshots

    # Taking

    def after_step(self, state: TrainState, verdict: Verdict) -> Unsound | None:
        """Follows the verdicts; says so when the state itself turns out to be poisoned."""
        snapshots = self._snapshots
        if snapshots is None or verdict.call not in (Call.GOOD, Call.SUSPECT):
            return None
        self._since.append(state.loader.current)
        if verdict.call is Call.SUSPECT:
            return None
        # A good loss at this step was computed with the weights of the step before.
        snapshots.promote(before_step=state.step)
        return self.capture(state, good=False) if state.step % self.config.memory_every_steps == 0 else None

    def capture(self, state: TrainState, *, good: bool) -> Unsound | None:
        """A snapshot, unless the state is not finite: then nothing is published, and what is wrong comes back."""
        snapshots = self._snapshots
        if snapshots is None:
            return None
        self._learn(state)
        snapshots.limit(slots=self.config.memory_snapshots, max_bytes=self.config.memory_max_bytes)
        tensors, blobs, meta = state.live()
        try:
            bad = snapshots.capture(
                step=state.step, tensors=tensors, blobs=blobs, meta=meta, good=good, exempt=self._exempt_ranges(state)
            )
        except SnapshotError as error:
            self._disable(str(error))
            return None
        if bad:
            self._metrics.add("tolaria.rollback.snapshot_rejected_total")
            return self._refused(state, bad)
        self._sound(state)
        self._metrics.add("tolaria.rollback.snapshots_total")
        self._metrics.set("tolaria.rollback.fast_size_bytes", snapshots.size_bytes)
        return None

    def check(self, state: TrainState) -> Unsound | None:
        """As `capture`, without a snapshot.

        For the end of training, whose last steps no snapshot has seen, and to learn whether a bad step stands on
        weights that an earlier one broke.
        """
        if self._snapshots is None:
            return None
        self._learn(state)
        suspects = [name for name, tensor in state.live()[0].items() if soundness.not_finite(tensor)]
        return self._refused(state, suspects) if self._unsound(state, suspects) else None

    def _unsound(self, state: TrainState, tensors: Iterable[str]) -> list[str]:
        """What is not finite and ought to be, by the model's own names."""
        return [name for name in state.culprits(tensors) if name not in (self._exempt or ())]

    def _sound(self, state: TrainState) -> None:
        self._sound_step = state.step
        self._since.clear()
        self._warned = False

    def _refused(self, state: TrainState, bad: list[str]) -> Unsound:
        names = self._unsound(state, bad)
        more = f" and {len(names) - 3} more" if names[3:] else ""
        message = f"after step {state.step} not all of {', '.join(names[:3])}{more} is finite"
        if not self._warned:
            self._warned = True
            self._events.notice(
                RunReason.NON_FINITE_WEIGHT, f"{message}; such a state is never kept as good", warning=True
            )
        return Unsound(message=message, first_suspect=self._sound_step + 1, batches=tuple(self._since))

    def _disable(self, why: str) -> None:
        self._metrics.add("tolaria.rollback.snapshot_rejected_total")
        self._metrics.set("tolaria.rollback.fast_size_bytes", 0)
        message = f"training goes on without memory snapshots: {why}"
        self._events.degradation(COMPONENT, degraded=True, reason=RunReason.SNAPSHOTS_DISABLED, message=message)
        if self._snapshots is not None:
            self._snapshots.release()  # what it holds would be old one day, and be taken for the newest
        self._snapshots = None

    # What need not be finite

    def _learn(self, state: TrainState) -> None:
        """A buffer that is not finite from the start (a mask of -inf) is meant so, and never checked."""
        if self._exempt is None:
            self._exempt = state.never_finite
            if self._exempt:
                log.info("not finite from the start, so not checked: %s", ", ".join(sorted(self._exempt)))

    def _exempt_ranges(self, state: TrainState) -> dict[str, Ranges]:
        if not self._exempt:
            return {}
        return {
            arena.name: tuple((m.offset, m.offset + m.numel) for m in arena.members if m.name in self._exempt)
            for arena in state.buffer_arenas
        }

    # Going back

    def restore_newest(self, state: TrainState) -> int | None:
        """Step of the newest valid snapshot, now in place; None, and an untouched state, when there is none."""
        if self._snapshots is None:
            return None
        for held in self._snapshots.held():
            content = self._snapshots.restore(held, state.restore_targets(), verify_first=True)
            if content is None:
                self._snapshots.discard(held)
                continue
            try:
                state.restore_live(content.tensors, content.blobs, content.meta)
            except APPLY_ERRORS:
                self._snapshots.discard(held)  # so that the next start does not fail on it too
                raise
            self._learn(state)
            self._sound(state)
            return held.step
        return None

    def restore_good(
        self, state: TrainState, *, before_step: int, late: Callable[[], bool] = never
    ) -> tuple[RestoreOutcome, int | None]:
        """(OK, step of the newest good snapshot older than `before_step`, which is now in place), or why not.

        One copy is never interrupted; between two attempts `late` is asked. Unless NO_CHECKPOINT comes back, a state
        that was not restored is to be given up: it may be half of one and half of another. Everything newer than what
        was restored is dropped: it belongs to a course of training that is given up.
        """
        outcome = RestoreOutcome.NO_CHECKPOINT
        for held in self._targets(before_step):
            if outcome is not RestoreOutcome.NO_CHECKPOINT and late():
                return RestoreOutcome.DEADLINE_EXCEEDED, None
            outcome = self._attempt(state, held)
            if outcome is RestoreOutcome.OK:
                return outcome, held.step
        return outcome, None

    def _targets(self, before_step: int) -> Iterable[Held]:
        return () if self._snapshots is None else ring.target(self._snapshots.held(), before_step=before_step)

    def _attempt(self, state: TrainState, held: Held) -> RestoreOutcome:
        snapshots = self._snapshots
        assert snapshots is not None
        content = snapshots.restore(held, state.restore_targets())
        if content is None:
            snapshots.discard(held)
            return RestoreOutcome.INTEGRITY_FAILED
        try:
            state.restore_live(content.tensors, content.blobs, content.meta)
        except APPLY_ERRORS:
            log.exception("the snapshot of step %d verifies, but cannot be put back", held.step)
            return RestoreOutcome.APPLY_FAILED
        snapshots.discard_after(held.step)
        self._sound(state)
        return RestoreOutcome.OK

    def parameters_changed(self, state: TrainState) -> None:
        """Snapshots of another layout fit no more: takes new ones, under the identity of this one."""
        if self._snapshots is None or self._open is None:
            return
        self._snapshots.close()
        self._snapshots, self._exempt = self._open(), None
        self.start_again_at(state)

    def start_again_at(self, state: TrainState) -> Unsound | None:
        """The state came from elsewhere: older snapshots are of another course of training."""
        self._sound(state)
        if self._snapshots is None:
            return None
        self._snapshots.discard_after(-1)
        return self.capture(state, good=True)
