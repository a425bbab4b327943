"""When each alert fires, when it clears, and what looks like it and must not fire. A value a minute.

Times are minutes from the start of a case. Where nothing else is said something is well for ten minutes, then bad.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Values = Sequence[float | str]
Series = Mapping[str, Values]
GONE: Final = "stale"
"""The target is there no longer."""
ABSENT: Final = "_"


@dataclass(frozen=True, kw_only=True)
class Case:
    alert: str
    series: Series
    quiet: tuple[int, ...]
    """Before it fires: all is well, or it has not lasted long enough."""
    fires: tuple[int, ...]
    clears: int
    near: tuple[Series, ...]
    """Never fires."""
    near_at: tuple[int, ...]


def pod(series: str, container: str = "tolaria", /, **labels: str) -> str:
    given = {"namespace": "ml", "run": "digits", "attempt": "1", "rank": "0", "pod": "digits-a1-0-x"}
    return _with(series, {**given, "container": container, **labels})


def operator(series: str, /, **labels: str) -> str:
    return _with(series, {"namespace": "esper-system", "pod": "operator-x", **labels})


def _with(series: str, labels: Mapping[str, str]) -> str:
    matchers = ",".join([f'{key}="{value}"' for key, value in labels.items()])
    return f"{series}{{{matchers}}}"


def hold(*parts: tuple[float | str, int]) -> Values:
    """(value, minutes) after each other."""
    return [value for value, minutes in parts for _ in range(minutes)]


def rise(*parts: tuple[float, int]) -> Values:
    """A counter: (growth a minute, minutes) after each other."""
    found: list[float] = [0.0]
    for growth, minutes in parts:
        for _ in range(minutes):
            found.append(found[-1] + growth)
    return found


def gauge(
    alert: str, series: str, *, ok: float, bad: float, near: float, wait: int = 0, over: int = 0,
    besides: Iterable[Series] = (),
) -> Case:  # fmt: skip
    """`wait` is the alert's own; `over` the minutes that its expression averages over."""
    return Case(
        alert=alert,
        series={series: hold((ok, 10), (bad, 25), (ok, 25))},
        quiet=(8, *((10 + wait - 1,) if wait > 1 else ())),
        fires=(10 + wait + over + 1, 34),
        clears=35 + over + 1,
        near=({series: hold((near, 60))}, *besides),
        near_at=(10, 30, 59),
    )


def first(alert: str, series: str, window: int, *, near: Iterable[Series] = (), known: bool = False) -> Case:
    """A counter that counts once, and appears with that unless it is `known` from the start."""
    before = 0.0 if known else ABSENT
    return Case(
        alert=alert,
        series={series: hold((before, 10), (1, window + 20))},
        quiet=(9,),
        fires=(11, 10 + window - 1),
        clears=10 + window + 2,
        near=({series: hold((0, window + 30))}, {series: hold((7, window + 30))}, *near),
        near_at=(window + 2, window + 20),
    )


def often(alert: str, series: str, window: int, *, known: bool = False) -> Case:
    """Three times within the window; twice is not often, and three times in three windows neither."""
    before = 0.0 if known else ABSENT
    return Case(
        alert=alert,
        series={series: hold((before, 10), (1, 1), (2, 1), (3, window + 20))},
        quiet=(9, 11),
        fires=(13, 9 + window),
        clears=13 + window,
        near=(
            {series: hold((before, 10), (1, 1), (2, window + 30))},
            {series: hold((before, 5), (1, window), (2, window), (3, window))},
        ),
        near_at=(13, window + 8, 2 * window + 8),
    )


def _boundaries(*parts: tuple[float, int], each: float = 1) -> Series:
    """`each` a minute; (share over 18 ms, minutes) after each other."""
    minutes = sum(part[1] for part in parts)
    return {
        pod("esper_tolaria_boundary_total_ms_count"): rise((each, minutes)),
        pod("esper_tolaria_boundary_total_ms_bucket", le="18"): rise(
            *((each * (1 - bad), part) for bad, part in parts)
        ),
    }


_GRAPHS = pod("esper_tolaria_train_graph_enabled")

