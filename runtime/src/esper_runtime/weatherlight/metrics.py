"""Weatherlight's metrics."""

import time
from collections.abc import Callable, Iterator, Sequence

from esper_leyline.labels import TAMIYO
from esper_leyline.metrics import oona
from esper_leyline.metrics import weatherlight as names
from esper_leyline.oona import BreakerState, Status
from esper_leyline.pages import EmergencyRecord
from esper_leyline.v1.report_pb2 import Counters, RunReport
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily

from esper_runtime.sidecar.metrics import Exporter

OPERATIONAL, DEGRADED = names.MODES
_NUMBERS = {BreakerState.CLOSED: 1, BreakerState.OPEN: 2, BreakerState.HALF_OPEN: 3}


class RunTotals:
    """The run's counters, which outlive every process of it: nothing before the first event says them."""

    def __init__(self) -> None:
        self.counters: Counters | None = None

    def collect(self) -> Iterator[CounterMetricFamily]:
        for field, metric in names.TOTALS.items() if self.counters is not None else ():
            yield CounterMetricFamily(metric.prometheus, metric.help, value=getattr(self.counters, field))


class Metrics:
    """All of them; where label values are known beforehand, every series exists from the start."""

    def __init__(self, registry: CollectorRegistry, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        make = Exporter(registry)
        self._reports = make.counter(names.REPORTS)
        self._evicted = make.counter(names.EVICTED)
        self.spool_reports = make.gauge(names.SPOOL_REPORTS)
        self.spool_bytes = make.gauge(names.SPOOL_BYTES)
        self._publications = make.counter(names.PUBLICATIONS)
        self.telemetry = make.counter(names.TELEMETRY)
        self.telemetry_spool = make.gauge(names.TELEMETRY_SPOOL)
        self.pulls = make.counter(names.PULLS)
        self.redis_connected = make.gauge(names.REDIS_CONNECTED)
        self.supervisor_connected = make.gauge(names.SUPERVISOR_CONNECTED)
        self.heartbeat_age = make.gauge(names.HEARTBEAT_AGE)
        self.journal_skipped = make.counter(names.JOURNAL_SKIPPED)
        self._degraded = make.gauge(names.DEGRADED)
        self._mode = make.gauge(names.SYSTEM_MODE)
        self._restarts = make.counter(names.RESTARTS)
        self._workers: dict[str, float] = {}
        """Seconds that each has to wait until it is started again; 0: it runs, infinite: it never will be."""
        self._worker_running = make.gauge(names.WORKER_RUNNING)
        self._worker_restarts = make.counter(names.WORKER_RESTARTS)
        self._worker_backoff = make.gauge(names.WORKER_BACKOFF)
        self._last_error = make.gauge(names.LAST_ERROR)
        make.gauge(names.TASKS_RUNNING).set_function(lambda: sum(not wait_s for wait_s in self._workers.values()))
        make.gauge(names.TASKS_BACKING_OFF).set_function(
            lambda: sum(0 < wait_s < float("inf") for wait_s in self._workers.values())
        )
        self.clock_skew = make.gauge(names.CLOCK_SKEW)
        self._totals = RunTotals()
        registry.register(self._totals)
        self._deadlines = make.counter(names.DEADLINES)
        self._deadline_latency = make.gauge(names.DEADLINE_LATENCY)
        self._packets = make.counter(names.PACKETS)
        self._emergency_telemetry = make.counter(names.EMERGENCY_TELEMETRY)
        self._emergency_tamiyo = make.counter(names.EMERGENCY_TAMIYO)
        self.coalesced = make.counter(names.EMERGENCY_COALESCED)
        self.priority_missing = make.counter(names.PRIORITY_MISSING)
        self.signals = make.counter(names.SIGNALS)
        self.rejections = make.counter(names.REJECTED)
        self._applied = make.histogram(names.APPLY)
        self.lag = make.histogram(names.LAG)
        self.arrival = make.gauge(names.ARRIVAL)
        self._detections = make.counter(names.DETECTIONS)
        self._latency = make.gauge(names.LATENCY)
        self._ordered = make.gauge(names.MODE)
        self._published = make.counter(oona.PUBLISHED)
        self._publish_latency = make.gauge(oona.PUBLISH_LATENCY)
        self._publish_duration = make.histogram(oona.PUBLISH_DURATION)
        self._conservative = make.gauge(oona.CONSERVATIVE)
        self._breaker = make.gauge(oona.BREAKER)
        self._breaker.set(_NUMBERS[BreakerState.CLOSED])
        self._breaker_changes = make.counter(oona.BREAKER_CHANGES)
        born = monotonic()
        make.gauge(names.UPTIME).set_function(lambda: monotonic() - born)
        self.degraded_now: set[str] = set()
        self.mode(degraded=False)

    def restarted(self, before: int) -> None:
        """`before`: workers of this container that have ended. Told once."""
        self._restarts.inc(before)

    def reports_kept(self, reports: Sequence[RunReport], evicted: int) -> None:
        for report in reports:
            self._reports.labels(report.WhichOneof("event") or "progress").inc()
        self._evicted.inc(evicted)

    def published(self, status: Status, took_s: float) -> None:
        self._publications.labels(status).inc()
        if status is Status.UNAVAILABLE:
            return
        self._publish_latency.set(took_s * 1e3)
        self._publish_duration.observe(took_s * 1e3)
        if status is Status.PUBLISHED:
            self._published.inc()

    def applied(self, record: EmergencyRecord, leg: str, took_s: float) -> None:
        """A signal is on the emergency page."""
        self._applied.labels(leg).observe(took_s)
        self._latency.set(took_s * 1e3)
        self._detections.inc()
        self.ordered(record)

    def ordered(self, record: EmergencyRecord | None) -> None:
        """What the emergency page says."""
        self._ordered.set(0 if record is None or record.clear else record.mode)

    def set_degraded(self, component: str, *, degraded: bool) -> None:
        (self.degraded_now.add if degraded else self.degraded_now.discard)(component)
        self._degraded.labels(component).set(int(degraded))

    def mode(self, *, degraded: bool) -> None:
        self._mode.labels(DEGRADED).set(int(degraded))
        self._mode.labels(OPERATIONAL).set(int(not degraded))

    # --- workers -------------------------------------------------------------------------------------------------

    def worker_started(self, name: str, *, again: bool) -> None:
        if again:
            self._worker_restarts.labels(name).inc()
        self._worker(name, 0.0)

    def worker_waits(self, name: str, seconds: float, *, failed_at: float) -> None:
        """`failed_at`: by the wall clock, for people."""
        self._last_error.set(failed_at)
        self._worker(name, seconds)

    def worker_stopped(self, name: str, *, failed_at: float) -> None:
        self._last_error.set(failed_at)
        self._worker(name, float("inf"))

    def _worker(self, name: str, wait_s: float) -> None:
        self._workers[name] = wait_s
        self._worker_running.labels(name).set(int(not wait_s))
        self._worker_backoff.labels(name).set(wait_s if wait_s < float("inf") else 0.0)

    # --- the bus -------------------------------------------------------------------------------------------------

    def breaker(self, state: BreakerState) -> None:
        """The breaker before Redis has moved to this state."""
        self._breaker.set(_NUMBERS[state])
        self._breaker_changes.labels(state).inc()
        self._conservative.set(int(state is not BreakerState.CLOSED))

    def told(self, source: str, priority: str, *, emergency: bool) -> None:
        """A telemetry packet is on the bus; `emergency`: on that stream."""
        self._packets.labels(source if source in names.SOURCES else "other", priority).inc()
        if emergency:
            self._emergency_telemetry.inc()
            if source == TAMIYO:
                self._emergency_tamiyo.inc()

    # --- the run -------------------------------------------------------------------------------------------------

    def totals(self, counters: Counters) -> None:
        self._totals.counters = counters

    def deadline_missed(self, after_s: float) -> None:
        """A tier of rollback was late; its event came here so long after."""
        self._deadlines.inc()
        self._deadline_latency.set(after_s * 1e3)
