"""One training step: forward, backward, judgement, and only then the optimizer.

What a workload asks for is chosen once: `step_of` gives the plain step, one that accumulates, one that scales, or both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from esper_leyline.reasons import RunReason
from torch import Tensor, nn

from esper_runtime.tolaria.amp import Loss, Scaler
from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.judge import GOOD, LEFT_OUT, Call, Verdict
from esper_runtime.tolaria.learning_rate import LearningRate
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.state import TrainState
from esper_runtime.workload import Batch, Workload

Evaluate = Callable[[Batch, TrainState, int], Tensor]
"""(batch or list of batches, state, step) -> loss, with the gradients collected."""


@dataclass(frozen=True, slots=True)
class StepResult:
    verdict: Verdict
    evaluated_ns: int
    """CLOCK_MONOTONIC when the loss was known."""
    judged_ns: int


class Step:
    """Runs steps of one workload on one state. `loss` is the workload's own, or what features.py made of it."""

    def __init__(
        self,
        workload: Workload,
        state: TrainState,
        faults: Faults,
        *,
        learning_rate: LearningRate,
        loss: Loss,
        metrics: Metrics,
    ) -> None:
        self._loss = loss
        self._clip = workload.clip_gradient_norm
        self._faults = faults
        self._learning_rate = learning_rate
        self._update = state.update
        self._metrics = metrics
        self._backward: Callable[[Tensor], None] = Tensor.backward

    def guard(self, guard: Callable[[Evaluate], Evaluate]) -> None:
        """Puts something around the evaluation of loss and gradients."""
        self._evaluate = guard(self._evaluate)  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        """Training ends."""

    def run(self, batch: Batch, state: TrainState) -> StepResult:
        """Advances the state by one step; parameters change only if the verdict allows it."""
        step = state.step + 1
        update = self._update
        self._faults.before_step(step)
        buffers = _kept_buffers(state)
        loss_tensor = self._evaluate(batch, state, step)
        loss = loss_tensor.item()
        evaluated_ns = time.monotonic_ns()
        self._faults.on_gradient(step, update)
        squared_norm = update.squared_norm()
        verdict = LEFT_OUT if _left_out(state) else state.judge.check(step, loss, squared_norm, update.all_finite)
        judged_ns = time.monotonic_ns()
        if verdict.call in (Call.GOOD, Call.SUSPECT):
            self._apply(batch, state, step, loss_tensor, squared_norm)
            self._count(state, loss)
        elif verdict.call is Call.DISCARD:
            _put_back(buffers)
        if verdict.call is not Call.BAD:
            state.step = step
            state.loss = loss
        return StepResult(verdict, evaluated_ns, judged_ns)

    def _evaluate(self, batch: Batch, state: TrainState, step: int) -> Tensor:
        update = self._update
        update.prepare()
        loss = self._loss_of(batch, state.model, step)
        self._backward(loss)
        update.collect()
        return loss.detach()

    def _loss_of(self, batch: Batch, model: nn.Module, step: int) -> Tensor:
        loss = self._loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"Workload.loss returned {shape}; it must return a scalar tensor")
        return self._faults.on_loss(step, loss)

    def _apply(self, batch: Batch, state: TrainState, step: int, loss: Tensor, squared_norm: float) -> None:
        update = self._update
        if self._clip is not None and squared_norm > self._clip**2:
            update.scale_gradients(self._clip / squared_norm**0.5)
            self._metrics.add("tolaria.grad.clipped_total")
        self._learning_rate.apply(step=step - 1, epoch=state.epoch, scale=state.learning_rate_scale)
        update.apply(self._closure(batch, state, step, loss) if update.needs_closure else _no_closure)

    def _count(self, state: TrainState, loss: float) -> None:
        """The epoch's mean is over samples, so that a smaller last batch weighs less."""
        sums, samples = state.sums, state.loader.samples
        sums.loss += loss * samples
        sums.steps += 1
        sums.samples += samples

    def _closure(self, batch: Batch, state: TrainState, step: int, loss: Tensor) -> Callable[[], Tensor]:
        """The first call is answered by the gradients that were judged; later ones evaluate anew."""
        first = True

        def closure() -> Tensor:
            nonlocal first
            if first:
                first = False
                return loss
            with torch.enable_grad():
                return self._evaluate(batch, state, step)

        return closure


