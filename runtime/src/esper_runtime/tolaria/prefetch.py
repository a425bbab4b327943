"""The next batch goes to the GPU while the current one computes.

`Ahead` keeps one staged batch; a stage does the copying. What is staged and then not asked for (after a rollback, or a
batch newly skipped) is dropped and read again in its turn: the loader's position counts only batches that were given.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from esper_runtime.tolaria.data import Fetch, Position, moved, tensors_in
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.workload import Batch

METER_EVERY = 16
"""Batches per figure."""


class Stage(Protocol):
    """Where a batch waits on its way."""

    def put(self, batch: Batch) -> Any:
        """Begins to move a batch of the host; a ticket for `claim`."""

    def claim(self, ticket: Any) -> Batch:
        """The moved batch, safe to use for what is queued from now on."""


class Ahead:
    """A Fetch that stays one batch in front of its caller."""

    def __init__(self, read: Fetch, stage: Stage, *, upcoming: Callable[[int, int], Iterator[Position]]) -> None:
        """`read` gives host batches. `upcoming` gives the batches that follow, beginning at the given one's step."""
        self._read = read
        self._stage = stage
        self._upcoming = upcoming
        self._plan: Iterator[Position] = iter(())
        self._staged: tuple[Position, Any] | None = None

    def __call__(self, epoch: int, number: int) -> Batch:
        key = Position(epoch, number)
        if self._staged is None or self._staged[0] != key:
            self._plan = self._upcoming(epoch, number)
            while next(self._plan) != key:
                """Earlier batches of the same step."""
            self._staged = self._put(key)
        batch = self._stage.claim(self._staged[1])
        following = next(self._plan, None)
        self._staged = None if following is None else self._put(following)
        return batch

    def _put(self, key: Position) -> tuple[Position, Any]:
        return key, self._stage.put(self._read(*key))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copy:
    host: Batch
    """Kept until the copy is done: its pinned memory must not be given away."""
    moved: Batch
    begin: torch.cuda.Event
    end: torch.cuda.Event


class Meter:
    """A gauge that shows the mean of the last few durations."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._total_ms = 0.0
        self._count = 0

    def add(self, milliseconds: float) -> None:
        self._total_ms += milliseconds
        self._count += 1
        if self._count == METER_EVERY:
            self._metrics.set(self._name, self._total_ms / METER_EVERY)
            self._total_ms, self._count = 0.0, 0


class CudaStage:
    """Copies on a stream of its own. Copies are timed by events that have passed, so nothing waits for it."""

    def __init__(self, device: torch.device, metrics: Metrics) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._meter = Meter(metrics, "tolaria.train.h2d_copy_ms")
        self._untimed: _Copy | None = None

    def put(self, batch: Batch) -> _Copy:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            copied = moved(batch, self._device, non_blocking=True)
            end.record(self._stream)
        return _Copy(host=batch, moved=copied, begin=begin, end=end)

    def claim(self, ticket: _Copy) -> Batch:
        self._time()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ticket.end)
        for tensor in tensors_in(ticket.moved):
            tensor.record_stream(current)  # so that its memory is not reused before this stream is done with it
        self._untimed = ticket
        return ticket.moved

    def _time(self) -> None:
        """The copy claimed before: the step that came between has passed its end."""
        done = self._untimed
        if done is not None and done.end.query():  # type: ignore[no-untyped-call]
            self._meter.add(done.begin.elapsed_time(done.end))
            self._untimed = None


class Timed:
    """A Fetch, and how long its callers waited."""

    def __init__(self, fetch: Fetch, metrics: Metrics, *, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._fetch = fetch
        self._meter = Meter(metrics, "tolaria.train.input_wait_ms")
        self._monotonic_ns = monotonic_ns

    def __call__(self, epoch: int, number: int) -> Batch:
        begin = self._monotonic_ns()
        batch = self._fetch(epoch, number)
        self._meter.add((self._monotonic_ns() - begin) / 1e6)
        return batch