TRAINING = (
    Case(
        alert="TrainingLatencyHigh",
        series=_boundaries((0, 10), (1, 20), (0, 20)),
        quiet=(9, 12),
        fires=(13, 32),
        clears=33,
        near=(
            _boundaries((0, 10), (1, 2), (0, 38)),
            _boundaries(*[(1.0, 2), (0.0, 3)] * 10),
            _boundaries((1, 50), each=0.2),
            _boundaries((0.03, 50), each=100),
        ),
        near_at=(10, 12, 14, 30, 49),
    ),
    often("TolariaTamiyoTimeouts", pod("esper_tolaria_timeout_tamiyo_total"), 10),
    often("TolariaKasminaTimeouts", pod("esper_tolaria_timeout_kasmina_total"), 10),
    first("TolariaEpochsFail", pod("esper_tolaria_epochs_failed"), 15),
    gauge("TolariaBreakerOpen", pod("esper_tolaria_breaker_state", name="tamiyo"), ok=1, bad=2, near=3, wait=1),
    gauge("TolariaConservativeMode", pod("esper_tolaria_mode_conservative"), ok=0, bad=1, near=0, wait=5),
    gauge(
        "TolariaEmergencyHalt", pod("esper_tolaria_emergency_halt"), ok=0, bad=1, near=0,
        besides=({pod("esper_tolaria_emergency_level"): hold((3, 60))},),
    ),
    first("TolariaLearningRateTampered", pod("esper_tolaria_lr_violations_total"), 15),
    first("TolariaRebuildFailed", pod("esper_tolaria_opt_rebuild_failures_total"), 15),
    first("TolariaTelemetryDropped", pod("esper_tolaria_telemetry_dropped_total", priority="LOW"), 15),
    gauge(
        "TolariaGraphStageCopySlow", pod("esper_tolaria_graph_stage_copy_ms"),
        ok=0.01, bad=0.6, near=0.5, wait=2, over=1,
    ),
    gauge(
        "TolariaGraphCaptureWarning", pod("esper_tolaria_graph_capture_ms"), ok=90, bad=250, near=200, wait=1, over=1,
    ),
    gauge(
        "TolariaGraphCaptureCritical", pod("esper_tolaria_graph_capture_ms"),
        ok=90, bad=2000, near=1000, wait=2, over=5,
    ),
    gauge("TolariaGraphReplaySlow", pod("esper_tolaria_graph_replay_ms"), ok=0.04, bad=0.6, near=0.5, wait=2, over=1),
    Case(
        alert="TolariaGraphFallback",
        series={_GRAPHS: hold((1, 10), (0, 20))},
        quiet=(9,),
        fires=(11, 14),
        clears=17,
        near=({_GRAPHS: hold((0, 30))}, {_GRAPHS: hold((1, 30))}),
        near_at=(10, 29),
    ),
)  # fmt: skip

_SLOW = "esper_tolaria_rollback_duration_ms_count", "esper_tolaria_rollback_duration_ms_bucket"


def _restores(tier: str, *, slow: int, fast: int) -> Series:
    """Rollbacks at minute 10."""
    count, bucket = _SLOW
    return {
        pod(count, tier=tier): hold((ABSENT, 10), (slow + fast, 30)),
        pod(bucket, tier=tier, le="500"): hold((ABSENT, 10), (fast, 30)),
    }


RECOVERY = (
    Case(
        alert="TolariaRollbackSlow",
        series=_restores("Fast", slow=1, fast=2),
        quiet=(9,),
        fires=(11, 18),
        clears=21,
        near=(_restores("Fast", slow=0, fast=3), _restores("Full", slow=3, fast=0)),
        near_at=(11, 18),
    ),
    first("TolariaRollbackDeadlineExceeded", pod("esper_tolaria_rollback_deadline_exceeded_total"), 10),
    first("TolariaRollbackFailed", pod("esper_tolaria_rollback_failures_total"), 10),
    often("TolariaRollbacksRepeat", pod("esper_tolaria_rollbacks_initiated_total"), 30),
    first("TolariaCheckpointsFail", pod("esper_tolaria_checkpoint_failures_total"), 15),
    gauge("TolariaCheckpointOld", pod("esper_tolaria_checkpoint_age_s"), ok=60, bad=3700, near=3600, wait=5),
    gauge("TolariaTrainerSilent", pod("esper_tolaria_trainer_silent_seconds"), ok=1, bad=130, near=120, wait=1),
    first("TolariaTrainerHung", pod("esper_tolaria_hangs_total"), 15, known=True),
    often("TolariaTrainerRestarts", pod("esper_tolaria_in_place_restarts_total"), 30, known=True),
)


def _refused(reason: str) -> str:
    return pod("esper_kasmina_command_verifier_rejections_total", "kasmina", reason=reason)


def _once(series: str) -> Series:
    return {series: hold((0, 10), (1, 40))}


