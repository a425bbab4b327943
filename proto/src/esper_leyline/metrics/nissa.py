"""Of the export of run events."""

from esper_leyline.metrics.model import Metric, MetricKind, each

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

SOURCES = ("tolaria", "supervisor", "weatherlight", "kasmina", "tamiyo", "other")
PRIORITIES = ("LOW", "NORMAL", "HIGH", "CRITICAL")
OUTCOMES = ("exported", "rejected", "refused")
BATCH_OUTCOMES = ("accepted", "unavailable", "refused")

PACKETS = Metric(
    "nissa.packets_total",
    _C,
    "1",
    "Telemetry packets that were read, by who wrote them and their priority",
    ("source", "priority"),
    known=each(SOURCES, PRIORITIES),
)
EVENTS = Metric(
    "nissa.events_total",
    _C,
    "1",
    "Packets by what became of them: exported, rejected by the receiver within a batch, or refused and a dead letter",
    ("outcome",),
    known=each(OUTCOMES),
)
BATCHES = Metric(
    "nissa.batches_total", _C, "1", "Requests to the receiver by its answer", ("outcome",), known=each(BATCH_OUTCOMES)
)
EXPORT = Metric(
    "nissa.export_latency_ms",
    _H,
    "ms",
    "Time of a request that the receiver accepted",
    buckets=(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0, 5000.0),
)
LAG = Metric("nissa.consumer_lag_s", _G, "s", "How long the oldest packet in hand has been waiting for the receiver")
REDIS = Metric("nissa.redis_connected", _G, "bool", "1 when the last exchange with Redis succeeded")

NISSA = (PACKETS, EVENTS, BATCHES, EXPORT, LAG, REDIS)
