"""Objectives: good of all events, how fast the error budget burns, and how much of it is left.

Burn rates follow the usual pair of windows: 14.4 times over an hour and five minutes eats 2 % of a month's budget in an
hour; 6 times over six hours and half an hour eats 5 % in six.
"""

from esper_runtime.nissa.model import Alert, Group, Recording, Severity, Slo

SLOS = (
    Slo(
        name="boundary",
        text="Epoch boundaries take at most 18 ms",
        objective=0.99,
        good='sum(rate(esper_tolaria_boundary_total_ms_bucket{le="18"}[$window]))',
        total="sum(rate(esper_tolaria_boundary_total_ms_count[$window]))",
    ),
    Slo(
        name="command-apply",
        text="Commands are carried out within 30 ms",
        objective=0.99,
        good='sum(rate(esper_tolaria_boundary_apply_ms_bucket{le="30"}[$window]))',
        total="sum(rate(esper_tolaria_boundary_apply_ms_count[$window]))",
    ),
    Slo(
        name="rollback",
        text="Restores take at most 500 ms",
        objective=0.99,
        good='sum(rate(esper_tolaria_rollback_duration_ms_bucket{le="500"}[$window]))',
        total="sum(rate(esper_tolaria_rollback_duration_ms_count[$window]))",
    ),
    Slo(
        name="emergency-broadcast",
        text="A leg of an emergency signal is sent within 100 ms",
        objective=0.999,
        good='sum(rate(esper_emergency_signal_seconds_bucket{le="0.1"}[$window]))',
        total="sum(rate(esper_emergency_signal_seconds_count[$window]))",
    ),
    Slo(
        name="publish",
        text="Redis takes what is published",
        objective=0.999,
        good='sum(rate(esper_weatherlight_publications_total{outcome="published"}[$window]))',
        total="sum(rate(esper_weatherlight_publications_total[$window]))",
    ),
)
WINDOWS = ("5m", "30m", "1h", "6h")
OBJECTIVE = "esper_slo:objective"
BUDGET = "esper_slo:budget_left:30d"


def error_ratio(window: str) -> str:
    return f"esper_slo:error_ratio:rate{window}"


def _recordings(slo: Slo) -> tuple[Recording, ...]:
    labels = {"slo": slo.name}
    ratios = (
        Recording(
            record=error_ratio(window),
            # An empty window has no ratio: nothing was asked, so nothing was late.
            expr=f"1 - {slo.good.replace('$window', window)} / ({slo.total.replace('$window', window)} > 0)",
            labels=labels,
        )
        for window in WINDOWS
    )
    return Recording(record=OBJECTIVE, expr=f"vector({slo.objective:g})", labels=labels), *ratios


_BUDGET = Recording(
    record=BUDGET,
    expr=f"1 - avg_over_time({error_ratio('1h')}[30d]) / (1 - {OBJECTIVE})",
    of=("slo",),
)


def _burn(name: str, factor: float, long: str, short: str, severity: Severity, panel: str) -> Alert:
    limit = f"{factor:g} * (1 - {OBJECTIVE})"
    return Alert(
        name=name,
        expr=f"{error_ratio(long)} > {limit} and {error_ratio(short)} > {limit}",
        severity=severity,
        summary="The error budget of {{ $labels.slo }} burns",
        value=f"{{{{ $value | humanizePercentage }}}} of the last {long} were not as good as promised.",
        action="See the objective's own metrics on the dashboards; the table of objectives says which they are.",
        cause=f"Over {long} and over {short} the budget went {factor:g} times as fast as a month of it would last.",
        panel=f"overview/{panel}",
    )


OBJECTIVES = Group(
    name="esper-objectives",
    interval="30s",
    recordings=(*(recording for slo in SLOS for recording in _recordings(slo)), _BUDGET),
    alerts=(
        _burn("SLOBurnFast", 14.4, "1h", "5m", Severity.CRITICAL, "slo-burn"),
        _burn("SLOBurnSlow", 6, "6h", "30m", Severity.WARNING, "slo-long"),
    ),
)
