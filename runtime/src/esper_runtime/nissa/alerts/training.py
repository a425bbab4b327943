"""Of training itself: the boundary, the modes, the features of the device."""

from esper_runtime.nissa.expressions import grew, since
from esper_runtime.nissa.model import Alert, Group, Recording, Severity

_RUN = "{{ $labels.namespace }}/{{ $labels.run }}"

GOODPUT = Recording(
    record="esper:goodput:ratio5m",
    expr=(
        "min by (namespace, run) (clamp("
        "deriv((esper_tolaria_trainer_step > 0)[5m:15s]) * esper_tolaria_train_step_ms / 1000, 0, 1))"
    ),
    of=("namespace", "run"),
)
"""Steps that stay, times what a step takes: 1 while training does nothing but train; a rollback gives steps back, and
whatever stands still gains none. A heartbeat that has not come yet reads as step 0 and is left out."""

SLOW_BOUNDARIES = Recording(
    record="esper:boundaries_slow:total",
    expr=('esper_tolaria_boundary_total_ms_count - ignoring (le) esper_tolaria_boundary_total_ms_bucket{le="18"}'),
    of=("namespace", "run", "attempt", "rank", "pod", "container", "instance", "job"),
)
"""Boundaries over 18 ms since the trainer began."""
_SLOW = since(SLOW_BOUNDARIES.record, "5m")
_ALL = since("esper_tolaria_boundary_total_ms_count", "5m")

_BOUNDARY = (
    Alert(
        name="TrainingLatencyHigh",
        # Counted, not read off the last value: after three the breaker leaves the slow sidecar alone.
        expr=f"{_SLOW} >= 3 and {_SLOW} > 0.5 * {_ALL}",
        severity=Severity.CRITICAL,
        summary=f"Boundaries of {_RUN} are over their 18 ms",
        value="{{ $value | humanize }} within five minutes, which is most of them.",
        action="Look which part is over its own budget (boundary time by part), then at that sidecar's CPU.",
        cause=(
            "At least three epoch boundaries within five minutes, and most, took longer than 18 ms. Tamiyo or Kasmina "
            "answer slowly, most often because their CPU request is too small for a busy node."
        ),
        panel="run/breaches",
    ),
    Alert(
        name="TolariaTamiyoTimeouts",
        expr=f"{since('esper_tolaria_timeout_tamiyo_total', '10m')} >= 3",
        severity=Severity.WARNING,
        summary=f"Tamiyo does not answer {_RUN} in time",
        value="{{ $value | humanize }} calls were given up within ten minutes.",
        action="Read the log of container tamiyo; training goes on without its advice.",
        cause="Calls to Tamiyo passed the hard deadline. The run trains on without it.",
        panel="run/timeouts",
    ),
    Alert(
        name="TolariaKasminaTimeouts",
        expr=f"{since('esper_tolaria_timeout_kasmina_total', '10m')} >= 3",
        severity=Severity.WARNING,
        summary=f"Kasmina does not answer {_RUN} in time",
        value="{{ $value | humanize }} calls were given up within ten minutes.",
        action="Read the log of container kasmina; no command takes effect meanwhile.",
        cause="Calls to Kasmina passed the hard deadline. Commands that nobody verified are not carried out.",
        panel="run/timeouts",
    ),
    Alert(
        name="TolariaEpochsFail",
        expr=grew("esper_tolaria_epochs_failed", "15m"),
        severity=Severity.WARNING,
        summary=f"Boundaries of {_RUN} fail",
        value="{{ $value | humanize }} within fifteen minutes.",
        action="`esper report` names the epoch and the reason.",
        cause="What a boundary set out to do failed and was undone. The epoch itself is trained.",
        panel="run/epochs",
    ),
    Alert(
        name="TolariaBreakerOpen",
        expr="esper_tolaria_breaker_state == 2",
        wait="1m",
        severity=Severity.WARNING,
        summary=f"Breaker {{{{ $labels.name }}}} of {_RUN} is open",
        value="State {{ $value | humanize }}: what it guards is not tried.",
        action="Mend what the breaker is named after; it tries again by itself.",
        cause="What the breaker guards failed several times in a row, so it is left out for a while.",
        panel="run/breakers",
    ),
    Alert(
        name="TolariaConservativeMode",
        expr="esper_tolaria_mode_conservative == 1",
        wait="5m",
        severity=Severity.WARNING,
        summary=f"{_RUN} has been in conservative mode for five minutes",
        value="The mode is {{ $value | humanize }}: only what is needed to train is done.",
        action="See the run's Events and breakers for why; it ends with its cause.",
        cause="A breaker is open, the emergency level is 3, or Tamiyo advised it.",
        panel="run/emergency",
    ),
    Alert(
        name="TolariaEmergencyHalt",
        expr="esper_tolaria_emergency_halt == 1",
        severity=Severity.CRITICAL,
        summary=f"{_RUN} has halted by its own decision",
        value="Emergency halt is {{ $value | humanize }}; the level is 4.",
        action="Read status.history and the report, mend the cause, then clear the halt.",
        cause="The emergency level reached 4: training could not be made sound again by rolling back.",
        panel="run/emergency",
    ),
    Alert(
        name="TolariaLearningRateTampered",
        expr=grew("esper_tolaria_lr_violations_total", "15m"),
        severity=Severity.WARNING,
        summary=f"Something changes learning rates of {_RUN}",
        value="{{ $value | humanize }} within fifteen minutes; each was put back.",
        action="Let only the schedule write `lr`: look for a second scheduler in the workload.",
        cause="A group's learning rate was not what the schedule had written.",
        panel="run/learning-rate",
    ),
    Alert(
        name="TolariaRebuildFailed",
        expr=grew("esper_tolaria_opt_rebuild_failures_total", "15m"),
        severity=Severity.WARNING,
        summary=f"An optimizer of {_RUN} could not be rebuilt",
        value="{{ $value | humanize }} within fifteen minutes; the old one was kept.",
        action="Read the notice OptimizerRebuildFailed in the run's record.",
        cause="A rebuild that was asked for raised an error.",
        panel="run/optimizer",
    ),
    Alert(
        name="TolariaTelemetryDropped",
        expr=grew("esper_tolaria_telemetry_dropped_total", "15m"),
        severity=Severity.WARNING,
        summary=f"Telemetry of {_RUN} is dropped",
        value="{{ $value | humanize }} of priority {{ $labels.priority }} within fifteen minutes.",
        action="The checkpoint volume is slow, or a label has too many values; training is not touched.",
        cause="A bound was reached: of lines that wait for the record, or of series of one metric.",
        panel="run/telemetry-dropped",
    ),
)


