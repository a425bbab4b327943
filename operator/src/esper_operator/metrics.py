"""All metrics of the operator, declared as data; the reference page, dashboards and rules are checked against it.

No label has an unbounded set of values: runs, pods and nodes are never labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]

FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    name: str
    """As scraped; counters end in _total."""
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric(
        name="esper_api_requests_total",
        kind="counter",
        labels=("verb", "kind", "code"),
        help="Requests to the API server; code 'error' when no answer came.",
    ),
    Metric(
        name="esper_api_request_seconds",
        kind="histogram",
        labels=("verb", "kind"),
        help="Time to the answer's headers.",
    ),
    Metric(name="esper_workqueue_depth", kind="gauge", help="Runs that wait for a worker."),
    Metric(name="esper_workqueue_adds_total", kind="counter", help="Runs made due."),
    Metric(name="esper_workqueue_retries_total", kind="counter", help="Reconciles repeated after an error."),
    Metric(name="esper_workqueue_oldest_seconds", kind="gauge", help="How long the run that waits longest has waited."),
    Metric(
        name="esper_workqueue_unfinished_work_seconds",
        kind="gauge",
        help="How long the longest running reconcile runs.",
    ),
    Metric(
        name="esper_reconcile_total",
        kind="counter",
        labels=("result",),
        help="Reconciles by result: ok, gone, conflict, throttled, transient, refused, invalid, not_leader, bug.",
    ),
    Metric(name="esper_reconcile_seconds", kind="histogram", help="Duration of a reconcile, requests included."),
    Metric(
        name="esper_status_writes_total",
        kind="counter",
        labels=("cause",),
        help="Status writes by cause: transition, progress.",
    ),
    Metric(
        name="esper_decisions_total", kind="counter", labels=("reason",), help="Plans that did something, by reason."
    ),
    Metric(name="esper_informer_objects", kind="gauge", labels=("kind",), help="Objects in a cache."),
    Metric(
        name="esper_informer_events_total",
        kind="counter",
        labels=("kind", "type"),
        help="Watch events by type; RELIST counts lists.",
    ),
    Metric(
        name="esper_informer_silent_seconds",
        kind="gauge",
        labels=("kind",),
        help="Since the API server was last heard from; a bookmark comes about every minute.",
    ),
    Metric(name="esper_runs", kind="gauge", labels=("phase",), help="Runs by phase."),
    Metric(name="esper_leader", kind="gauge", help="1 while this process holds the Lease."),
    Metric(name="esper_loop_lag_seconds", kind="gauge", help="How late the event loop was at its last check."),
    Metric(
        name="esper_reports_total",
        kind="counter",
        labels=("way", "outcome"),
        help="Run reports by way (bus, pull) and outcome (accepted, repeated, unknown, malformed, forged).",
    ),
    Metric(name="esper_report_polls", kind="gauge", help="Pods that are asked directly because Redis is silent."),
    Metric(name="esper_bus_connected", kind="gauge", help="1 while Redis answers."),
    Metric(
        name="esper_emergency_signals_total",
        kind="counter",
        labels=("leg", "outcome"),
        help="Emergency signals by leg (bus, configmap, touch) and outcome.",
    ),
    Metric(
        name="esper_emergency_signal_seconds",
        kind="histogram",
        labels=("leg",),
        help="From the start of sending to the leg's answer.",
    ),
    Metric(
        name="esper_broadcasts_invalid",
        kind="gauge",
        help="Keys of ConfigMap esper-emergency that cannot be read and are ignored.",
    ),
    Metric(
        name="esper_events_total",
        kind="counter",
        labels=("outcome",),
        help="Kubernetes Events by outcome: posted, repeated, limited, dropped, failed.",
    ),
)


class Metrics:
    """The declared metrics in one registry, by their names."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            self._declare(metric)

    def _declare(self, metric: Metric) -> None:
        if metric.kind == "counter":
            self._counters[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        elif metric.kind == "gauge":
            self._gauges[metric.name] = Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
        else:
            self._histograms[metric.name] = Histogram(
                metric.name, metric.help, metric.labels, buckets=FAST, registry=self.registry
            )

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def gauge(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

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


def reference() -> str:
    """docs/reference/metrics.md."""
    lines = [
        "# Metrics of the operator",
        "",
        "Served at `/metrics` on port 8080. Generated from `esper_operator.metrics`; do not edit.",
        "",
        "| Name | Type | Labels | Meaning |",
        "|---|---|---|---|",
    ]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
