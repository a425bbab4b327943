"""Metrics are data: what is counted is declared, what is declared is counted, and the page says both."""

import ast
import re
from pathlib import Path

import pytest
from esper_operator import metrics
from esper_operator.metrics import METRICS, Metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "operator/src/esper_operator"
UNBOUNDED = {"run", "name", "namespace", "pod", "node", "uid"}

_VALUES = {"count": 0, "gauge": 1, "observe": 1, "follow": 1}
"""Methods that take the name of a metric, and their arguments besides that and the labels."""


def used() -> dict[str, set[int]]:
    """Names of metrics in calls of the operator's code, with the number of labels given."""
    found: dict[str, set[int]] = {}
    for path in SOURCE.rglob("*.py"):
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            first = call.args[0] if call.args else None
            method = ast.unparse(call.func).rpartition(".")[2]
            if method in _VALUES and isinstance(first, ast.Constant) and str(first.value).startswith("esper_"):
                value = _VALUES[method]
                found.setdefault(str(first.value), set()).add(len(call.args) - 1 - value)
    return found


def test_what_is_counted_is_declared_and_what_is_declared_is_counted() -> None:
    declared = {metric.name: {len(metric.labels)} for metric in METRICS}
    assert used() == declared


def test_names_follow_the_rules_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"esper_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert metric.help.endswith(".")
        assert not UNBOUNDED & set(metric.labels)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_each_metric_is_exposed_under_its_name() -> None:
    known = Metrics()
    for metric in METRICS:
        labels = tuple("x" for _ in metric.labels)
        match metric.kind:
            case "counter":
                known.count(metric.name, *labels)
            case "gauge":
                known.gauge(metric.name, 1, *labels)
            case "histogram":
                known.observe(metric.name, 1, *labels)
    text = generate_latest(known.registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    exposed = {name for name in families if not name.endswith("_created")}
    assert exposed == {metric.name.removesuffix("_total") for metric in METRICS}


def test_a_metric_that_is_not_declared_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Metrics().count("esper_unheard_of_total")


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert page == metrics.reference()
    assert all(f"| `{metric.name}` | {metric.kind} |" in page for metric in METRICS)
