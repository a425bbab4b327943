"""One run: training, recovery, boundaries, sidecars."""

from esper_runtime.nissa.expressions import or_zero
from esper_runtime.nissa.model import Dashboard, Panel, Query, Row, Variable, View

_ONE = 'namespace="$namespace",run="$run"'
_LIVE = f"esper_tolaria_incarnation{{{_ONE}}}"
_NO_GPU = "CUDA graphs need a GPU"
_IN_MEMORY = "data that lie in memory are not waited for, and only a loader with workers measures it"


def _of(series: str, matchers: str = "") -> str:
    return f"{series}{{{_ONE}{',' + matchers if matchers else ''}}}"


def _q(series: str, legend: str) -> Query:
    return Query(_of(series), legend)


def _counter(series: str, legend: str) -> Query:
    """Of the trainer: 0 until it counts for the first time."""
    return Query(or_zero(_of(series), _LIVE), legend)


def _total(series: str, by: str, legend: str) -> Query:
    """A counter with labels; 0 for the whole run until it counts for the first time."""
    return Query(f"sum by ({by}) ({_of(series)}) or sum(0 * {_LIVE})", legend)


def _quantile(histogram: str, q: float, legend: str, by: str = "run") -> Query:
    rate = f"rate({_of(histogram + '_bucket')}[5m])"
    return Query(f"histogram_quantile({q:g}, sum by ({by}, le) ({rate}))", legend)


def _mean(part: str) -> Query:
    both = (f"sum by (run) (rate({_of(f'esper_tolaria_boundary_{part}_ms_{end}')}[5m]))" for end in ("sum", "count"))
    return Query(" / ".join(both), part)


_ROLLBACKS = or_zero(_of("esper_tolaria_rollbacks_initiated_total"), _LIVE)


def _number(key: str, title: str, query: Query, *, unit: str = "short", bad_from: float | None = None) -> Panel:
    return Panel(
        key=key, title=title, queries=(query,), view=View.NUMBER, width=4, height=4, unit=unit, bad_from=bad_from
    )


_HEAD = Row(
    title="Now",
    panels=(
        _number("step", "Step", Query(f"max({_of('esper_tolaria_trainer_step')})")),
        _number("loss-now", "Training loss", Query(f"max({_of('esper_tolaria_training_loss')})")),
        _number("goodput-now", "Goodput", Query(f"min({_of('esper:goodput:ratio5m')})"), unit="percentunit"),
        _number("rollbacks-now", "Rollbacks", Query(f"sum({_ROLLBACKS})")),
        _number("level-now", "Emergency level", Query(f"max({_of('esper_tolaria_emergency_level')})"), bad_from=3),
        _number("order-now", "Ordered stop", Query(f"max({_of('esper_weatherlight_emergency_mode')})"), bad_from=1),
    ),
)  # fmt: skip

_TRAINING = Row(
    title="Training",
    panels=(
        Panel(key="loss", title="Loss", log_scale=True,
              queries=(_q("esper_tolaria_training_loss", "training"),
                       _q("esper_tolaria_validation_loss", "validation"))),
        Panel(key="accuracy", title="Accuracy", unit="percentunit",
              queries=(_q("esper_tolaria_validation_accuracy", "validation"),)),
        Panel(key="goodput", title="Goodput", unit="percentunit",
              queries=(_q("esper:goodput:ratio5m", "goodput"),),
              text="Steps that stay, times what a step takes, over five minutes."),
        Panel(key="steps", title="Steps", queries=(_q("esper_tolaria_trainer_step", "rank {{rank}}"),)),
        Panel(key="epochs", title="Epochs",
              queries=(_q("esper_tolaria_epochs_total", "closed"), _counter("esper_tolaria_epochs_failed", "failed"))),
        Panel(key="speed", title="Samples per second",
              queries=(_q("esper_tolaria_train_samples_per_s", "rank {{rank}}"),)),
        Panel(key="step-time", title="Time of a step", unit="ms",
              queries=(_q("esper_tolaria_train_step_ms", "step"),)),
        Panel(key="input-wait", title="Wait for data per step", unit="ms", expected_empty=_IN_MEMORY,
              queries=(_q("esper_tolaria_train_input_wait_ms", "wait"),)),
        Panel(key="learning-rate", title="Learning rate", log_scale=True,
              queries=(_q("esper_tolaria_lr_controller_current_lr", "{{group}}"),
                       _counter("esper_tolaria_lr_violations_total", "foreign changes"))),
        Panel(key="gradient", title="Gradient: L2 norm",
              queries=(_q("esper_tolaria_grad_norm_l2", "norm"),)),
        Panel(key="memory", title="Memory", unit="bytes",
              queries=(Query(f"{_of('esper_tolaria_memory_usage_gb')} * 1024 ^ 3", "trainer"),
                       _q("esper_tolaria_rollback_fast_size_bytes", "snapshots"))),
        Panel(key="features", title="Features that are on",
              queries=tuple(_q(f"esper_tolaria_train_{name}", legend) for name, legend in (
                  ("compile_enabled", "torch.compile"), ("amp_enabled", "mixed precision"),
                  ("graph_enabled", "CUDA graphs"), ("foreach_enabled", "foreach"),
                  ("pin_memory", "pinned memory"), ("tf32_enabled", "TF32")))),
    ),
)  # fmt: skip

