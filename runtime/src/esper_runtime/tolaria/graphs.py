"""Forward and backward of one batch shape as a CUDA graph.

The first steps run as they are, on a side stream, which warms up libraries and allocator; then the next one is
captured and replayed from there on. Batches of another shape (the last of an epoch) and steps that a fault is injected
into run eagerly. One failure to capture ends it: training goes on eagerly. An error of the device is not caught.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper_runtime.tolaria import rng
from esper_runtime.tolaria.data import mapped, tensors_in
from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.step import Evaluate
from esper_runtime.workload import Batch

WARM_UP_STEPS = 3
log = logging.getLogger(__name__)


class Graphs:
    """Wraps a step's evaluation. At most one graph, of the first batch's shape."""

    def __init__(
        self, device: torch.device, *, faults: Faults, metrics: Metrics, fell_back: Callable[[str], None]
    ) -> None:
        self._device = device
        self._faults = faults
        self._metrics = metrics
        self._fell_back = fell_back
        self._shape: list[tuple[Any, ...]] | None = None
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False
        self._inputs: Batch = None
        self._loss = torch.empty(0)
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def guard(self, evaluate: Evaluate) -> Evaluate:
        def graphed(batch: Batch, state: TrainState, step: int) -> Tensor:
            if self._shape is None:
                self._shape = shape_of(batch)
            if self._failed or self._faults.due(step) or shape_of(batch) != self._shape:
                return evaluate(batch, state, step)
            if self._warm < WARM_UP_STEPS:
                self._warm += 1
                return self._aside(evaluate, batch, state, step)
            if self._graph is None and not self._captured(evaluate, batch, state, step):
                return evaluate(batch, state, step)
            return self._replayed(batch, state)

        return graphed

    def _aside(self, evaluate: Evaluate, batch: Batch, state: TrainState, step: int) -> Tensor:
        """A real step, on a stream that is not the default one."""
        side, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = evaluate(batch, state, step)
        current.wait_stream(side)
        return loss

    def _captured(self, evaluate: Evaluate, batch: Batch, state: TrainState, step: int) -> bool:
        """Records the step without running it: random states and parameters do not move."""
        states, began = rng.capture(), time.monotonic()
        self._inputs = mapped(batch, torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = evaluate(self._inputs, state, step)
        except RuntimeError as error:
            log.exception("a CUDA graph could not be captured")
            torch.cuda.synchronize(self._device)  # raises when it is the device that is broken
            rng.restore(states)
            self._failed = True
            self._fell_back(f"CUDA graphs are off, training goes on eagerly: {type(error).__name__}: {error}")
            return False
        self._graph = graph
        self._gradients = [(parameter, parameter.grad) for _, parameter in state.update.parameters()]
        self._metrics.set("tolaria.graph.capture_ms", (time.monotonic() - began) * 1e3)
        return True

    def _replayed(self, batch: Batch, state: TrainState) -> Tensor:
        assert self._graph is not None
        began = time.monotonic()
        state.update.prepare()
        copy_into(self._inputs, batch)
        copied = time.monotonic()
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient  # the graph writes into this very memory
        state.update.collect()
        self._metrics.set("tolaria.graph.stage_copy_ms", (copied - began) * 1e3)
        self._metrics.set("tolaria.graph.replay_ms", (time.monotonic() - copied) * 1e3)
        self._metrics.add("tolaria.graph.replays_total")
        return self._loss


def shape_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Shape and type of every tensor in a batch."""
    return [(*tensor.shape, tensor.dtype) for tensor in tensors_in(batch)]


def copy_into(target: Batch, source: Batch) -> None:
    """The tensors of `source` into those of `target`, a batch of the same structure."""
    for place, tensor in zip(tensors_in(target), tensors_in(source), strict=True):
        place.copy_(tensor, non_blocking=True)
