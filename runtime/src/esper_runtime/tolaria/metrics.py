"""The trainer's metrics: plain numbers in memory, written as Prometheus text for the supervisor to serve.

Only names of esper_leyline.metrics are known. Setting one is a dictionary store; nothing here waits for anybody.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path

from esper_leyline import paths
from esper_leyline.metrics import BY_NAME, TOLARIA, Metric, MetricKind

MAX_SERIES = 64
"""Label sets of one metric; more are dropped and counted."""
WRITE_EVERY_S = 1.0
DROPPED = "tolaria.telemetry.dropped_total"

Key = tuple[str, ...]


class Metrics:
    """Of one trainer process. Counters begin at 0 with the process, as Prometheus expects."""

    def __init__(self, run_dir: Path | None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Without a directory nothing is ever written."""
        self._path = None if run_dir is None else run_dir / paths.TRAINER_METRICS
        self._monotonic = monotonic
        self._due = 0.0
        self._values: dict[str, dict[Key, float]] = {}
        self._counts: dict[str, dict[Key, list[float]]] = {}
        """Of histograms: a count per bucket, then that above all of them, then the sum."""

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """A gauge."""
        series = self._series(name, MetricKind.GAUGE, labels)
        if series is not None:
            self._values[name][series] = float(value)

    def add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """A counter."""
        series = self._series(name, MetricKind.COUNTER, labels)
        if series is not None:
            values = self._values[name]
            values[series] = values.get(series, 0.0) + amount

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """A histogram."""
        series = self._series(name, MetricKind.HISTOGRAM, labels)
        if series is not None:
            buckets = BY_NAME[name].buckets
            counts = self._counts[name].setdefault(series, [0.0] * (len(buckets) + 2))
            counts[bisect_left(buckets, value)] += 1
            counts[-1] += value

    def _series(self, name: str, kind: MetricKind, labels: Mapping[str, str]) -> Key | None:
        metric = BY_NAME[name]
        if metric.kind is not kind or set(labels) != set(metric.labels):
            raise TypeError(f"{name} is a {metric.kind} with labels {metric.labels}, not a {kind} with {tuple(labels)}")
        key = tuple(labels[label] for label in metric.labels)
        held = (self._counts if kind is MetricKind.HISTOGRAM else self._values).setdefault(name, {})
        if key not in held and len(held) >= MAX_SERIES:
            self.add(DROPPED, priority="LOW")
            return None
        return key

    def value(self, name: str, /, **labels: str) -> float | None:
        """Of a gauge or counter; None when it was never set."""
        return self._values.get(name, {}).get(tuple(labels[label] for label in BY_NAME[name].labels))

    def snapshot(self) -> dict[str, float]:
        """Gauges and counters without labels, for the run's record."""
        return {name: values[()] for name, values in self._values.items() if () in values}

    # Export

    def write(self, *, now: bool = False) -> None:
        """Replaces the file, at most once a second unless asked for `now`. OSError is the caller's to judge."""
        moment = self._monotonic()
        if self._path is None or (moment < self._due and not now):
            return
        self._due = moment + WRITE_EVERY_S
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_text(self.render())
        draft.replace(self._path)

    def render(self) -> str:
        """Prometheus text, in the catalogue's order. Counters are there from the start, so that increase() sees the
        first event; those whose label values are not known beforehand appear with it."""
        lines: list[str] = []
        for metric in TOLARIA:
            body = self._histogram(metric) if metric.kind is MetricKind.HISTOGRAM else self._plain(metric)
            if body:
                name = metric.prometheus
                lines += [f"# HELP {name} {metric.text}.", f"# TYPE {name} {metric.kind}", *body]
        return "".join(f"{line}\n" for line in lines)

    def _plain(self, metric: Metric) -> list[str]:
        counter = metric.kind is MetricKind.COUNTER
        begun = dict.fromkeys(metric.known or (() if metric.labels else ((),)), 0.0) if counter else {}
        values = {**begun, **self._values.get(metric.name, {})}
        return [f"{metric.prometheus}{_braces(metric.labels, key)} {value:.17g}" for key, value in values.items()]

    def _histogram(self, metric: Metric) -> list[str]:
        lines: list[str] = []
        for key, counts in self._counts.get(metric.name, {}).items():
            total = 0.0
            for bound, count in zip((*(f"{b:g}" for b in metric.buckets), "+Inf"), counts, strict=False):
                total += count
                lines.append(f"{metric.prometheus}_bucket{_braces((*metric.labels, 'le'), (*key, bound))} {total:.17g}")
            lines.append(f"{metric.prometheus}_sum{_braces(metric.labels, key)} {counts[-1]:.17g}")
            lines.append(f"{metric.prometheus}_count{_braces(metric.labels, key)} {total:.17g}")
        return lines


def _braces(names: Key, values: Key) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value[:128].replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