_RECOVERY = Row(
    title="Recovery",
    panels=(
        Panel(key="rollbacks", title="Rollbacks",
              queries=(_counter("esper_tolaria_rollbacks_initiated_total", "begun"),
                       _counter("esper_tolaria_rollbacks_succeeded_total", "done"))),
        Panel(key="restores", title="Restores by tier, result and reason",
              queries=(_total("esper_tolaria_rollback_attempts_total", "tier, result, reason",
                              "{{tier}} {{result}} {{reason}}"),)),
        Panel(key="restore-time", title="Time of the last restore; slow ones", unit="ms", bad_from=500,
              queries=(_q("esper_tolaria_rollback_restore_latency_ms", "last"),
                       Query(f"sum({_of('esper:rollbacks_slow:total')})", "slow, count"))),
        Panel(key="restore-failures", title="Restores that failed",
              queries=(_counter("esper_tolaria_rollback_failures_total", "failed"),
                       _counter("esper_tolaria_rollback_deadline_exceeded_total", "too late"))),
        Panel(key="halts", title="Halts",
              queries=(_counter("esper_tolaria_emergency_halts_total", "by its own decision"),
                       _q("esper_weatherlight_emergency_mode", "ordered: 1 freeze, 2 checkpoint, 3 kill"),
                       _q("esper_weatherlight_emergency_detections_total", "signals obeyed"))),
        Panel(key="emergency", title="Emergency level and conservative mode",
              queries=(_q("esper_tolaria_emergency_level", "level"),
                       _q("esper_tolaria_mode_conservative", "conservative"),
                       _q("esper_tolaria_emergency_halt", "halt"))),
        Panel(key="restarts", title="Trainer: starts, restarts, hangs",
              queries=(_q("esper_tolaria_trainer_starts_total", "starts"),
                       _q("esper_tolaria_in_place_restarts_total", "restarts"),
                       _q("esper_tolaria_hangs_total", "hangs"))),
        Panel(key="trainer-silent", title="Silence of the trainer", unit="s", bad_from=60,
              queries=(_q("esper_tolaria_trainer_silent_seconds", "supervisor"),
                       _q("esper_weatherlight_heartbeat_age_seconds", "weatherlight"))),
        Panel(key="snapshots", title="Snapshots in memory",
              queries=(_q("esper_tolaria_rollback_snapshots_total", "taken"),
                       _counter("esper_tolaria_rollback_snapshot_rejected_total", "refused"))),
        Panel(key="checkpoint-age", title="Age of the newest checkpoint", unit="s",
              queries=(_q("esper_tolaria_checkpoint_age_s", "age"),)),
        Panel(key="checkpoint-time", title="Time of the last save", unit="s",
              queries=(_q("esper_tolaria_checkpoint_duration_s", "save"),)),
        Panel(key="checkpoint-failures", title="Saves that failed",
              queries=(_counter("esper_tolaria_checkpoint_failures_total", "failed"),)),
    ),
)  # fmt: skip

_BOUNDARY = Row(
    title="Boundaries, breakers, modes",
    panels=(
        Panel(key="boundary-parts", title="Boundary time by part (mean)", unit="ms", stacked=True,
              queries=tuple(_mean(part) for part in ("assembly", "tamiyo", "apply", "guard"))),
        Panel(key="boundary", title="Boundary, whole", unit="ms", bad_from=18,
              queries=(_quantile("esper_tolaria_boundary_total_ms", 0.5, "half"),
                       _quantile("esper_tolaria_boundary_total_ms", 0.99, "slowest hundredth"),
                       _q("esper_tolaria_epoch_hook_latency_ms", "last"))),
        Panel(key="breaches", title="Boundaries over budget, by the guilty part",
              queries=(_total("esper_tolaria_boundary_breaches_total", "part", "{{part}}"),
                       Query(f"sum({_of('esper:boundaries_slow:total')})", "all over 18 ms"))),
        Panel(key="breakers", title="Breakers",
              queries=(_q("esper_tolaria_breaker_state", "{{name}}"),), text="1 closed, 2 open, 3 half-open."),
        Panel(key="timeouts", title="Calls given up",
              queries=(_counter("esper_tolaria_timeout_tamiyo_total", "tamiyo"),
                       _counter("esper_tolaria_timeout_kasmina_total", "kasmina"))),
        Panel(key="transitions", title="Changes of the emergency level",
              queries=(_total("esper_tolaria_emergency_transitions_total", "from, to, reason",
                              "{{from}} to {{to}}: {{reason}}"),)),
        Panel(key="optimizer", title="Rebuilds of the optimizer",
              queries=(_counter("esper_tolaria_opt_rebuilds_total", "done"),
                       _counter("esper_tolaria_opt_rebuild_failures_total", "failed"),
                       _counter("esper_tolaria_opt_rebuild_skipped_total", "refused"))),
        Panel(key="telemetry-dropped", title="Telemetry dropped, by priority",
              queries=(_total("esper_tolaria_telemetry_dropped_total", "priority", "{{priority}}"),)),
        Panel(key="graphs", title="CUDA graphs", unit="ms", expected_empty=_NO_GPU,
              queries=(_q("esper_tolaria_graph_capture_ms", "capture"), _q("esper_tolaria_graph_replay_ms", "replay"),
                       _q("esper_tolaria_graph_stage_copy_ms", "stage copy"))),
    ),
)  # fmt: skip

