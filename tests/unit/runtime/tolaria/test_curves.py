"""The judge as shipped, on loss curves recorded from real runs. tests/bench/bench_judge.py prints the whole table."""

import math

import pytest
from esper_leyline.runconfig import Health
from esper_runtime.tolaria.judge import Call, Judge

from tests.support.curves import BAND_STEPS, HOLD_STEPS, Curve, Label, first_alarm, left_its_band, load

CURVES = load()
CALM = [curve for curve in CURVES if curve.label.calm]
ILL = [curve for curve in CURVES if not curve.label.calm]


def alarm(curve: Curve, **health: object) -> int | None:
    judge = Judge(Health(**health))  # type: ignore[arg-type]

    def detect(step: int, loss: float, norm: float) -> bool:
        return judge.check(step, loss, norm * norm, lambda: math.isfinite(norm)).call is Call.BAD

    return first_alarm(curve, detect)


def test_the_record_is_wide_enough():
    counts = {label: sum(curve.label is label for curve in CURVES) for label in Label}
    assert min(counts.values()) >= 5
    assert len(CALM) >= 24
    assert len(ILL) >= 24
    assert min(min(curve.losses) for curve in CALM) < 0, "losses below zero"
    assert all(curve.trouble > 0 for curve in ILL)
    assert all(curve.trouble >= curve.cause for curve in ILL)


@pytest.mark.parametrize("curve", CALM, ids=[curve.name for curve in CALM])
def test_no_alarm_without_trouble(curve: Curve):
    assert alarm(curve) is None


@pytest.mark.parametrize("curve", CALM, ids=[curve.name for curve in CALM])
def test_the_gradient_alone_gives_no_alarm_without_trouble(curve: Curve):
    assert alarm(curve, loss_spike_action="Ignore", gradient_norm_action="Rollback") is None


@pytest.mark.row("T48")
@pytest.mark.parametrize("curve", ILL, ids=[curve.name for curve in ILL])
def test_trouble_is_seen_within_five_steps_of_its_beginning(curve: Curve):
    found = alarm(curve)
    assert not curve.false_alarm(found), f"alarm at step {found}, before the cause at {curve.cause}"
    assert curve.seen_in_time(found), f"alarm at step {found}, trouble began at {curve.trouble}"


@pytest.mark.parametrize("curve", ILL, ids=[curve.name for curve in ILL])
def test_the_gradient_alone_gives_no_alarm_before_the_cause(curve: Curve):
    assert not curve.false_alarm(alarm(curve, loss_spike_action="Ignore", gradient_norm_action="Rollback"))


def test_a_band_is_left_when_thirty_losses_stay_above_it():
    calm = [1.0, 2.0] * BAND_STEPS
    assert left_its_band((*calm, *([2.1] * HOLD_STEPS))) == len(calm) + 1
    assert left_its_band((*calm, *([2.1] * (HOLD_STEPS - 1)), 1.9)) == 0
    assert left_its_band((*calm, 2.1, 2.2, math.nan)) == len(calm) + 1
    assert left_its_band(tuple(calm)) == 0
