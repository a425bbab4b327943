"""Prometheus' own tool: rules that it accepts, alerts that fire when they should, not else, and that clear."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from esper_runtime.nissa.alerts import GROUPS

from tests.nissa.cases import CASES, Case, Series
from tests.support.prometheus import MISSING, tool

RULES = Path(__file__).resolve().parents[2] / "charts/esper/rules"
PROMTOOL = tool("promtool")
NAMES = [group.name for group in GROUPS]

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason=MISSING)


def promtool(*words: str) -> None:
    done = subprocess.run([str(PROMTOOL), *words], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def group_of_tests(name: str, alert: str, series: Series, expected: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """`expected`: (minute, whether it fires). ALERTS is read, so that the alert's words need not be repeated."""
    firing = f'clamp_max(count(ALERTS{{alertname="{alert}",alertstate="firing"}}), 1) or vector(0)'
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": " ".join(map(str, values))} for key, values in series.items()],
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": value}]}
            for minute, value in expected
        ],
    }


def cases_of(case: Case) -> Iterable[dict[str, Any]]:
    timeline = [*((m, 0) for m in case.quiet), *((m, 1) for m in case.fires), (case.clears, 0)]
    yield group_of_tests(f"{case.alert} fires and clears", case.alert, case.series, timeline)
    for number, series in enumerate(case.near):
        yield group_of_tests(f"{case.alert} near {number}", case.alert, series, [(m, 0) for m in case.near_at])


@pytest.mark.row("K46")
def test_every_alert_has_its_case() -> None:
    for group in GROUPS:
        assert [case.alert for case in CASES[group.name]] == [alert.name for alert in group.alerts]
    for case in (case for cases in CASES.values() for case in cases):
        assert case.quiet
        assert case.fires
        assert case.near
        assert max(case.quiet) < min(case.fires) <= max(case.fires) < case.clears


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    promtool("check", "rules", *(str(path) for path in sorted(RULES.glob("*.yaml"))))


@pytest.mark.row("K46")
@needs_promtool
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
def test_alerts_fire_when_they_should_and_only_then(name: str, tmp_path: Path) -> None:
    # Evaluated once a minute, like the cases are told, which takes a quarter of the time.
    slower = re.sub(r"^  interval: \w+$", "  interval: 1m", (RULES / f"{name}.yaml").read_text(), flags=re.M)
    assert "interval: 1m" in slower
    (tmp_path / "rules.yaml").write_text(slower)
    written = tmp_path / "tests.yaml"
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [test for case in CASES[name] for test in cases_of(case)],
    }
    written.write_text(yaml.safe_dump(document, sort_keys=False))
    promtool("test", "rules", str(written))


@needs_promtool
def test_a_description_has_the_value_and_what_to_do(tmp_path: Path) -> None:
    """Of one alert, word by word, so that the templates are known to be filled in."""
    labels = {"attempt": "1", "container": "tolaria", "namespace": "ml", "pod": "p", "rank": "0", "run": "digits"}
    matchers = ",".join([f'{key}="{value}"' for key, value in labels.items()])
    series = f"esper_tolaria_checkpoint_age_s{{{matchers}}}"
    expected = {
        "exp_labels": {**labels, "severity": "warning"},
        "exp_annotations": {
            "summary": "The newest checkpoint of ml/digits is more than an hour old",
            "description": (
                "It is 1h 1m 40s old. If `periodSeconds` is meant to be so long, silence this; else see why saves fail"
                " or never fall due."
            ),
            "dashboard": "run/checkpoint-age",
            "runbook_url": "docs/reference/alerts.md#tolariacheckpointold",
        },
    }
    document = {
        "rule_files": [str(RULES / "esper-recovery.yaml")],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": "3700x20"}],
                "alert_rule_test": [
                    {"eval_time": "10m", "alertname": "TolariaCheckpointOld", "exp_alerts": [expected]}
                ],
            }
        ],
    }
    written = tmp_path / "words.yaml"
    written.write_text(yaml.safe_dump(document))
    promtool("test", "rules", str(written))
