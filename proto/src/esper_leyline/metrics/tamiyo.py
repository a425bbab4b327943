"""Of the tamiyo sidecar."""

from esper_leyline.metrics.model import Metric, MetricKind, each
from esper_leyline.v1.command_pb2 import CommandType

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

DECISIONS = Metric(
    "tamiyo.decisions_total",
    _C,
    "1",
    "Decisions, by command type",
    ("command_type",),
    known=each(name for name, number in CommandType.items() if number),
)
REFUSED = Metric("tamiyo.refused_packets_total", _C, "1", "State packets not answered")
CONSERVATIVE = Metric("tamiyo.conservative_mode", _G, "bool", "1 in conservative mode")
BEST = Metric("tamiyo.best_validation", _G, "1", "Best value judged by so far")
INFERENCE = Metric(
    "tamiyo.inference_seconds",
    _H,
    "s",
    "Time to decide and sign",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.012, 0.1),
)

TAMIYO = (DECISIONS, REFUSED, CONSERVATIVE, BEST, INFERENCE)