SIDECARS = (
    gauge(
        "KasminaAuthorityLost", pod("up", "kasmina"), ok=1, bad=0, near=1, wait=1,
        besides=({pod("up", "tamiyo"): hold((0, 60))},),
    ),
    gauge(
        "EsperContainerDown", pod("up", "weatherlight"), ok=1, bad=0, near=1, wait=2,
        besides=({pod("up", "kasmina"): hold((0, 60))}, {pod("up", "elsewhere"): hold((0, 60))}),
    ),
    first(
        "KasminaCommandRejected", _refused("stale_command"), 5, known=True,
        near=(_once(_refused("invalid_signature")), _once(_refused("nonce_ledger_full"))),
    ),
    first("KasminaCommandForged", _refused("nonce_replayed"), 5, known=True, near=(_once(_refused("malformed")),)),
    first("KasminaNonceLedgerFull", _refused("nonce_ledger_full"), 5, known=True, near=(_once(_refused("wrong_run")),)),
    first("TamiyoPacketsRefused", pod("esper_tamiyo_refused_packets_total", "tamiyo"), 10, known=True),
    gauge(
        "WeatherlightDegraded", pod("esper_weatherlight_degraded", "weatherlight", component="oona"),
        ok=0, bad=1, near=0, wait=2,
    ),
    gauge("WeatherlightEmergencyHalt", pod("esper_weatherlight_emergency_mode", "weatherlight"), ok=0, bad=1, near=0),
    often("WeatherlightRestarts", pod("esper_weatherlight_restarts_total", "weatherlight"), 15, known=True),
    first(
        "WeatherlightSignalsRejected",
        pod("esper_weatherlight_signals_rejected_total", "weatherlight", reason="invalid_signature"),
        10,
        known=True,
        near=(_once(pod("esper_weatherlight_signals_rejected_total", "weatherlight", reason="wrong_attempt")),),
    ),
    first("WeatherlightJournalDamaged", pod("esper_weatherlight_journal_skipped_bytes_total", "weatherlight"), 15,
          known=True),
)  # fmt: skip


def _published(outcome: str) -> str:
    return pod("esper_weatherlight_publications_total", "weatherlight", outcome=outcome)


def _sent(*, fast: float, slow: float) -> Series:
    """Signals a minute from minute 10 to 30, by whether they took at most 100 ms."""
    return {
        operator("esper_emergency_signal_seconds_bucket", leg="bus", le=bound): rise((0, 10), (rate, 20), (0, 20))
        for bound, rate in (("0.05", fast), ("0.1", fast), ("0.5", fast + slow), ("+Inf", fast + slow))
    }


def _telemetry(outcome: str) -> str:
    return pod("esper_weatherlight_telemetry_total", "weatherlight", priority="LOW", outcome=outcome)


def _depth(stream: str) -> str:
    return operator("esper_oona_queue_depth", stream=stream)


def _batches(outcome: str) -> str:
    return operator("esper_nissa_batches_total", outcome=outcome)


_LETTERS = operator("esper_oona_dead_letters")

BUS = (
    first("OonaPublishDropped", pod("esper_weatherlight_reports_evicted_total", "weatherlight"), 5, known=True),
    Case(
        alert="OonaPublishUnavailable",
        series={_published("unavailable"): rise((0, 10), (2, 10), (0, 20))},
        quiet=(9, 11),
        fires=(14, 20),
        clears=26,
        near=({_published("published"): rise((100, 40))}, {_published("unavailable"): hold((9, 40))}),
        near_at=(10, 20, 39),
    ),
    gauge(
        "OonaSpoolHigh", pod("esper_weatherlight_spool_reports", "weatherlight"), ok=3, bad=4090, near=4000, wait=2,
    ),
    gauge(
        "OonaConservativeMode", pod("esper_oona_conservative_mode", "weatherlight"), ok=0, bad=1, near=0, wait=1,
        besides=({pod("esper_oona_conservative_mode", "weatherlight"): [0, 0, 0, 1] * 15},),
    ),
    first("OonaTelemetryDropped", _telemetry("dropped"), 15, known=True, near=(_once(_telemetry("published")),)),
    gauge("OonaQueueDepthHigh", _depth("oona.telemetry"), ok=3, bad=5000, near=4000, wait=2),
    gauge(
        "OonaOldestPending",
        operator("esper_oona_oldest_pending_age_s", stream="oona.telemetry", group="nissa"),
        ok=2, bad=61, near=60,
    ),
    Case(
        alert="OonaDeadLetterGrowth",
        series={_LETTERS: hold((7, 10), (8, 40))},
        quiet=(9,),
        fires=(10, 24),
        clears=26,
        near=({_LETTERS: hold((7, 50))}, {_LETTERS: hold((ABSENT, 10), (7, 40))}, {_LETTERS: hold((7, 20), (0, 30))}),
        near_at=(9, 11, 21, 49),
    ),
    gauge("NissaLag", operator("esper_nissa_consumer_lag_s"), ok=0, bad=31, near=30, wait=1),
    Case(
        alert="NissaExportFails",
        series={_batches("unavailable"): rise((0, 10), (2, 10), (0, 20))},
        quiet=(9, 11),
        fires=(14, 20),
        clears=26,
        near=({_batches("accepted"): rise((100, 40))}, {_batches("refused"): hold((9, 40))}),
        near_at=(10, 20, 39),
    ),
    gauge("OonaUsersDenied", operator("esper_bus_users_denied"), ok=0, bad=1, near=0, wait=1),
    Case(
        alert="EmergencyBroadcastSlow",
        series=_sent(fast=10, slow=1),
        quiet=(9,),
        fires=(16, 30),
        clears=36,
        near=(_sent(fast=10, slow=0), _sent(fast=1000, slow=1)),
        near_at=(16, 30),
    ),
)  # fmt: skip

