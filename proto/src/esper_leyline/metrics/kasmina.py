"""Of the kasmina sidecar."""

from esper_leyline.metrics.model import Metric, MetricKind, each
from esper_leyline.reasons import CommandRejection

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

ACCEPTED = Metric("kasmina.command_verifier.accepted_total", _C, "1", "Commands that may act")
REJECTIONS = Metric(
    "kasmina.command_verifier.rejections_total",
    _C,
    "1",
    "Commands refused, by reason",
    ("reason",),
    known=each(CommandRejection),
)
VALIDATION = Metric(
    "kasmina.command_verifier.validation_seconds",
    _H,
    "s",
    "Time to verify one command",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1),
)
VALIDATION_LATENCY = Metric(
    "kasmina.command_verifier.validation_latency_ms", _G, "ms", "Time that the last command took to verify"
)
BOUNDARIES = Metric("kasmina.boundaries_opened_total", _C, "1", "Epoch boundaries opened")
NONCES = Metric("kasmina.nonce_ledger.size", _G, "1", "Nonces and ids remembered")
NONCE_EVICTIONS = Metric("kasmina.nonce_ledger.evictions_total", _C, "1", "Nonces and ids forgotten after their window")
NONCE_TTL = Metric("kasmina.nonce_ledger.ttl_seconds", _G, "s", "How long a nonce is remembered")

KASMINA = (
    ACCEPTED,
    REJECTIONS,
    VALIDATION,
    VALIDATION_LATENCY,
    BOUNDARIES,
    NONCES,
    NONCE_EVICTIONS,
    NONCE_TTL,
)
