"""Of the operator. No label has an unbounded set of values: runs, pods and nodes are never labels."""

from esper_leyline.metrics.model import Metric, MetricKind, each
from esper_leyline.metrics.oona import FABRIC

OPERATOR_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

RESULTS = ("ok", "gone", "conflict", "throttled", "transient", "refused", "invalid", "not_leader", "bug")
CAUSES = ("transition", "progress")
WAYS = ("bus", "pull")
OUTCOMES = ("accepted", "repeated", "unknown", "malformed", "wrong_version", "forged")
LEGS = ("bus", "configmap", "touch")
EVENT_OUTCOMES = ("posted", "repeated", "limited", "dropped", "failed")

OPERATOR: tuple[Metric, ...] = (
    Metric(
        "api.requests_total",
        _C,
        "1",
        "Requests to the API server; code 'error' when no answer came",
        ("verb", "kind", "code"),
    ),
    Metric(
        "api.request_seconds", _H, "s", "Time to the answer's headers", ("verb", "kind"), buckets=OPERATOR_BUCKETS_S
    ),
    Metric("workqueue.depth", _G, "1", "Runs that wait for a worker"),
    Metric("workqueue.adds_total", _C, "1", "Runs made due"),
    Metric("workqueue.retries_total", _C, "1", "Reconciles repeated after an error"),
    Metric("workqueue.oldest_seconds", _G, "s", "How long the run that waits longest has waited"),
    Metric("workqueue.unfinished_work_seconds", _G, "s", "How long the longest running reconcile runs"),
    Metric(
        "reconcile_total",
        _C,
        "1",
        f"Reconciles by result: {', '.join(RESULTS)}",
        ("result",),
        known=each(RESULTS),
    ),
    Metric("reconcile_seconds", _H, "s", "Duration of a reconcile, requests included", buckets=OPERATOR_BUCKETS_S),
    Metric(
        "status_writes_total",
        _C,
        "1",
        f"Status writes by cause: {', '.join(CAUSES)}",
        ("cause",),
        known=each(CAUSES),
    ),
    Metric("decisions_total", _C, "1", "Plans that did something, by reason", ("reason",)),
    Metric("informer.objects", _G, "1", "Objects in a cache", ("kind",)),
    Metric("informer.events_total", _C, "1", "Watch events by type; RELIST counts lists", ("kind", "type")),
    Metric(
        "informer.silent_seconds",
        _G,
        "s",
        "Since the API server was last heard from; a bookmark comes about every minute",
        ("kind",),
    ),
    Metric("runs", _G, "1", "Runs by phase", ("phase",)),
    Metric("leader", _G, "bool", "1 while this process holds the Lease"),
    Metric("loop_lag_seconds", _G, "s", "How late the event loop was at its last check"),
    Metric(
        "reports_total",
        _C,
        "1",
        f"Run reports by way ({', '.join(WAYS)}) and outcome ({', '.join(OUTCOMES)})",
        ("way", "outcome"),
        known=each(WAYS, OUTCOMES),
    ),
    Metric("report_polls", _G, "1", "Pods that are asked directly because Redis is silent"),
    Metric("key_generation", _G, "1", "Generation of the run keys in force; it rises with each rotation"),
    Metric("bus_connected", _G, "bool", "1 while Redis answers"),
    Metric(
        "emergency_signals_total",
        _C,
        "1",
        f"Emergency signals by leg ({', '.join(LEGS)}) and outcome",
        ("leg", "outcome"),
    ),
    Metric(
        "emergency_signal_seconds",
        _H,
        "s",
        "From the start of sending to the leg's answer",
        ("leg",),
        OPERATOR_BUCKETS_S,
        each(LEGS),
    ),
    Metric("broadcasts_invalid", _G, "1", "Keys of ConfigMap esper-emergency that cannot be read and are ignored"),
    Metric(
        "events_total",
        _C,
        "1",
        f"Kubernetes Events by outcome: {', '.join(EVENT_OUTCOMES)}",
        ("outcome",),
        known=each(EVENT_OUTCOMES),
    ),
    *FABRIC,
)
