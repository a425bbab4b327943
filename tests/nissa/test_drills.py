"""A slice of the drills: two real faults in one real run, and what the drills do to the rules' clock.

All of them: `make drills`.
"""

from pathlib import Path

import pytest
import yaml
from esper_runtime.nissa.alerts import ALERTS, GROUPS

from tests.drills import rules
from tests.drills.__main__ import DRILLS
from tests.drills.drill import finish, play
from tests.drills.stage import Run, staged
from tests.nissa.scene import RULES
from tests.support.prometheus import MISSING, tool

SLICE = ("false-command", "halt")
EPOCHS = 40


@pytest.mark.row("K46")
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(tool("prometheus") is None, reason=MISSING)
def test_alerts_tell_of_real_faults_and_nothing_is_lost(tmp_path: Path) -> None:
    undisturbed = Run(tmp_path / "undisturbed", epochs=EPOCHS)
    try:
        undisturbed.hurry()
        undisturbed.start()
        with staged(tmp_path, Run(tmp_path / "drilled", epochs=EPOCHS)) as stage:
            for drill in DRILLS:
                if drill.name in SLICE:
                    result = play(drill, stage)
                    assert set(result.fired_s) == set(result.cleared_s) == set(drill.alerts)
            undisturbed.finish()
            end = finish(stage, undisturbed.final())
        assert (end.steps, end.left_out) == (EPOCHS * 20, 0)
    finally:
        undisturbed.close()


def test_drills_have_names_of_their_own_and_alerts_that_exist() -> None:
    assert len({drill.name for drill in DRILLS}) == len(DRILLS)
    known = {alert.name for alert in ALERTS}
    for drill in DRILLS:
        assert drill.alerts
        assert set(drill.alerts) | set(drill.threshold_s) <= known, drill.name
        assert drill.same_end is not bool(drill.why_other_end)


@pytest.mark.parametrize(
    ("duration", "shorter"), [("2m", "4000ms"), ("15s", "500ms"), ("0s", "0s"), ("1h", "120000ms")]
)
def test_a_duration_is_divided(duration: str, shorter: str) -> None:
    assert rules.shortened(duration, 30) == shorter


def test_durations_are_shortened_and_nothing_else() -> None:
    shipped = """
groups:
- name: g
  interval: 15s
  rules:
  - record: a:rate5m
    expr: rate(a[5m]) - a offset 10m > 60
  - alert: A
    expr: deriv(b{x="5m"}[5m:15s]) > 1
    for: 2m
    labels: {severity: warning}
"""
    (group,) = yaml.safe_load(rules.quickened(shipped, 30))["groups"]
    recording, alert = group["rules"]
    assert recording == {"record": "a:rate5m", "expr": "rate(a[10000ms]) - a offset 20000ms > 60"}
    assert alert["expr"] == 'deriv(b{x="5m"}[10000ms:500ms]) > 1'
    assert (alert["for"], alert["labels"]) == ("4000ms", {"severity": "warning"})


def test_the_shipped_rules_stay_the_same_rules(tmp_path: Path) -> None:
    """By name, severity and threshold."""
    assert len(rules.write(RULES, tmp_path)) == len(GROUPS)
    for path in RULES.glob("*.yaml"):
        (shipped,), (quick,) = (
            yaml.safe_load((place / path.name).read_text())["groups"] for place in (RULES, tmp_path)
        )
        for one, other in zip(shipped["rules"], quick["rules"], strict=True):
            assert {**one, "expr": "", "for": ""} == {**other, "expr": "", "for": ""}
            assert one["expr"].rpartition(" ")[2] == other["expr"].rpartition(" ")[2] or "[" in one["expr"]
