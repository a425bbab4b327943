"""One training step: forward, backward, judgement, and only then the optimizer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.judge import Call, Verdict
from esper_runtime.tolaria.state import TrainState
from esper_runtime.workload import Batch, Workload


@dataclass(frozen=True, slots=True)
class StepResult:
    verdict: Verdict
    evaluated_ns: int
    """CLOCK_MONOTONIC when the loss was known."""
    judged_ns: int


class Step:
    """Runs steps of one workload on one state."""

    def __init__(self, workload: Workload, state: TrainState, faults: Faults, *, planned_steps: int) -> None:
        self._loss: Callable[[nn.Module, Batch], Tensor] = workload.loss
        self._schedule = workload.schedule
        self._clip = workload.clip_gradient_norm
        self._faults = faults
        self._planned_steps = planned_steps
        self._update = state.update

    def run(self, batch: Batch, state: TrainState) -> StepResult:
        """Advances the state by one step; parameters change only if the verdict allows it."""
        step = state.step + 1
        update = self._update
        self._faults.before_step(step)
        loss_tensor = self._evaluate(batch, state, step)
        loss = loss_tensor.item()
        evaluated_ns = time.monotonic_ns()
        self._faults.on_gradient(step, update)
        squared_norm = update.squared_norm()
        verdict = state.judge.check(step, loss, squared_norm, update.all_finite)
        judged_ns = time.monotonic_ns()
        if verdict.call in (Call.GOOD, Call.SUSPECT):
            self._apply(batch, state, step, loss_tensor, squared_norm)
            sums = state.sums
            sums.loss += loss
            sums.steps += 1
            sums.samples += state.loader.samples
        if verdict.call is not Call.BAD:
            state.step = step
            state.loss = loss
        return StepResult(verdict, evaluated_ns, judged_ns)

    def _evaluate(self, batch: Batch, state: TrainState, step: int) -> Tensor:
        update = self._update
        update.prepare()
        loss = self._loss(state.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"Workload.loss returned {shape}; it must return a scalar tensor")
        loss = self._faults.on_loss(step, loss)
        loss.backward()  # type: ignore[no-untyped-call]
        update.collect()
        return loss.detach()

    def _apply(self, batch: Batch, state: TrainState, step: int, loss: Tensor, squared_norm: float) -> None:
        update = self._update
        if self._clip is not None and squared_norm > self._clip**2:
            update.scale_gradients(self._clip / squared_norm**0.5)
        factor = state.learning_rate_scale
        if self._schedule is not None:
            factor *= self._schedule(step - 1, self._planned_steps)
        update.set_learning_rate(factor)
        update.apply(self._closure(batch, state, step, loss) if update.needs_closure else _no_closure)

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


def _no_closure() -> Tensor:
    raise AssertionError("this optimizer asks for no closure")
