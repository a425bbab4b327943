"""torch.compile around the loss, guarded: what it cannot do is done eagerly, in the same step, with the same result.

Only forward and loss are compiled, and never in a process's first step: after a restart training runs again before any
compiler does. The first failure, in compiling, in the forward or in the backward pass, puts back the random states and
the model's buffers, repeats the step eagerly and stays with that. An error of the device itself is not caught: the
process ends, and its successor goes on from the last snapshot.
"""

import logging
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._dynamo import callback

from esper_runtime.tolaria import rng
from esper_runtime.tolaria.amp import Loss
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.step import Evaluate
from esper_runtime.workload import Batch

BEAT_S = 1.0
log = logging.getLogger(__name__)


BACKEND = "backend:"
"""Before the name of another backend than inductor, in Workload.compile."""


def torch_compiler(asked: str) -> Callable[[Loss], Loss]:
    """torch.compile as Workload.compile asks for it."""

    def compiler(loss: Loss) -> Loss:
        if asked.startswith(BACKEND):
            return torch.compile(loss, backend=asked.removeprefix(BACKEND))
        return torch.compile(loss, mode=asked)

    return compiler


class Compiled:
    """The loss to use in a step, compiled for as long as that works."""

    def __init__(
        self,
        loss: Loss,
        compiled: Callable[[Loss], Loss],
        *,
        model: nn.Module,
        fell_back: Callable[[str], None],
        beat: Callable[[], None],
    ) -> None:
        """`compiled` is torch.compile with its options; `fell_back` is told why, once."""
        self._eager = loss
        self._compile = compiled
        self._loss = loss
        self._model = model
        self._buffers = list(model.buffers())
        self._fell_back = fell_back
        self._beat = beat
        self.active = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss(model, batch)

    def guard(self, evaluate: Evaluate) -> Evaluate:
        """`evaluate` uses `loss`; the result does so safely."""

        def guarded(batch: Batch, state: TrainState, step: int) -> Tensor:
            if not self.active:
                return evaluate(batch, state, step)
            if self._loss is self._eager:  # the first step of this process
                result = evaluate(batch, state, step)
                self._begin()
                return result
            return self._tried(evaluate, batch, state, step)

        return guarded

    def _begin(self) -> None:
        try:
            self._loss = self._compile(self._eager)
        except Exception as error:  # broad: torch.compile refuses options and platforms in many ways
            log.exception("torch.compile refused")
            self._stop(error)

    def _tried(self, evaluate: Evaluate, batch: Batch, state: TrainState, step: int) -> Tensor:
        states, buffers = rng.capture(), [buffer.clone() for buffer in self._buffers]
        try:
            with beating_while_compiling(self._beat):
                return evaluate(batch, state, step)
        except Exception as error:  # broad: compilers and compiled code raise anything; eager code is asked next
            if is_device_error(error) or not self._same_buffers():
                raise
            log.exception("a compiled step failed; it is repeated eagerly")
            cause = error
        self._put_back(states, buffers)
        self._loss = self._eager
        result = evaluate(batch, state, step)  # an error of the user's own code comes again, and goes on from here
        self._stop(cause)
        return result

    def _same_buffers(self) -> bool:
        """Otherwise the model has replaced some, and the step cannot be taken back; a restart can."""
        live = list(self._model.buffers())
        return len(live) == len(self._buffers) and all(map(operator.is_, live, self._buffers))

    @torch.no_grad()
    def _put_back(self, states: dict[str, bytes], buffers: list[Tensor]) -> None:
        for buffer, saved in zip(self._buffers, buffers, strict=True):
            buffer.copy_(saved)
        rng.restore(states)

    def _stop(self, error: Exception) -> None:
        self.active = False
        self._loss = self._eager
        self._fell_back(f"torch.compile failed, training goes on eagerly: {type(error).__name__}: {error}")


def is_device_error(error: BaseException) -> bool:
    """Of the GPU itself: its context, its memory. No other way of computing the step mends that."""
    if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


@contextmanager
def beating_while_compiling(beat: Callable[[], None]) -> Iterator[None]:
    """A compilation may take minutes in which this thread says nothing: another one beats for it meanwhile.

    Both never beat at the same time: the page has one writer.
    """
    running: list[tuple[threading.Event, threading.Thread]] = []

    def began(_: object) -> None:
        over = threading.Event()
        thread = threading.Thread(target=_beat_until, args=(over, beat), name="esper-compiling", daemon=True)
        running.append((over, thread))
        thread.start()

    def ended(_: object = None) -> None:
        while running:
            over, thread = running.pop()
            over.set()
            thread.join()

    callback.on_compile_start(began)
    callback.on_compile_end(ended)
    try:
        yield
    finally:
        ended()
        callback.callback_handler.remove_start_callback(began)
        callback.callback_handler.remove_end_callback(ended)


def _beat_until(over: threading.Event, beat: Callable[[], None]) -> None:
    while not over.wait(BEAT_S):
        beat()
