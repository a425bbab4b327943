"""All runs, and the operator."""

from esper_runtime.nissa.expressions import or_zero, quantile
from esper_runtime.nissa.model import Dashboard, Panel, Query, Row, View
from esper_runtime.nissa.slos import BUDGET, error_ratio

_LIVE = "esper_tolaria_incarnation"
_PER_RUN = "{{namespace}}/{{run}}"


def _per_run(expr: str, how: str = "max") -> tuple[Query, ...]:
    return (Query(f"{how} by (namespace, run) ({expr})", _PER_RUN),)


def _number(key: str, title: str, expr: str, *, bad_from: float | None = None, text: str = "") -> Panel:
    return Panel(
        key=key, title=title, queries=(Query(expr),), view=View.NUMBER, width=4, height=4, bad_from=bad_from, text=text
    )


_HEAD = Row(
    title="Now",
    panels=(
        _number("running", "Running", 'sum(esper_runs{phase="Running"})'),
        _number("halted", "Halted", 'sum(esper_runs{phase="Halted"})'),
        _number("failed", "Failed", 'sum(esper_runs{phase="Failed"})', bad_from=1),
        _number("pods", "Trainers scraped", f"count({_LIVE})"),
        _number("leader", "Leading operators", "sum(esper_leader)"),
        _number("alerts", "Alerts firing", 'count(ALERTS{alertstate="firing"}) or vector(0)', bad_from=1),
    ),
)

_RUNS = Row(
    title="Runs",
    panels=(
        Panel(key="phases", title="Runs by phase", queries=(Query("sum by (phase) (esper_runs)", "{{phase}}"),),
              stacked=True),
        Panel(key="goodput", title="Goodput", queries=_per_run("esper:goodput:ratio5m", "min"), unit="percentunit",
              text="Steps that stay, times what a step takes, over five minutes."),
        Panel(key="steps", title="Step", queries=_per_run("esper_tolaria_trainer_step")),
        Panel(key="loss", title="Training loss", queries=_per_run("esper_tolaria_training_loss"), log_scale=True),
        Panel(key="rollbacks", title="Rollbacks of the present trainer",
              queries=_per_run(or_zero("esper_tolaria_rollbacks_initiated_total", _LIVE), "sum")),
        Panel(key="restarts", title="Restarts of the trainer in the pod",
              queries=_per_run("esper_tolaria_in_place_restarts_total", "sum")),
        Panel(key="boundary", title="Boundary, slowest hundredth",
              queries=(Query(quantile(0.99, "esper_tolaria_boundary_total_ms", "namespace, run"), _PER_RUN),),
              unit="ms", bad_from=18),
        Panel(key="emergency", title="Emergency level", queries=_per_run("esper_tolaria_emergency_level"), bad_from=4,
              text="0 none, 1 notice, 2 elevated, 3 conservative, 4 halt."),
        Panel(key="checkpoints", title="Age of the newest checkpoint",
              queries=_per_run("esper_tolaria_checkpoint_age_s"), unit="s"),
    ),
)  # fmt: skip

_SLO = Row(
    title="Objectives",
    panels=(
        Panel(key="slo-burn", title="Not as good as promised, last hour",
              queries=(Query(error_ratio("1h"), "{{slo}}"), Query(error_ratio("5m"), "{{slo}} 5m")),
              unit="percentunit", width=12),
        Panel(key="slo-long", title="Not as good as promised, last six hours",
              queries=(Query(error_ratio("6h"), "{{slo}}"), Query(error_ratio("30m"), "{{slo}} 30m")),
              unit="percentunit", width=6),
        Panel(key="slo-budget", title="Error budget left, 30 days", queries=(Query(BUDGET, "{{slo}}"),),
              unit="percentunit", width=6),
    ),
)  # fmt: skip

_DECISIONS = Row(
    title="Operator: decisions",
    panels=(
        Panel(key="reconciles", title="Reconciles by result",
              queries=(Query("sum by (result) (rate(esper_reconcile_total[$__rate_interval]))", "{{result}}"),),
              unit="ops", stacked=True),
        Panel(key="reconcile-time", title="Duration of a reconcile",
              queries=(Query(quantile(0.5, "esper_reconcile_seconds", "namespace"), "half"),
                       Query(quantile(0.99, "esper_reconcile_seconds", "namespace"), "slowest hundredth")),
              unit="s"),
        Panel(key="decisions", title="Decisions by reason",
              queries=(Query("sum by (reason) (esper_decisions_total)", "{{reason}}"),)),
        Panel(key="queue", title="Queue: waiting, and for how long",
              queries=(Query("max by (namespace) (esper_workqueue_depth)", "waiting"),
                       Query("max by (namespace) (esper_workqueue_oldest_seconds)", "oldest, s"),
                       Query("max by (namespace) (esper_workqueue_unfinished_work_seconds)", "longest work, s"))),
        Panel(key="queue-rates", title="Queue: made due, tried again",
              queries=(Query("sum by (namespace) (rate(esper_workqueue_adds_total[$__rate_interval]))", "due"),
                       Query("sum by (namespace) (rate(esper_workqueue_retries_total[$__rate_interval]))", "again")),
              unit="ops"),
        Panel(key="status-writes", title="Status writes by cause",
              queries=(Query("sum by (cause) (rate(esper_status_writes_total[$__rate_interval]))", "{{cause}}"),),
              unit="ops"),
        Panel(key="events", title="Kubernetes Events by outcome",
              queries=(Query("sum by (outcome) (esper_events_total)", "{{outcome}}"),)),
        Panel(key="broadcasts", title="Broadcasts that cannot be read",
              queries=(Query("max by (namespace) (esper_broadcasts_invalid)", "{{namespace}}"),), bad_from=1),
        Panel(key="loop-lag", title="Lag of the event loop",
              queries=(Query("max by (namespace) (esper_loop_lag_seconds)", "{{namespace}}"),), unit="s", bad_from=1),
    ),
)  # fmt: skip

