"""The operator's metrics in one registry, by the names under which they are scraped.

They are declared in `esper_leyline.metrics`; the reference page, dashboards and rules are made of the same data.
"""

from collections.abc import Callable

from esper_leyline.metrics import OPERATOR, Metric, MetricKind
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_CLASSES: dict[MetricKind, type[Counter | Gauge | Histogram]] = {
    MetricKind.COUNTER: Counter,
    MetricKind.GAUGE: Gauge,
    MetricKind.HISTOGRAM: Histogram,
}


class Metrics:
    """The declared metrics in one registry, by their names."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in OPERATOR:
            self._declare(metric)

    def _declare(self, metric: Metric) -> None:
        name, made = metric.prometheus, _CLASSES[metric.kind](**metric.arguments, registry=self.registry)
        for values in metric.known:
            made.labels(*values)
        match made:
            case Counter():
                self._counters[name] = made
            case Gauge():
                self._gauges[name] = made
            case Histogram():
                self._histograms[name] = made

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def gauge(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def forget(self, name: str, *labels: str) -> None:
        """The series of a gauge ends."""
        self._gauges[name].remove(*labels)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        histogram = self._histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(seconds)

    def follow(self, name: str, read: Callable[[], float], *labels: str) -> None:
        """Lets a gauge ask for its value when it is scraped."""
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set_function(read)

    # --- the signatures that others call back with ---

    def request(self, verb: str, kind: str, code: str, seconds: float) -> None:
        self.count("esper_api_requests_total", verb, kind, code)
        self.observe("esper_api_request_seconds", seconds, verb, kind)

    def leg(self, leg: str, outcome: str, seconds: float) -> None:
        self.count("esper_emergency_signals_total", leg, outcome)
        self.observe("esper_emergency_signal_seconds", seconds, leg)
