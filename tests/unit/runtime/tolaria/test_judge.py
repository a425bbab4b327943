import math
import statistics

import pytest
from esper_leyline.runconfig import Health
from esper_runtime.tolaria.judge import LEAST_DEVIATION, WARM_UP_STEPS, Call, Judge, LossWindow
from hypothesis import given
from hypothesis import strategies as st

FINITE = 1.0


def judge(**health: object) -> Judge:
    return Judge(Health(**health))  # type: ignore[arg-type]


def feed(judge: Judge, losses: list[float], start: int = 1) -> list[Call]:
    return [judge.check(step, loss, FINITE, lambda: True).call for step, loss in enumerate(losses, start)]


def calm(steps: int) -> list[float]:
    return [1.0 + 0.1 * math.sin(step) for step in range(steps)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_bad_at_once(loss: float):
    verdict = judge().check(7, loss, FINITE, lambda: True)
    assert (verdict.call, verdict.reason, verdict.action, verdict.first_suspect) == (
        Call.BAD,
        "NonFiniteLoss",
        "Rollback",
        7,
    )


def test_gradient_is_asked_for_only_when_the_sum_of_squares_is_not_finite():
    asked = []
    assert judge().check(1, 1.0, FINITE, lambda: asked.append(1) or False).call is Call.GOOD
    assert not asked
    assert judge().check(1, 1.0, math.inf, lambda: True).call is Call.GOOD
    assert judge().check(1, 1.0, math.nan, lambda: False).reason == "NonFiniteGradient"


@pytest.mark.parametrize(("action", "call"), [("Ignore", Call.DISCARD), ("Rollback", Call.BAD), ("Halt", Call.BAD)])
def test_action_of_the_spec_decides(action: str, call: Call):
    assert judge(non_finite_action=action).check(1, math.nan, FINITE, lambda: True).call is call


def test_third_spike_in_a_row_is_bad_and_names_the_first():
    judged = judge()
    feed(judged, calm(50))
    calls = feed(judged, [50.0, 60.0], 51)
    verdict = judged.check(53, 70.0, FINITE, lambda: True)
    assert calls == [Call.SUSPECT, Call.SUSPECT]
    assert (verdict.call, verdict.reason, verdict.first_suspect) == (Call.BAD, "LossSpike", 51)


def test_two_spikes_and_a_good_loss_are_ordinary():
    judged = judge()
    feed(judged, calm(50))
    assert feed(judged, [50.0, 60.0, 1.0], 51) == [Call.SUSPECT, Call.SUSPECT, Call.GOOD]
    assert not judged.suspicious


def test_nothing_is_a_spike_while_warming_up():
    assert set(feed(judge(), [1.0] * (WARM_UP_STEPS - 1) + [1e9])) == {Call.GOOD}


def test_almost_constant_losses_do_not_make_noise_a_spike():
    judged = judge()
    feed(judged, [1.0] * 50)
    assert feed(judged, [1.0 + LEAST_DEVIATION] * 10, 51) == [Call.GOOD] * 10


def test_falling_and_heavy_tailed_losses_are_calm_by_default():
    """What a converging classifier shows: ever smaller losses with hard batches in between."""
    import random

    generator = random.Random(0)
    losses = [2.3 * math.exp(-step / 300) * generator.lognormvariate(0, 0.9) for step in range(5000)]
    assert Call.BAD not in feed(judge(), losses)


def test_losses_below_zero_are_judged_on_a_linear_scale():
    judged = judge(loss_spike_consecutive_steps=1)
    feed(judged, [-1.0 + 0.01 * (step % 7) for step in range(50)])
    assert judged.check(51, -0.9, FINITE, lambda: True).call is Call.GOOD
    assert judged.check(52, 3.0, FINITE, lambda: True).call is Call.BAD


def test_restored_judge_decides_like_the_one_captured():
    one = judge()
    feed(one, [*calm(80), 40.0, 41.0])
    other = judge()
    other.restore(one.capture())
    assert other.suspicious
    verdicts = [j.check(83, 42.0, FINITE, lambda: True) for j in (one, other)]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].first_suspect == 81


def test_new_window_keeps_the_newest_losses():
    judged = judge()
    feed(judged, calm(100))
    judged.configure(Health(loss_spike_window_steps=10))
    assert len(judged._window) == 10


@given(
    st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=60),
    st.floats(min_value=1e-3, max_value=1e6),
    st.integers(min_value=1, max_value=40),
)
def test_z_score_equals_the_definition(losses: list[float], loss: float, size: int):
    window = LossWindow(size)
    for value in losses:
        window.add(value)
    kept = losses[-size:]
    logs = sorted(math.log(value) for value in kept)
    median = logs[(len(logs) - 1) // 2]
    deviation = statistics.median_low([abs(value - median) for value in logs])
    scale = max(1.4826 * deviation, math.log1p(LEAST_DEVIATION))
    expected = max(0.0, (math.log(loss) - median) / scale)
    assert window.z_score(loss) == pytest.approx(expected, abs=1e-9)
    assert window.losses() == kept
