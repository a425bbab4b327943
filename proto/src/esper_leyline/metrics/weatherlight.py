"""Of the weatherlight sidecar."""

from esper_leyline.metrics.model import Metric, MetricKind, each
from esper_leyline.reasons import SignalRejection

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

LEGS = ("redis", "configmap")
VERDICTS = ("accepted", "duplicate", "rejected")
MODES = ("operational", "degraded")
COMPONENTS = ("oona", "emergency", "tolaria-page", "journal", "weatherlight")
"""What weatherlight watches itself; the last is its own workers."""
WORKERS = (
    "journal",
    "lookout",
    "supervisor",
    "emergency-file",
    "emergency-redis",
    "reports",
    "telemetry",
    "telemetry-urgent",
    "telemetry-ordinary",
    "bus",
    "bus-examination",
)
"""Parts of weatherlight that are started again by themselves."""
SOURCES = ("tolaria", "supervisor", "kasmina", "tamiyo", "weatherlight", "other")
"""Who writes events into a pod's journal."""
PRIORITIES = ("LOW", "NORMAL", "HIGH", "CRITICAL")

# Reports
REPORTS = Metric("weatherlight.reports_total", _C, "1", "Reports made, by the event they are about", ("event",))
EVICTED = Metric(
    "weatherlight.reports_evicted_total", _C, "1", "Reports with an event that the full log had to give up"
)
SPOOL_REPORTS = Metric("weatherlight.spool_reports", _G, "1", "Reports that Redis has not acknowledged")
SPOOL_BYTES = Metric("weatherlight.spool_bytes", _G, "B", "Bytes of the reports that Redis has not acknowledged")
PUBLICATIONS = Metric(
    "weatherlight.publications_total",
    _C,
    "1",
    "Attempts to publish a report, by outcome",
    ("outcome",),
    known=each(("published", "unavailable", "refused")),
)
PULLS = Metric("weatherlight.pulls_total", _C, "1", "Requests to the report log")
JOURNAL_SKIPPED = Metric(
    "weatherlight.journal_skipped_bytes_total", _C, "B", "Bytes of the journal that were no events"
)

# What it watches
REDIS_CONNECTED = Metric("weatherlight.redis_connected", _G, "bool", "1 when the last exchange with Redis succeeded")
SUPERVISOR_CONNECTED = Metric(
    "weatherlight.supervisor_connected", _G, "bool", "1 while the supervisor holds its connection"
)
HEARTBEAT_AGE = Metric("weatherlight.heartbeat_age_seconds", _G, "s", "Age of the trainer's last heartbeat")
DEGRADED = Metric(
    "weatherlight.degraded",
    _G,
    "bool",
    "1 while a part that weatherlight watches does not work",
    ("component",),
    known=each(COMPONENTS),
)
SYSTEM_MODE = Metric(
    "weatherlight.system_mode", _G, "bool", "1 for the mode that the pod is in", ("mode",), known=each(MODES)
)

# Itself
UPTIME = Metric("weatherlight.uptime_s", _G, "s", "Life of this worker")
RESTARTS = Metric(
    "weatherlight.restarts_total", _C, "1", "Worker processes that ended before this one, in this container"
)
TASKS_RUNNING = Metric("weatherlight.tasks.running", _G, "1", "Workers that run")
TASKS_BACKING_OFF = Metric("weatherlight.tasks.backing_off", _G, "1", "Workers that wait to be started again")
WORKER_RUNNING = Metric(
    "weatherlight.worker.running", _G, "bool", "1 while this worker runs", ("worker",), known=each(WORKERS)
)
WORKER_RESTARTS = Metric(
    "weatherlight.worker.restarts_total",
    _C,
    "1",
    "Times that this worker was started again",
    ("worker",),
    known=each(WORKERS),
)
WORKER_BACKOFF = Metric(
    "weatherlight.worker.backoff_seconds",
    _G,
    "s",
    "How long this worker waits after its last failure; 0 while it runs",
    ("worker",),
    known=each(WORKERS),
)
LAST_ERROR = Metric("weatherlight.last_error_ts", _G, "unix s", "When a worker last failed; 0 before the first time")
CLOCK_SKEW = Metric(
    "weatherlight.clock_skew_seconds", _G, "s", "How far the pod's clock is ahead of Redis's, beyond what asking took"
)

# Of the run: totals over all its attempts, whatever was restarted; absent until the first event of its trainer
TOTALS = {
    field: Metric(f"run.{field}_total", _C, "1", f"{text}, since the run began")
    for field, text in {
        "rollbacks": "Rollbacks",
        "in_place_restarts": "Restarts of the trainer inside its pod",
        "skipped_batches": "Batches that rollbacks left out",
        "checkpoint_failures": "Saves that failed",
        "rejected_commands": "Commands that Kasmina refused",
        "rejected_signals": "Emergency signals that were ignored",
        "restores_without_checkpoint": "Restores that found nothing to restore",
        "restores_failed_integrity": "Restores that did not verify",
        "restores_over_deadline": "Restores that took too long",
        "restores_failed_apply": "Restores that could not be put in place",
    }.items()
}
"""By field of Counters."""

