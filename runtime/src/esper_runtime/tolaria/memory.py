"""Takes memory snapshots at their cadence and says which of them are good."""

from collections.abc import Callable

from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Checkpoint

from esper_runtime.tolaria.judge import Call, Verdict
from esper_runtime.tolaria.snapshot import Held, SnapshotError, Snapshots
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

COMPONENT = "snapshot"


class Memory:
    """`open_snapshots` gives the slots, whose identity depends on the model's layout; None = spec says Disabled."""

    def __init__(self, open_snapshots: Callable[[], Snapshots] | None, *, config: Checkpoint, events: Events) -> None:
        self.config = config
        self._events = events
        self._snapshots = None if open_snapshots is None else open_snapshots()

    @property
    def snapshots(self) -> Snapshots | None:
        """None when there are none: switched off, or the volume is too small."""
        return self._snapshots

    def after_step(self, state: TrainState, verdict: Verdict) -> None:
        snapshots = self._snapshots
        if snapshots is None or verdict.call is not Call.GOOD:
            return
        # A good loss at this step was computed with the weights of the step before.
        snapshots.promote(before_step=state.step)
        if state.step % self.config.memory_every_steps == 0:
            self.capture(state, good=False)

    def capture(self, state: TrainState, *, good: bool) -> None:
        if self._snapshots is None:
            return
        tensors, blobs, meta = state.live()
        try:
            self._snapshots.capture(step=state.step, tensors=tensors, blobs=blobs, meta=meta, good=good)
        except SnapshotError as error:
            message = f"training goes on without memory snapshots: {error}"
            self._events.degradation(COMPONENT, degraded=True, reason=RunReason.CHECKPOINT_FAILED, message=message)
            self._snapshots = None

    def restore_newest(self, state: TrainState) -> int | None:
        """Step of the newest valid snapshot, now in place; None when there is none."""
        return self._restore(state, lambda _: True)

    def restore_good(self, state: TrainState, *, before_step: int) -> int | None:
        """Step of the newest good snapshot older than `before_step`, now in place; None when there is none.

        Everything newer is dropped: it belongs to a course of training that is given up.
        """
        step = self._restore(state, lambda held: held.good and held.step < before_step)
        if step is not None and self._snapshots is not None:
            self._snapshots.discard_after(step)
        return step

    def start_again_at(self, state: TrainState) -> None:
        """The state came from elsewhere: older snapshots are of another course of training."""
        if self._snapshots is not None:
            self._snapshots.discard_after(-1)
            self.capture(state, good=True)

    def _restore(self, state: TrainState, fits: Callable[[Held], bool]) -> int | None:
        if self._snapshots is None:
            return None
        for held in filter(fits, self._snapshots.held()):
            content = self._snapshots.restore(held, state.restore_targets())
            if content is not None:
                state.restore_live(content.tensors, content.blobs, content.meta)
                return held.step
            self._snapshots.discard(held)
        return None
