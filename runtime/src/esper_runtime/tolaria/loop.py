"""The training loop. Everything hard has a name elsewhere; assemble.py puts the parts together."""

from dataclasses import dataclass

from esper_runtime.tolaria.boundary import EpochEnd
from esper_runtime.tolaria.control import Control
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.finish import Finish
from esper_runtime.tolaria.judge import Call
from esper_runtime.tolaria.memory import Memory, Unsound
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.publish import Publisher
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
    publisher: Publisher
    finish: Finish
    epochs: int


def train(parts: Parts, state: TrainState) -> Outcome:
    """Trains to the end or to a safe stop. An exception is a crash; memory and volume still hold a good state."""
    halted = parts.epoch_end.halted(state)
    if halted is not None:
        return halted  # decided before this process was started
    while True:
        stop = _train_epochs(parts, state)
        if stop is not None:
            return stop
        unsound = parts.memory.check(state)  # no snapshot has seen the last steps
        if unsound is not None:
            stop = _give_up(parts, state, unsound)
            if stop is not None:
                return stop
        if state.loader.position.epoch >= parts.epochs:
            return parts.finish.complete(state, parts.epoch_end.metrics)


def _train_epochs(parts: Parts, state: TrainState) -> Outcome | None:
    """The steps up to the end of the last epoch; an Outcome when training ends before."""
    loader, heart = state.loader, parts.heart
    while loader.position.epoch < parts.epochs:
        stop = parts.control.poll()
        if stop is not None:
            return stop
        batch = loader.take()
        if batch is None:
            parts.publisher.epoch_ends(state)
            stop = parts.epoch_end.close(state)
            parts.publisher.epoch_ended(state, parts.epoch_end.metrics)
            if stop is not None:
                return stop
            locate(heart, state, parts.epochs)
            continue
        result = parts.step.run(batch, state)
        heart.progress(step=state.step, epoch=loader.current.epoch + 1, loss=state.loss)
        parts.start.after_step(state)
        parts.publisher.after_step(state)
        stop = parts.rollbacks.after_step(
            state, result.verdict, evaluated_ns=result.evaluated_ns, judged_ns=result.judged_ns
        )
        if stop is not None:
            return stop
        if result.verdict.call is not Call.GOOD:
            locate(heart, state, parts.epochs)
        unsound = parts.memory.after_step(state, result.verdict)
        if unsound is not None:
            stop = _give_up(parts, state, unsound)
            if stop is not None:
                return stop
            continue
        parts.checkpoints.after_step(state, result.verdict)
    return None


def _give_up(parts: Parts, state: TrainState, unsound: Unsound) -> Outcome | None:
    """What follows from a state that is not finite; None when training goes on, perhaps from elsewhere."""
    stop = parts.rollbacks.unsound(state, unsound)
    if stop is None:
        locate(parts.heart, state, parts.epochs)
    return stop


def locate(heart: Heart, state: TrainState, epochs: int) -> None:
    """Tells where training is when it may have moved by other than one step: restored, rolled back, a batch fewer."""
    heart.total_steps = state.total_steps(epochs)
    heart.progress(step=state.step, epoch=min(state.epoch + 1, epochs), loss=state.loss)