# Emergency signals
SIGNALS = Metric(
    "weatherlight.signals_total",
    _C,
    "1",
    "Emergency signals received, by way and verdict",
    ("leg", "verdict"),
    known=each(LEGS, VERDICTS),
)
REJECTED = Metric(
    "weatherlight.signals_rejected_total",
    _C,
    "1",
    "Emergency signals ignored, by reason",
    ("reason",),
    known=each(SignalRejection),
)
APPLY = Metric(
    "weatherlight.signal_apply_seconds",
    _H,
    "s",
    "From the arrival of an emergency signal to the emergency page",
    ("leg",),
    (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
    each(LEGS),
)
LAG = Metric(
    "weatherlight.signal_lag_seconds",
    _H,
    "s",
    "How much later a signal arrived by this way than by the faster one",
    ("leg",),
    (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 90),
    each(LEGS),
)
ARRIVAL = Metric(
    "weatherlight.signal_last_arrival_timestamp_seconds",
    _G,
    "unix s",
    "When a signal last came by this way",
    ("leg",),
    known=each(LEGS),
)
DEADLINES = Metric(
    "weatherlight.rollback.detections_total", _C, "1", "Tiers of rollback that took longer than they may"
)
DEADLINE_LATENCY = Metric(
    "weatherlight.rollback.deadline_latency_ms", _G, "ms", "From the last missed deadline to its event here"
)
DETECTIONS = Metric("weatherlight.emergency.detections_total", _C, "1", "Emergency signals that took effect")
LATENCY = Metric(
    "weatherlight.emergency.latency_ms", _G, "ms", "From the arrival of the last emergency signal to the emergency page"
)
MODE = Metric(
    "weatherlight.emergency.mode",
    _G,
    "mode",
    "Stop that is ordered: 0 none, 1 freeze, 2 checkpoint, 3 kill",
)

# Telemetry on the bus
TELEMETRY = Metric(
    "weatherlight.telemetry_total",
    _C,
    "1",
    "Telemetry packets by priority and what became of them",
    ("priority", "outcome"),
    known=each(PRIORITIES, ("published", "dropped", "coalesced")),
)
TELEMETRY_SPOOL = Metric("weatherlight.telemetry_spool_bytes", _G, "B", "Telemetry that waits for Redis")
PACKETS = Metric(
    "telemetry.packets_total",
    _C,
    "1",
    "Telemetry packets that Redis has taken, by the writer of their event and by priority",
    ("source", "priority"),
    known=each(SOURCES, PRIORITIES),
)
EMERGENCY_TELEMETRY = Metric(
    "weatherlight.emergency.telemetry_total",
    _C,
    "1",
    "HIGH and CRITICAL telemetry that this pod has put on the emergency stream, each once",
)
EMERGENCY_TAMIYO = Metric("weatherlight.emergency.tamiyo_total", _C, "1", "Of these, those of Tamiyo")
EMERGENCY_COALESCED = Metric(
    "weatherlight.emergency.coalesced_total",
    _C,
    "1",
    "HIGH and CRITICAL events that repeated one of the last 200 ms and were told together",
)
PRIORITY_MISSING = Metric(
    "weatherlight.priority_missing_total", _C, "1", "Events without a level, which nobody could route: not told"
)

WEATHERLIGHT = (
    TELEMETRY,
    TELEMETRY_SPOOL,
    PACKETS,
    EMERGENCY_TELEMETRY,
    EMERGENCY_TAMIYO,
    EMERGENCY_COALESCED,
    PRIORITY_MISSING,
    REPORTS,
    EVICTED,
    SPOOL_REPORTS,
    SPOOL_BYTES,
    PUBLICATIONS,
    PULLS,
    JOURNAL_SKIPPED,
    REDIS_CONNECTED,
    SUPERVISOR_CONNECTED,
    HEARTBEAT_AGE,
    DEGRADED,
    SYSTEM_MODE,
    UPTIME,
    RESTARTS,
    TASKS_RUNNING,
    TASKS_BACKING_OFF,
    WORKER_RUNNING,
    WORKER_RESTARTS,
    WORKER_BACKOFF,
    LAST_ERROR,
    CLOCK_SKEW,
    *TOTALS.values(),
    DEADLINES,
    DEADLINE_LATENCY,
    SIGNALS,
    REJECTED,
    APPLY,
    LAG,
    ARRIVAL,
    DETECTIONS,
    LATENCY,
    MODE,
)