_SIDECARS = Row(
    title="Sidecars",
    panels=(
        Panel(key="containers", title="Containers that answer", queries=(_q("up", "{{container}}"),)),
        Panel(key="degraded", title="What does not work",
              queries=(_q("esper_weatherlight_degraded", "{{component}}"),
                       Query(_of("esper_weatherlight_system_mode", 'mode="degraded"'), "pod degraded"))),
        Panel(key="worker-restarts", title="Weatherlight: restarts",
              queries=(_q("esper_weatherlight_restarts_total", "restarts"),)),
        Panel(key="commands", title="Commands: accepted, refused by reason",
              queries=(_q("esper_kasmina_command_verifier_accepted_total", "accepted"),
                       _q("esper_kasmina_command_verifier_rejections_total", "{{reason}}"))),
        Panel(key="verification", title="Time to verify a command", unit="s",
              queries=(_quantile("esper_kasmina_command_verifier_validation_seconds", 0.99, "slowest hundredth"),)),
        Panel(key="nonces", title="Ledger of nonces",
              queries=(_q("esper_kasmina_nonce_ledger_size", "remembered"),
                       _q("esper_kasmina_nonce_ledger_evictions_total", "forgotten"))),
        Panel(key="decisions", title="Tamiyo: decisions, packets refused",
              queries=(_q("esper_tamiyo_decisions_total", "{{command_type}}"),
                       _q("esper_tamiyo_refused_packets_total", "refused packets"))),
        Panel(key="inference", title="Tamiyo: time to decide", unit="s",
              queries=(_quantile("esper_tamiyo_inference_seconds", 0.99, "slowest hundredth"),)),
        Panel(key="reports", title="Reports; given up; bytes skipped",
              queries=(_q("esper_weatherlight_reports_total", "{{event}}"),
                       _q("esper_weatherlight_reports_evicted_total", "given up"),
                       _q("esper_weatherlight_journal_skipped_bytes_total", "bytes skipped"))),
        Panel(key="publications", title="Publications by outcome",
              queries=(_q("esper_weatherlight_publications_total", "{{outcome}}"),)),
        Panel(key="publish-time", title="Time of a publication", unit="ms",
              queries=(_quantile("esper_oona_message_publish_duration_ms", 0.5, "half"),
                       _quantile("esper_oona_message_publish_duration_ms", 0.99, "slowest hundredth"))),
        Panel(key="spool", title="Reports that wait for Redis",
              queries=(_q("esper_weatherlight_spool_reports", "reports"),)),
        Panel(key="conservative", title="Publications held back",
              queries=(_q("esper_oona_conservative_mode", "1: the breaker is not closed"),)),
        Panel(key="telemetry", title="Telemetry by priority and outcome",
              queries=(_q("esper_weatherlight_telemetry_total", "{{priority}} {{outcome}}"),)),
        Panel(key="signals", title="Emergency signals; refused by reason",
              queries=(_q("esper_weatherlight_signals_total", "{{leg}} {{verdict}}"),
                       _q("esper_weatherlight_signals_rejected_total", "{{reason}}"))),
        Panel(key="signal-apply", title="From a signal's arrival to the page", unit="ms",
              queries=(_q("esper_weatherlight_emergency_latency_ms", "last"),)),
        Panel(key="sidecar-memory", title="Memory of the sidecars", unit="bytes",
              queries=(_q("process_resident_memory_bytes", "{{container}}"),)),
    ),
)  # fmt: skip

RUN = Dashboard(
    uid="esper-run",
    title="Esper / One run",
    text="Loss, rollbacks, halts, boundaries and goodput of one run. Generated; copy it to change it.",
    rows=(_HEAD, _TRAINING, _RECOVERY, _BOUNDARY, _SIDECARS),
    variables=(
        Variable(name="namespace", metric="esper_tolaria_incarnation", label="namespace"),
        Variable(name="run", metric="esper_tolaria_incarnation", label="run", matchers='namespace="$namespace"'),
    ),
)