_LEADER = operator("esper_leader")
_FAILED_RUNS = operator("esper_runs", phase="Failed")
_BUS = operator("esper_bus_connected")


def _reconciles(result: str) -> str:
    return operator("esper_reconcile_total", result=result)


OPERATOR = (
    Case(
        alert="OperatorDown",
        series={_LEADER: hold((1, 10), (GONE, 1), (ABSENT, 9), (1, 10))},
        quiet=(9, 11),
        fires=(13, 19),
        clears=21,
        near=({_LEADER: hold((0, 30))},),
        near_at=(15, 29),
    ),
    gauge(
        "OperatorNoLeader", _LEADER, ok=1, bad=0, near=1, wait=1,
        besides=({_LEADER: hold((0, 60)), operator("esper_leader", instance="second"): hold((1, 60))},),
    ),
    first("OperatorBug", _reconciles("bug"), 10, known=True, near=(_once(_reconciles("conflict")),)),
    Case(
        alert="OperatorReconcilesFail",
        series={_reconciles("transient"): rise((0, 10), (8, 30), (0, 20)), _reconciles("ok"): rise((4, 60))},
        quiet=(9, 19),
        fires=(30, 39),
        clears=48,
        near=({_reconciles("transient"): rise((4, 60)), _reconciles("ok"): rise((5, 60))},),
        near_at=(30, 59),
    ),
    gauge("OperatorQueueOld", operator("esper_workqueue_oldest_seconds"), ok=0, bad=61, near=60, wait=2),
    gauge(
        "OperatorInformerSilent", operator("esper_informer_silent_seconds", kind="Pod"),
        ok=9, bad=160, near=150, wait=1,
    ),
    gauge("OperatorLoopLag", operator("esper_loop_lag_seconds"), ok=0, bad=2, near=1, wait=2),
    gauge("OperatorBusLost", _BUS, ok=1, bad=0, near=1, wait=2, besides=({_BUS: hold((0, 60))},)),
    first(
        "OperatorReportsForged", operator("esper_reports_total", way="bus", outcome="forged"), 10, known=True,
        near=(_once(operator("esper_reports_total", way="bus", outcome="repeated")),),
    ),
    gauge("OperatorBroadcastsInvalid", operator("esper_broadcasts_invalid"), ok=0, bad=1, near=0, wait=5),
    first(
        "OperatorEventsLost", operator("esper_events_total", outcome="dropped"), 15, known=True,
        near=(_once(operator("esper_events_total", outcome="repeated")),),
    ),
    Case(
        alert="EsperRunsFailed",
        series={_FAILED_RUNS: hold((2, 20), (3, 40))},
        quiet=(19,),
        fires=(21, 33),
        clears=36,
        near=({_FAILED_RUNS: hold((2, 60))}, {_FAILED_RUNS: hold((2, 20), (1, 40))}),
        near_at=(21, 33),
    ),
)  # fmt: skip


OBJECTIVES = (
    Case(
        alert="SLOBurnFast",
        series=_boundaries((0, 120), (1, 20), (0, 60)),
        quiet=(119, 124),
        fires=(133, 140),
        clears=147,
        near=(_boundaries((0, 120), (1, 6), (0, 60)), _boundaries((0.1, 190))),
        near_at=(125, 127, 180),
    ),
    Case(
        alert="SLOBurnSlow",
        series=_boundaries((0, 400), (0.5, 60), (0, 90)),
        quiet=(399, 420),
        fires=(455, 460),
        clears=492,
        near=(_boundaries((0, 400), (0.5, 30), (0, 90)), _boundaries((0.05, 520))),
        near_at=(425, 432, 500),
    ),
)

CASES: dict[str, tuple[Case, ...]] = {
    "esper-training": TRAINING,
    "esper-recovery": RECOVERY,
    "esper-sidecars": SIDECARS,
    "esper-bus": BUS,
    "esper-operator": OPERATOR,
    "esper-objectives": OBJECTIVES,
}
"""By the name of the rules' group."""
