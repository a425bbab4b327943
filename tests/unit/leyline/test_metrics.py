"""The catalogue of metrics: names that keep to the rules, labels with a bound, a page that says the same."""

import re
from pathlib import Path

import pytest
from esper_leyline import metrics
from esper_leyline.metrics import CATALOGUE, NISSA, OF_PODS, OPERATOR, Metric, MetricKind

ROOT = Path(__file__).resolve().parents[3]
UNBOUNDED = {"run", "namespace", "pod", "node", "uid", "id", "step"}
SCRAPED = {"job", "instance", "namespace", "run", "attempt", "rank", "pod", "container"}
"""Labels that scraping adds; an own label of that name would be renamed to exported_*."""
NAMED_BEFORE_THE_RULE = {"tolaria.epochs.total", "tolaria.epochs.failed"}


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_a_metric_keeps_to_the_rules(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", metric.name)
    assert re.fullmatch(r"esper_[a-z0-9_]+", metric.prometheus)
    if metric.name not in NAMED_BEFORE_THE_RULE:
        assert (metric.kind is MetricKind.COUNTER) == metric.name.endswith("_total")
    assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.unit
    assert metric.text
    assert not metric.text.endswith(".")
    assert not (UNBOUNDED | SCRAPED) & set(metric.labels)
    assert all(len(values) == len(metric.labels) for values in metric.known)
    assert len(set(metric.known)) == len(metric.known) <= 64


def test_no_name_is_given_twice() -> None:
    series = [name for metric in CATALOGUE for name in metric.series]
    assert len(set(series)) == len(series)
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE) == len(OF_PODS) + len(OPERATOR) + len(NISSA)


def test_the_page_has_a_row_for_each() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert page == metrics.reference()
    assert [m.name for m in CATALOGUE if f"| `{m.name}` | `{m.prometheus}` | {m.kind} |" not in page] == []


_OF_THE_DESIGN = """
kasmina.command_verifier.accepted_total kasmina.command_verifier.rejections_total
kasmina.command_verifier.validation_latency_ms kasmina.nonce_ledger.size kasmina.nonce_ledger.evictions_total
kasmina.nonce_ledger.ttl_seconds oona.publish_total oona.publish_latency_ms oona.message_publish_duration_ms
oona.queue.depth oona.oldest_pending_age_s oona.backpressure.level
weatherlight.uptime_s weatherlight.restarts_total weatherlight.system_mode weatherlight.emergency.latency_ms
weatherlight.emergency.detections_total
"""
"""Names of the design whose values exist. Never shorter."""


@pytest.mark.row("K44")
def test_no_metric_that_there_was_is_gone_or_another() -> None:
    """Dashboards and rules of others read them. Golden lines are only added, by scripts/generate."""
    golden = (ROOT / "tests/golden/metrics.txt").read_text().splitlines()
    assert set(golden) == set(metrics.names())


@pytest.mark.row("K44")
def test_names_of_the_design_stay() -> None:
    names = {metric.name for metric in CATALOGUE}
    assert [name for name in _OF_THE_DESIGN.split() if name not in names] == []
