"""Rules, objectives and dashboards against the catalogue of metrics, and against each other."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from esper_leyline.metrics import CATALOGUE, Metric
from esper_runtime.nissa import grafana, promql, reference, rules, series
from esper_runtime.nissa.alerts import ALERTS, GROUPS, RECORDINGS
from esper_runtime.nissa.dashboards import DASHBOARDS, panel
from esper_runtime.nissa.model import Alert, Dashboard, Panel
from esper_runtime.nissa.slos import SLOS, error_ratio

ROOT = Path(__file__).resolve().parents[2]
KNOWN = series.known(RECORDINGS)
TEMPLATE = re.compile(r"\{\{\s*\$labels\.(\w+)\s*\}\}")
PANELS = [(name, each) for name, dashboard in DASHBOARDS.items() for each in dashboard.panels]
MAX_EMPTY = 4


def named(value: object) -> str:
    return str(getattr(value, "name", getattr(value, "key", value)))


def read_by(each: Panel) -> set[str]:
    return {s.series for query in each.queries for s in promql.selectors(query.expr)}


# Alerts


@pytest.mark.row("K46")
@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_an_alert_reads_what_is_exported(alert: Alert) -> None:
    assert series.problems(alert.expr, KNOWN) == []


@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_an_alert_says_what_is_and_what_to_do(alert: Alert) -> None:
    for text in (alert.summary, alert.value, alert.action, alert.cause):
        assert text == text.strip()
        assert text
    assert "$value" in alert.value
    assert not alert.summary.endswith(".")
    assert all(text.endswith((".", "?")) for text in (alert.value, alert.action, alert.cause))
    there = set().union(*(KNOWN[s.series] for s in promql.selectors(alert.expr)))
    assert set(TEMPLATE.findall(alert.summary + alert.value)) <= there
    if grouped := promql.groupings(alert.expr):
        assert set(TEMPLATE.findall(alert.summary + alert.value)) <= grouped


@pytest.mark.parametrize("alert", ALERTS, ids=named)
def test_an_alert_has_a_panel_that_shows_what_it_reads(alert: Alert) -> None:
    assert read_by(panel(alert.panel)) & {s.series for s in promql.selectors(alert.expr)}


def test_names_are_unique_and_the_older_ones_stay() -> None:
    names = [alert.name for alert in ALERTS]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    older = """
    TrainingLatencyHigh TolariaGraphStageCopySlow TolariaGraphCaptureWarning TolariaGraphCaptureCritical
    TolariaGraphReplaySlow TolariaGraphFallback KasminaCommandRejected KasminaAuthorityLost OonaPublishDropped
    OonaQueueDepthHigh WeatherlightDegraded WeatherlightEmergencyHalt EmergencyBroadcastSlow SLOBurnFast SLOBurnSlow
    """
    assert [name for name in older.split() if name not in names] == []


# Objectives and recorded series


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: f"{recording.record} {recording.labels}")
def test_a_recorded_series_reads_what_is_exported(recording: object) -> None:
    assert series.problems(recording.expr, KNOWN) == []  # type: ignore[attr-defined]


def test_every_objective_is_measured_by_a_bound_that_the_histogram_has() -> None:
    """A missing bucket would read as: all events are bad."""
    by_series = {name: metric for metric in CATALOGUE for name in metric.series}
    for slo in SLOS:
        (good,) = promql.selectors(slo.good)
        metric: Metric = by_series[good.series]
        if metric.buckets:
            (bound,) = re.findall(r'le="([^"]+)"', slo.good)
            assert float(bound) in metric.buckets, slo.name
        assert 0.5 < slo.objective < 1
        assert 14.4 * (1 - slo.objective) < 1, "a burn that no ratio reaches would never be told"


def test_every_objective_has_a_panel() -> None:
    """By the recorded ratio, which has one line for each."""
    assert error_ratio("1h") in read_by(panel("overview/slo-burn"))
    assert {r.labels["slo"] for r in RECORDINGS if r.record == error_ratio("1h")} == {slo.name for slo in SLOS}


# Dashboards


@pytest.mark.row("K45")
@pytest.mark.parametrize(("name", "each"), PANELS, ids=named)
def test_a_panel_reads_what_is_exported(name: str, each: Panel) -> None:
    for query in each.queries:
        assert series.problems(query.expr, KNOWN) == [], query.expr
        if name == "run":
            for selector in promql.selectors(query.expr):
                assert {"namespace", "run"} <= selector.labels, "the panel would show other runs too"


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=lambda dashboard: dashboard.uid)
def test_panels_do_not_overlap_and_have_keys_of_their_own(dashboard: Dashboard) -> None:
    assert len({each.key for each in dashboard.panels}) == len(dashboard.panels)
    drawn = json.loads(grafana.render(dashboard))["panels"]
    cells = Counter(
        (x, y)
        for p in drawn
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < grafana.WIDTH
    assert len({p["id"] for p in drawn}) == len(drawn)


def test_hardly_any_panel_may_be_empty() -> None:
    assert len([each.key for _, each in PANELS if each.expected_empty]) <= MAX_EMPTY


# The scan of PromQL itself


def test_the_scan_finds_series_and_labels() -> None:
    expr = (
        'histogram_quantile(0.9, sum by (leg, le) (rate(a_bucket{x=~"b|c{d}",y!="z"}[5m])))'
        " and on (ns) (b:c:d offset 5m or 0 * e) > 1.5e3 unless f"
    )
    found = promql.selectors(expr)
    assert [(s.series, sorted(s.labels)) for s in found] == [
        ("a_bucket", ["x", "y"]), ("b:c:d", []), ("e", []), ("f", []),
    ]  # fmt: skip
    assert promql.groupings(expr) == {"leg", "le", "ns"}


@pytest.mark.row("K45")
@pytest.mark.parametrize(
    ("expr", "words"),
    [("rate(esper_nothing_total[5m])", "exported by nobody"), ('esper_leader{pot="x"}', "no label pot"),
     ("sum by (phase) (esper_leader)", "has the label phase")],
)  # fmt: skip
def test_the_scan_tells_what_does_not_exist(expr: str, words: str) -> None:
    (problem,) = series.problems(expr, KNOWN)
    assert words in problem


# What is made of it


def test_the_files_are_current() -> None:
    chart = ROOT / "charts/esper"
    for group in GROUPS:
        text = (chart / f"rules/{group.name}.yaml").read_text()
        assert text.endswith(rules.render(group))
        assert yaml.safe_load(text)["groups"][0]["name"] == group.name
    for name, dashboard in DASHBOARDS.items():
        assert (chart / f"dashboards/{name}.json").read_text() == grafana.render(dashboard)
    assert {p.stem for p in (chart / "rules").iterdir()} == {group.name for group in GROUPS}
    assert {p.stem for p in (chart / "dashboards").iterdir()} == set(DASHBOARDS)


def test_every_alert_has_its_section_on_the_page() -> None:
    page = (ROOT / "docs/reference/alerts.md").read_text()
    assert page == reference.reference()
    assert [alert.name for alert in ALERTS if f"\n## {alert.name}\n" not in page] == []
    assert "$labels" not in page.replace("```promql", "")