_WIRES = Row(
    title="Operator: API server, Redis, pods",
    panels=(
        Panel(key="api", title="Requests to the API server by answer",
              queries=(Query("sum by (code) (rate(esper_api_requests_total[$__rate_interval]))", "{{code}}"),),
              unit="ops"),
        Panel(key="api-time", title="Time of a request, slowest hundredth",
              queries=(Query(quantile(0.99, "esper_api_request_seconds", "verb"), "{{verb}}"),), unit="s"),
        Panel(key="informers", title="Silence of the watch streams",
              queries=(Query("max by (kind) (esper_informer_silent_seconds)", "{{kind}}"),), unit="s", bad_from=150),
        Panel(key="informer-events", title="Watch events",
              queries=(Query("sum by (kind, type) (rate(esper_informer_events_total[$__rate_interval]))",
                             "{{kind}} {{type}}"),),
              unit="ops"),
        Panel(key="objects", title="Objects in caches",
              queries=(Query("max by (kind) (esper_informer_objects)", "{{kind}}"),)),
        Panel(key="bus", title="Redis and direct questions",
              queries=(Query("max by (namespace) (esper_bus_connected)", "connected"),
                       Query("max by (namespace) (esper_report_polls)", "pods asked directly"))),
        Panel(key="reports", title="Reports by way and outcome",
              queries=(Query("sum by (way, outcome) (rate(esper_reports_total[$__rate_interval]))",
                             "{{way}} {{outcome}}"),),
              unit="ops"),
        Panel(key="signals", title="Emergency signals by leg",
              queries=(Query("sum by (leg, outcome) (esper_emergency_signals_total)", "{{leg}} {{outcome}}"),)),
        Panel(key="signal-time", title="Sending an emergency signal, slowest hundredth",
              queries=(Query(quantile(0.99, "esper_emergency_signal_seconds", "leg", "5m"), "{{leg}}"),), unit="s",
              bad_from=0.1),
    ),
)  # fmt: skip

_NO_EXPORT = "the export of run events is off unless you want it"
_NO_GROUP = "nobody consumes in a group unless the export of run events is on"

_FABRIC = Row(
    title="Message bus",
    panels=(
        Panel(key="queue-depth", title="Messages still to do, by stream", bad_from=4000,
              queries=(Query("max by (stream) (esper_oona_queue_depth)", "{{stream}}"),)),
        Panel(key="stream-length", title="Length of the streams",
              queries=(Query("max by (stream) (esper_oona_stream_length)", "{{stream}}"),
                       Query("max by (stream) (esper_oona_backpressure_level)", "{{stream}}: pressure"))),
        Panel(key="oldest-pending", title="Oldest message that was taken and not done", unit="s", bad_from=60,
              expected_empty=_NO_GROUP,
              queries=(Query("max by (stream, group) (esper_oona_oldest_pending_age_s)", "{{stream}} {{group}}"),)),
        Panel(key="dead-letters", title="Dead letters",
              queries=(Query("max by (namespace) (esper_oona_dead_letters)", "{{namespace}}"),)),
        Panel(key="trimmed", title="Entries removed for their age",
              queries=(Query("sum by (stream) (rate(esper_oona_trimmed_total[$__rate_interval]))", "{{stream}}"),),
              unit="ops"),
        Panel(key="export", title="Export of run events", expected_empty=_NO_EXPORT,
              queries=(Query("sum by (outcome) (rate(esper_nissa_events_total[$__rate_interval]))", "{{outcome}}"),
                       Query("sum by (outcome) (rate(esper_nissa_batches_total[$__rate_interval]))",
                             "requests {{outcome}}"),
                       Query("max by (pod) (esper_nissa_consumer_lag_s)", "lag of {{pod}}, s"))),
        Panel(key="bus-users", title="Users of runs",
              queries=(Query("max by (namespace) (esper_bus_users)", "users"),
                       Query("max by (namespace) (esper_bus_users_denied)", "1: not allowed"))),
    ),
)  # fmt: skip

OVERVIEW = Dashboard(
    uid="esper-overview",
    title="Esper / Runs and operator",
    text="All runs, the operator, and the objectives. Generated; copy it to change it.",
    rows=(_HEAD, _RUNS, _SLO, _DECISIONS, _WIRES, _FABRIC),
)
