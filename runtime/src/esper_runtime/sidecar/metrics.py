"""From the catalogue to the objects of prometheus_client that a sidecar counts with."""

from esper_leyline.metrics import Metric
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Exporter:
    """Makes metrics in one registry; the series that are known beforehand exist from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, metric: Metric) -> Counter:
        made = Counter(**metric.arguments, registry=self._registry)
        for values in metric.known:
            made.labels(*values)
        return made

    def gauge(self, metric: Metric) -> Gauge:
        made = Gauge(**metric.arguments, registry=self._registry)
        for values in metric.known:
            made.labels(*values)
        return made

    def histogram(self, metric: Metric) -> Histogram:
        made = Histogram(**metric.arguments, registry=self._registry)
        for values in metric.known:
            made.labels(*values)
        return made
