"""The 18 ms of a boundary: what each part of it took, and which part is guilty when it was too much.

A boundary begins when validation has returned and the device is idle, and ends when the next epoch may begin. What
happens because of it (a checkpoint's hand-off, a rollback, a halt, the handling of a breach) is timed beside it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from esper_runtime.tolaria.metrics import Metrics

TOTAL_MS: Final = 18.0
PARTS_MS: Final = {"assembly": 3.5, "tamiyo": 12.0, "apply": 1.5, "guard": 1.0}
"""Of the total; a part may take more than its own as long as the whole does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryTimes:
    """Milliseconds."""

    total: float
    parts: dict[str, float]

    @property
    def guilty(self) -> str:
        """The part that was over its own budget by most, when the whole was over; else empty."""
        if self.total <= TOTAL_MS:
            return ""
        return max(PARTS_MS, key=lambda part: self.parts.get(part, 0.0) - PARTS_MS[part])

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {self.parts.get(part, 0.0):.1f} of {PARTS_MS[part]:g}" for part in PARTS_MS)
        return f"{self.total:.1f} ms of {TOTAL_MS:g}: {parts}"


class Stopwatch:
    """Of one boundary. Time between two parts belongs to the whole alone."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._began = clock_ns()
        self._parts: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._clock_ns()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0) + self._clock_ns() - began

    def stop(self) -> BoundaryTimes:
        total = self._clock_ns() - self._began
        return BoundaryTimes(total=total / 1e6, parts={name: took / 1e6 for name, took in self._parts.items()})


def publish(metrics: Metrics, times: BoundaryTimes) -> None:
    """Last values and histograms."""
    metrics.set("tolaria.epoch_hook.latency_ms", times.total)
    metrics.set("tolaria.hook.latency_ms", times.total)
    metrics.observe("tolaria.boundary.total_ms", times.total)
    for part in PARTS_MS:
        metrics.observe(f"tolaria.boundary.{part}_ms", times.parts.get(part, 0.0))
    if times.guilty:
        metrics.add("tolaria.boundary.breaches_total", part=times.guilty)