def _graphs(name: str, metric: str, over: str, limit: float, wait: str, severity: Severity, what: str) -> Alert:
    return Alert(
        name=name,
        expr=f"avg_over_time(esper_tolaria_graph_{metric}_ms[{over}]) > {limit:g}",
        wait=wait,
        severity=severity,
        summary=f"CUDA graphs of {_RUN}: {what} is slow",
        value=f"On average {{{{ $value | humanize }}}} ms, more than {limit:g}.",
        action="Compare with the run without `cudaGraphs`; another process may use the device.",
        cause=f"The {what} takes longer than {limit:g} ms on average over {over}.",
        panel="run/graphs",
    )


_GRAPHS = (
    _graphs("TolariaGraphStageCopySlow", "stage_copy", "1m", 0.5, "2m", Severity.WARNING, "stage copy"),
    _graphs("TolariaGraphCaptureWarning", "capture", "1m", 200, "1m", Severity.WARNING, "capture"),
    _graphs("TolariaGraphCaptureCritical", "capture", "5m", 1000, "2m", Severity.CRITICAL, "capture"),
    _graphs("TolariaGraphReplaySlow", "replay", "1m", 0.5, "2m", Severity.WARNING, "replay"),
    Alert(
        name="TolariaGraphFallback",
        expr="max_over_time(esper_tolaria_train_graph_enabled[5m]) == 1 and esper_tolaria_train_graph_enabled == 0",
        severity=Severity.CRITICAL,
        summary=f"CUDA graphs of {_RUN} were given up",
        value="They were on ({{ $value | humanize }}) within the last five minutes and are off.",
        action="Read the event tolaria.graph_fallback in the record; the run is correct, and slower.",
        cause="A capture or replay failed, or a batch had another shape.",
        panel="run/features",
    ),
)

TRAINING = Group(
    name="esper-training", interval="15s", recordings=(GOODPUT, SLOW_BOUNDARIES), alerts=(*_BOUNDARY, *_GRAPHS)
)
