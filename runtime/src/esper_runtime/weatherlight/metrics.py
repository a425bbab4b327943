"""Weatherlight's metrics."""

from collections.abc import Sequence
from typing import Final

from esper_leyline.reasons import SignalRejection
from esper_leyline.v1.report_pb2 import RunReport
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LEGS: Final = ("redis", "configmap")
VERDICTS: Final = ("accepted", "duplicate", "rejected")
_APPLY_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_LAG_BUCKETS: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 90)


class Metrics:
    """All of them; every label value is known beforehand, so every series exists from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"esper_weatherlight_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"esper_weatherlight_{name}", text, labels, registry=registry)

        self._reports = counter("reports", "Reports made, by the event they are about.", "event")
        self._evicted = counter("reports_evicted", "Reports with an event that the full log had to give up.")
        self.spool_reports = gauge("spool_reports", "Reports that Redis has not acknowledged.")
        self.spool_bytes = gauge("spool_bytes", "Bytes of the reports that Redis has not acknowledged.")
        self.publications = counter("publications", "Attempts to publish a report, by outcome.", "outcome")
        self.pulls = counter("pulls", "Requests to the report log.")
        self.redis_connected = gauge("redis_connected", "1 when the last exchange with Redis succeeded.")
        self.supervisor_connected = gauge("supervisor_connected", "1 while the supervisor holds its connection.")
        self.heartbeat_age = gauge("heartbeat_age_seconds", "Age of the trainer's last heartbeat.")
        self.journal_skipped = counter("journal_skipped_bytes", "Bytes of the journal that were no events.")
        self._degraded = gauge("degraded", "1 while a part that weatherlight watches does not work.", "component")
        self.signals = counter("signals", "Emergency signals received, by way and verdict.", "leg", "verdict")
        self.rejections = counter("signals_rejected", "Emergency signals ignored, by reason.", "reason")
        self.applied = Histogram(
            "esper_weatherlight_signal_apply_seconds",
            "From the arrival of an emergency signal to the emergency page.",
            ("leg",),
            buckets=_APPLY_BUCKETS,
            registry=registry,
        )
        self.lag = Histogram(
            "esper_weatherlight_signal_lag_seconds",
            "How much later a signal arrived by this way than by the faster one.",
            ("leg",),
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self.arrival = gauge("signal_last_arrival_timestamp_seconds", "When a signal last came by this way.", "leg")
        self.degraded_now: set[str] = set()
        self._declare()

    def _declare(self) -> None:
        for leg in LEGS:
            self.applied.labels(leg)
            self.lag.labels(leg)
            self.arrival.labels(leg)
            for verdict in VERDICTS:
                self.signals.labels(leg, verdict)
        for reason in SignalRejection:
            self.rejections.labels(reason)

    def reports_kept(self, reports: Sequence[RunReport], evicted: int) -> None:
        for report in reports:
            self._reports.labels(report.WhichOneof("event") or "progress").inc()
        self._evicted.inc(evicted)

    def set_degraded(self, component: str, *, degraded: bool) -> None:
        (self.degraded_now.add if degraded else self.degraded_now.discard)(component)
        self._degraded.labels(component).set(int(degraded))
