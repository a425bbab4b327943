"""The training loop. Everything hard has a name elsewhere; assemble.py puts the parts together."""

from dataclasses import dataclass

from esper_runtime.tolaria.boundary import EpochEnd
from esper_runtime.tolaria.control import Control
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.finish import Finish
from esper_runtime.tolaria.judge import Call
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.rollback import Rollbacks
from esper_runtime.tolaria.start import Start
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.step import Step
from esper_runtime.tolaria.telemetry import Heart


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop calls, in the order in which it calls them."""

    control: Control
    step: Step
    rollbacks: Rollbacks
    memory: Memory
    checkpoints: Checkpoints
    heart: Heart
    start: Start
    epoch_end: EpochEnd
    finish: Finish
    epochs: int


def train(parts: Parts, state: TrainState) -> Outcome:
    """Trains to the end or to a safe stop. An exception is a crash; memory and volume still hold a good state."""
    loader, heart = state.loader, parts.heart
    while loader.position.epoch < parts.epochs:
        stop = parts.control.poll()
        if stop is not None:
            return stop
        batch = loader.take()
        if batch is None:
            stop = parts.epoch_end.close(state)
            if stop is not None:
                return stop
            locate(heart, state, parts.epochs)
            continue
        result = parts.step.run(batch, state)
        heart.progress(step=state.step, epoch=loader.current.epoch + 1, loss=state.loss)
        parts.start.after_step(state)
        stop = parts.rollbacks.after_step(
            state, result.verdict, evaluated_ns=result.evaluated_ns, judged_ns=result.judged_ns
        )
        if stop is not None:
            return stop
        if result.verdict.call is not Call.GOOD:
            locate(heart, state, parts.epochs)
        parts.memory.after_step(state, result.verdict)
        parts.checkpoints.after_step(state, result.verdict)
    return parts.finish.complete(state, parts.epoch_end.metrics)


def locate(heart: Heart, state: TrainState, epochs: int) -> None:
    """Tells where training is when it may have moved by other than one step: restored, rolled back, a batch fewer."""
    heart.total_steps = state.total_steps(epochs)
    heart.progress(step=state.step, epoch=min(state.epoch + 1, epochs), loss=state.loss)
