"""Metrics are data: what is counted is declared, what is declared is counted."""

import ast
import re
from pathlib import Path

import pytest
from esper_leyline.metrics import OPERATOR
from esper_operator.metrics import Metrics
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
    declared = {metric.prometheus: {len(metric.labels)} for metric in OPERATOR}
    assert used() == declared


def test_names_follow_the_rules_of_prometheus() -> None:
    for metric in OPERATOR:
        assert re.fullmatch(r"esper_[a-z_]+", metric.prometheus)
        assert (metric.kind == "counter") == metric.prometheus.endswith("_total")
        assert metric.kind != "histogram" or metric.prometheus.endswith("_seconds")
        assert metric.help.endswith(".")
        assert not UNBOUNDED & set(metric.labels)
    assert len({metric.prometheus for metric in OPERATOR}) == len(OPERATOR)


def test_each_metric_is_exposed_under_its_name() -> None:
    known = Metrics()
    for metric in OPERATOR:
        labels = tuple("x" for _ in metric.labels)
        match metric.kind:
            case "counter":
                known.count(metric.prometheus, *labels)
            case "gauge":
                known.gauge(metric.prometheus, 1, *labels)
            case "histogram":
                known.observe(metric.prometheus, 1, *labels)
    text = generate_latest(known.registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    exposed = {name for name in families if not name.endswith("_created")}
    assert exposed == {metric.prometheus.removesuffix("_total") for metric in OPERATOR}


def test_a_metric_that_is_not_declared_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Metrics().count("esper_unheard_of_total")


def test_series_that_are_known_beforehand_are_there_from_the_start() -> None:
    """An alert on the first of its kind needs a 0 before the 1."""
    text = generate_latest(Metrics().registry).decode()
    assert 'esper_reconcile_total{result="bug"} 0.0' in text
    assert 'esper_reports_total{outcome="forged",way="pull"} 0.0' in text
    assert 'esper_emergency_signal_seconds_count{leg="bus"} 0.0' in text


def test_outcomes_that_are_counted_are_those_that_are_known() -> None:
    """A word in the catalogue that no code says would be a panel that never shows anything."""
    sources = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for metric in OPERATOR:
        for values in metric.known:
            for value in values:
                assert f'"{value}"' in sources, f"{metric.prometheus}: {value}"
