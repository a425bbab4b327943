"""What the loop owes to those who watch: the metrics file, and the lines of the record that no event brings.

Called after every step; once a second it does something, and never waits for the volume. Owns no state of training.
"""

import logging
import math
import resource
import time
from collections.abc import Callable

import torch
from esper_leyline.events import RunEvent
from esper_leyline.reasons import RunReason

from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.record import Record
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.telemetry import Events

COMPONENT = "record"
EVERY_S = 1.0
SAMPLES = 500
"""Losses per doubling-and-a-bit of the run's length: one at most a second, and fewer the longer the run is."""
log = logging.getLogger(__name__)


class Publisher:
    """One per trainer. `device` is asked for its memory."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        record: Record,
        events: Events,
        device: torch.device,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._record = record
        self._events = events
        self._device = device
        self._monotonic = monotonic
        self._due = 0.0
        self._sample_due = 0.0
        self._epoch_began = monotonic()
        self._steps = 0
        self._incomplete = False
        self._unwritable = False

    def after_step(self, state: TrainState) -> None:
        self._steps += 1
        if self._monotonic() >= self._due:
            self._due = self._monotonic() + EVERY_S
            self._sample(state)
            self._tell_norm(state)
            self._watch_record()
            self._write(now=False)

    def close(self, timeout_s: float) -> bool:
        """Waits until the record is written. False when that takes longer."""
        return self._record.close(timeout_s)

    # Epochs

    def epoch_ends(self, state: TrainState) -> None:
        """All batches are trained; validation and the boundary come."""
        self._tell_norm(state)
        took_s, sums = self._monotonic() - self._epoch_began, state.sums
        if self._steps and took_s > 0:
            self._metrics.set("tolaria.train.step_ms", took_s * 1e3 / self._steps)
            if sums.steps == self._steps:
                self._metrics.set("tolaria.train.samples_per_s", sums.samples / took_s)

    def epoch_ended(self, state: TrainState, measured: dict[str, float]) -> None:
        """`measured`: what the epoch reports, such as train_loss and validation_loss."""
        took_s = self._monotonic() - self._epoch_began
        self._epoch_began, self._steps = self._monotonic(), 0
        metrics = self._metrics
        metrics.add("tolaria.epochs.total")
        metrics.add("tolaria.epochs_completed_total")
        metrics.set("tolaria.training.latency_ms", took_s * 1e3)
        metrics.set("tolaria.epoch_duration_seconds", took_s)
        for name, targets in _OF_EPOCH.items():
            value = measured.get(name)
            if value is not None and math.isfinite(value):
                for target in targets:
                    metrics.set(target, value)
        self._write(now=True)
        self._record.append(RunEvent.METRICS, step=state.step, values=metrics.snapshot())

    # Every second

    def _sample(self, state: TrainState) -> None:
        now = state.clock.seconds()
        if now < self._sample_due or not math.isfinite(state.loss):
            return
        self._sample_due = now + max(EVERY_S, now / SAMPLES)
        self._record.append(RunEvent.PROGRESS, step=state.step, loss=state.loss)

    def _tell_norm(self, state: TrainState) -> None:
        if math.isfinite(state.judge.norm):
            self._metrics.set("tolaria.grad.norm_l2", state.judge.norm)

    def _watch_record(self) -> None:
        trouble = self._record.trouble
        if bool(trouble) != self._incomplete:
            self._incomplete = bool(trouble)
            message = f"training goes on without its record: {trouble}" if trouble else "the record is written again"
            self._events.degradation(
                COMPONENT, degraded=self._incomplete, reason=RunReason.RECORD_INCOMPLETE, message=message
            )

    def _write(self, *, now: bool) -> None:
        self._metrics.set("tolaria.memory_usage_gb", self._memory_bytes() / 2**30)
        try:
            self._metrics.write(now=now)
        except OSError as error:
            if not self._unwritable:
                log.error("the trainer's metrics cannot be written: %s", error)
            self._unwritable = True
        else:
            self._unwritable = False

    def _memory_bytes(self) -> int:
        """On a GPU what torch holds there, else the most this process has had resident."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_OF_EPOCH: dict[str, tuple[str, ...]] = {
    "train_loss": ("tolaria.training.loss", "tolaria.current_loss"),
    "train_accuracy": ("tolaria.training.accuracy",),
    "validation_loss": ("tolaria.validation.loss",),
    "validation_accuracy": ("tolaria.validation.accuracy", "tolaria.current_accuracy"),
}