class AccumulatingStep(Step):
    """One step over a list of batches: gradient and loss are the means of theirs."""

    def _evaluate(self, batch: list[Batch], state: TrainState, step: int) -> Tensor:
        """Judged at the fence, over all batches together: one synchronisation with the device per step."""
        update = self._update
        update.prepare()
        count = len(batch)
        losses = []
        for each in batch:
            loss = self._loss_of(each, state.model, step)
            self._backward(loss / count)
            losses.append(loss.detach().reshape(()))
        update.collect()
        self._losses: list[float] = torch.stack(losses).tolist()
        return torch.tensor(sum(self._losses) / count, dtype=torch.float64)

    def _apply(self, batch: Batch, state: TrainState, step: int, loss: Tensor, squared_norm: float) -> None:
        losses = self._losses
        super()._apply(batch, state, step, loss, squared_norm)
        self._losses = losses  # a closure evaluates again; the judged losses are those that count

    def _count(self, state: TrainState, loss: float) -> None:
        sums = state.sums
        sums.loss += sum(map(float.__mul__, self._losses, map(float, state.loader.lengths)))
        sums.steps += 1
        sums.samples += state.loader.samples


class _Scaled(Step):
    """With float16's gradient scaler: gradients are unscaled before anybody looks at them."""

    def scale_with(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self._backward = scaler.backward

    def run(self, batch: Batch, state: TrainState) -> StepResult:
        step = state.step + 1
        update, scaler = self._update, self._scaler
        self._faults.before_step(step)
        buffers = _kept_buffers(state)
        loss_tensor = self._evaluate(batch, state, step)
        scaler.unscale(update.optimizer)
        loss = loss_tensor.item()
        evaluated_ns = time.monotonic_ns()
        squared_norm = update.squared_norm()
        if self._overflowed(loss, squared_norm):
            return self._without(state, step, loss, evaluated_ns)
        if self._faults.on_gradient(step, update):
            squared_norm = update.squared_norm()
        verdict = LEFT_OUT if _left_out(state) else state.judge.check(step, loss, squared_norm, update.all_finite)
        judged_ns = time.monotonic_ns()
        if verdict.call in (Call.GOOD, Call.SUSPECT):
            self._apply(batch, state, step, loss_tensor, squared_norm)
            self._count(state, loss)
            scaler.settle()
        else:
            scaler.forget()
            if verdict.call is Call.DISCARD:
                _put_back(buffers)
        if verdict.call is not Call.BAD:
            state.step = step
            state.loss = loss
        return StepResult(verdict, evaluated_ns, judged_ns)

    def _overflowed(self, loss: float, squared_norm: float) -> bool:
        """A finite loss whose scaled gradients were too large for float16: the scale is to blame, not the training."""
        if math.isfinite(squared_norm) or not math.isfinite(loss):
            return False
        return self._scaler.scales and not self._update.all_finite()

    def _without(self, state: TrainState, step: int, loss: float, evaluated_ns: int) -> StepResult:
        """No anomaly: the scale shrinks and training goes on. An open spike streak stays open."""
        self._scaler.settle()
        self._metrics.add("tolaria.amp.skipped_steps_total")
        self._count(state, loss)
        state.step = step
        state.loss = loss
        suspicious = state.judge.suspicious
        verdict = Verdict(call=Call.SUSPECT, reason=RunReason.LOSS_SPIKE) if suspicious else GOOD
        return StepResult(verdict, evaluated_ns, time.monotonic_ns())


class ScaledStep(_Scaled):
    """One batch per step."""


class ScaledAccumulatingStep(_Scaled, AccumulatingStep):
    """Several."""


def step_of(
    workload: Workload,
    state: TrainState,
    faults: Faults,
    *,
    learning_rate: LearningRate,
    loss: Loss,
    metrics: Metrics,
    scaler: Scaler | None,
) -> Step:
    """The step that this workload needs. ValueError when its optimizer cannot have one."""
    accumulates = workload.accumulation_steps > 1
    if scaler is None:
        kind = AccumulatingStep if accumulates else Step
        return kind(workload, state, faults, learning_rate=learning_rate, loss=loss, metrics=metrics)
    if state.update.needs_closure:
        raise ValueError(
            f'precision="float16" scales gradients, which {type(state.update.optimizer).__name__} cannot have: '
            'it evaluates again within a step; use "bfloat16" or "float32"'
        )
    scaled_kind = ScaledAccumulatingStep if accumulates else ScaledStep
    scaled = scaled_kind(workload, state, faults, learning_rate=learning_rate, loss=loss, metrics=metrics)
    scaled.scale_with(scaler)
    return scaled


def _kept_buffers(state: TrainState) -> list[tuple[Tensor, Tensor]]:
    """(live, copy) of what the forward pass changes, where a step may be left out; a rollback restores it anyway."""
    return [(buffer, buffer.clone()) for buffer in state.model.buffers()] if state.judge.may_discard else []


@torch.no_grad()
def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for live, kept in buffers:
        live.copy_(kept)


def _left_out(state: TrainState) -> bool:
    """This very step was not applied before, and is replayed: it is to leave the same state."""
    loader = state.loader
    return bool(loader.left_out) and loader.current in loader.left_out


def _no_closure() -> Tensor:
    raise AssertionError("this optimizer asks for no closure")
