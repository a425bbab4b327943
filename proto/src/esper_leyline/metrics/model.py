"""What is known of a metric before it is set."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any

PREFIX = "esper_"


class MetricKind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` are the names of its labels, each with a bounded set of values; `buckets` are upper bounds of a
    histogram; `known` are the label values of series that exist from the start, so that rate() sees the first event."""

    name: str
    kind: MetricKind
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()

    @property
    def prometheus(self) -> str:
        return PREFIX + self.name.replace(".", "_")

    @property
    def help(self) -> str:
        return f"{self.text}."

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its samples as scraped."""
        name = self.prometheus
        return (f"{name}_bucket", f"{name}_sum", f"{name}_count") if self.kind is MetricKind.HISTOGRAM else (name,)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the prometheus_client class of its kind, but for the registry."""
        given: dict[str, Any] = {"name": self.prometheus, "documentation": self.help, "labelnames": self.labels}
        return {**given, "buckets": self.buckets} if self.kind is MetricKind.HISTOGRAM else given


def each(*values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of the values of one label after another."""
    return tuple(product(*values))
