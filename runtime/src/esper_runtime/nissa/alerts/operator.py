"""Of the operator."""

from esper_runtime.nissa.expressions import grew
from esper_runtime.nissa.model import Alert, Group, Severity

_FAILED = "transient|throttled|invalid|refused"

_ALERTS = (
    Alert(
        name="OperatorDown",
        expr="absent(esper_leader)",
        wait="2m",
        severity=Severity.CRITICAL,
        summary="No operator is scraped",
        value="None has been heard of for two minutes (absent is {{ $value | humanize }}).",
        action="Is its Deployment there? Is `metrics.serviceMonitor.enabled` set, and is the monitor selected?",
        cause="The operator is gone or Prometheus cannot reach it. Runs train on; nobody replaces what they lose.",
        panel="overview/leader",
    ),
    Alert(
        name="OperatorNoLeader",
        expr="max by (namespace) (esper_leader) == 0",
        wait="1m",
        severity=Severity.CRITICAL,
        summary="No operator in {{ $labels.namespace }} leads",
        value="The number of leaders is {{ $value | humanize }}.",
        action="Look at the Lease esper-operator and at the operator's log.",
        cause="Nobody holds the Lease: the API server refuses it, or clocks stand still.",
        panel="overview/leader",
    ),
    Alert(
        name="OperatorBug",
        expr='sum by (namespace) (increase(esper_reconcile_total{result="bug"}[10m])) > 0',
        severity=Severity.CRITICAL,
        summary="The operator in {{ $labels.namespace }} has met a bug",
        value="{{ $value | humanize }} reconciles failed within ten minutes.",
        action="Its log has the traceback and the run; please report it.",
        cause="An error that nobody thought of. Other runs are not touched, and this one is tried again.",
        panel="overview/reconciles",
    ),
    Alert(
        name="OperatorReconcilesFail",
        expr=(
            f'sum by (namespace) (rate(esper_reconcile_total{{result=~"{_FAILED}"}}[10m]))'
            " / sum by (namespace) (rate(esper_reconcile_total[10m])) > 0.5"
        ),
        wait="10m",
        severity=Severity.WARNING,
        summary="Most reconciles of the operator in {{ $labels.namespace }} fail",
        value="A share of {{ $value | humanizePercentage }}.",
        action="Its log says what the API server refuses; compare the chart's roles.",
        cause="The API server is away, slow, or does not permit what the operator must do.",
        panel="overview/reconciles",
    ),
    Alert(
        name="OperatorQueueOld",
        expr="max by (namespace) (esper_workqueue_oldest_seconds) > 60",
        wait="2m",
        severity=Severity.WARNING,
        summary="Runs wait for the operator in {{ $labels.namespace }}",
        value="One has waited for {{ $value | humanizeDuration }}.",
        action="Give it more CPU; look at the time that requests to the API server take.",
        cause="All workers are busy, or none runs.",
        panel="overview/queue",
    ),
    Alert(
        name="OperatorInformerSilent",
        expr="max by (namespace, kind) (esper_informer_silent_seconds) > 150",
        wait="1m",
        severity=Severity.WARNING,
        summary="The operator in {{ $labels.namespace }} hears nothing of {{ $labels.kind }}",
        value="Nothing came for {{ $value | humanizeDuration }}; a bookmark comes about every minute.",
        action="It lists again by itself; if not, its liveness probe restarts it. Look for a proxy that cuts streams.",
        cause="A watch stream is dead although nobody closed it.",
        panel="overview/informers",
    ),
    Alert(
        name="OperatorLoopLag",
        expr="max by (namespace) (esper_loop_lag_seconds) > 1",
        wait="2m",
        severity=Severity.WARNING,
        summary="The event loop of the operator in {{ $labels.namespace }} is late",
        value="By {{ $value | humanizeDuration }}.",
        action="Raise its CPU limit.",
        cause="The process gets too little CPU.",
        panel="overview/loop-lag",
    ),
    Alert(
        name="OperatorBusLost",
        expr="max_over_time(esper_bus_connected[1h]) == 1 and esper_bus_connected == 0",
        wait="2m",
        severity=Severity.WARNING,
        summary="The operator in {{ $labels.namespace }} has lost Redis",
        value="It was connected ({{ $value | humanize }}) within the last hour and is not now.",
        action="Bring Redis back; reports are pulled from the pods and halts go through ConfigMaps meanwhile.",
        cause="Redis does not answer.",
        panel="overview/bus",
    ),
    Alert(
        name="OperatorReportsForged",
        expr='sum by (namespace) (increase(esper_reports_total{outcome="forged"}[10m])) > 0',
        severity=Severity.CRITICAL,
        summary="Somebody sends reports in the name of runs",
        value="{{ $value | humanize }} within ten minutes.",
        action="Events of the run name it. Find out who else can write to Redis, or was given another seed.",
        cause="A report whose signature is not the run's. It was ignored.",
        panel="overview/reports",
    ),
    Alert(
        name="OperatorBroadcastsInvalid",
        expr="max by (namespace) (esper_broadcasts_invalid) > 0",
        wait="5m",
        severity=Severity.WARNING,
        summary="ConfigMap esper-emergency has keys that cannot be read",
        value="{{ $value | humanize }} are ignored: they stop nothing.",
        action="The Events of the ConfigMap name the key and the mistake.",
        cause="A broadcast with a mistake in its YAML, mode or selector.",
        panel="overview/broadcasts",
    ),
    Alert(
        name="OperatorEventsLost",
        expr=grew('esper_events_total{outcome=~"dropped|failed"}', "15m"),
        severity=Severity.WARNING,
        summary="Events of runs are lost",
        value="{{ $value | humanize }} {{ $labels.outcome }} within fifteen minutes.",
        action="Look at the operator's rights on events, and at the API server's priority and fairness.",
        cause="The API server refused Events, or more came than may wait. status.history has them all.",
        panel="overview/events",
    ),
    Alert(
        name="EsperRunsFailed",
        expr=(
            'max by (namespace) (esper_runs{phase="Failed"})'
            ' - max by (namespace) (esper_runs{phase="Failed"} offset 15m) > 0'
        ),
        severity=Severity.WARNING,
        summary="Runs have failed",
        value="{{ $value | humanize }} more than fifteen minutes ago.",
        action="`kubectl get esperruns -A` shows them; status.lastFailure says why.",
        cause="A run has used up its restarts or rollbacks, or met an error that no restart cures.",
        panel="overview/phases",
    ),
)

OPERATOR = Group(name="esper-operator", interval="15s", alerts=_ALERTS)
