"""What the export counts."""

import logging

from esper_leyline.metrics import nissa as names
from prometheus_client import CollectorRegistry

from esper_runtime.otlp.message import Item
from esper_runtime.sidecar.metrics import Exporter

log = logging.getLogger(__name__)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        make = Exporter(registry)
        self._packets = make.counter(names.PACKETS)
        self._events = make.counter(names.EVENTS)
        self.batches = make.counter(names.BATCHES)
        self._export = make.histogram(names.EXPORT)
        self.lag = make.gauge(names.LAG)
        self.redis = make.gauge(names.REDIS)

    def read(self, item: Item) -> None:
        """A packet was taken from the bus for the first time."""
        source = item.packet.source_subsystem
        self._packets.labels(source if source in names.SOURCES else names.SOURCES[-1], item.priority).inc()

    def became(self, outcome: str, count: int = 1) -> None:
        self._events.labels(outcome).inc(count)

    def accepted(self, took_s: float) -> None:
        self.batches.labels("accepted").inc()
        self._export.observe(took_s * 1e3)

    def rejected(self, count: int, why: str) -> None:
        """Of a batch that was taken otherwise."""
        self.became("rejected", count)
        log.warning("the receiver took a batch without %d of its records: %s", count, why[:256])
