import math
import random
from array import array
from collections.abc import Callable

import pytest
from esper_leyline.runconfig import Health
from esper_runtime.tolaria.judge import Call, Judge, Verdict, judge_validation

ACTIONS = [("Rollback", Call.BAD), ("Halt", Call.BAD)]


def judge(**health: object) -> Judge:
    """With everything on."""
    return Judge(Health(**{"gradient_norm_action": "Rollback", **health}))  # type: ignore[arg-type]


def ask(judge: Judge, step: int, loss: float, *, norm: float = 1.0) -> Verdict:
    return judge.check(step, loss, norm * norm, lambda: math.isfinite(norm))


def feed(judge: Judge, losses: list[float], start: int = 1, *, norm: float = 1.0) -> list[Call]:
    return [ask(judge, step, loss, norm=norm).call for step, loss in enumerate(losses, start)]


def calm(steps: int) -> list[float]:
    generator = random.Random(0)
    return [generator.lognormvariate(0, 0.1) for _ in range(steps)]


SPIKE = 3.0
"""Far above what `calm` gives, and no explosion."""


# Not finite


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("action", "call"), ACTIONS)
def test_loss_that_is_not_finite_is_bad_at_once(loss: float, action: str, call: Call):
    verdict = ask(judge(non_finite_action=action), 7, loss)
    assert (verdict.call, verdict.reason, verdict.action, verdict.first_suspect) == (call, "NonFiniteLoss", action, 7)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize(("action", "call"), ACTIONS)
def test_gradient_that_is_not_finite_is_bad_at_once(norm: float, action: str, call: Call):
    verdict = ask(judge(non_finite_action=action), 7, 1.0, norm=norm)
    assert (verdict.call, verdict.reason, verdict.action) == (call, "NonFiniteGradient", action)
    assert verdict.first_suspect == 7


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan)])
def test_ignored_step_that_is_not_finite_is_discarded(loss: float, norm: float):
    assert ask(judge(non_finite_action="Ignore"), 1, loss, norm=norm).call is Call.DISCARD


def test_gradient_is_asked_for_only_when_the_sum_of_squares_is_not_finite():
    asked: list[int] = []
    check: Callable[..., Verdict] = judge().check
    assert check(1, 1.0, 1.0, lambda: asked.append(1) or False).call is Call.GOOD
    assert not asked
    assert check(1, 1.0, math.inf, lambda: True).call is Call.GOOD


@pytest.mark.parametrize(("action", "call"), ACTIONS)
def test_state_that_is_not_finite_is_bad_after_its_step(action: str, call: Call):
    verdict = judge(non_finite_action=action).unsound(9, "the weight is NaN")
    assert (verdict.call, verdict.reason, verdict.action) == (call, "NonFiniteWeight", action)
    assert (verdict.first_suspect, verdict.message) == (9, "the weight is NaN")


def test_ignored_state_that_is_not_finite_changes_nothing():
    assert judge(non_finite_action="Ignore").unsound(9, "the weight is NaN").call is Call.GOOD


def test_trouble_of_any_kind_began_with_the_open_streak():
    judged = judge()
    feed(judged, calm(100))
    assert feed(judged, [SPIKE, SPIKE], 101) == [Call.SUSPECT] * 2
    assert ask(judged, 103, math.nan).first_suspect == 101
    assert judged.unsound(102, "").first_suspect == 101


# Loss


@pytest.mark.parametrize(("action", "call"), ACTIONS)
def test_spikes_in_a_row_are_bad_and_name_the_first(action: str, call: Call):
    judged = judge(loss_spike_action=action)
    feed(judged, calm(100))
    needed = Health().loss_spike_consecutive_steps
    assert feed(judged, [SPIKE] * (needed - 1), 101) == [Call.SUSPECT] * (needed - 1)
    verdict = ask(judged, 100 + needed, SPIKE)
    assert (verdict.call, verdict.reason, verdict.action, verdict.first_suspect) == (call, "LossSpike", action, 101)
    assert f"{needed} in a row" in verdict.message


def test_ignored_spikes_are_good():
    judged = judge(loss_spike_action="Ignore", gradient_norm_action="Ignore")
    assert set(feed(judged, [*calm(100), *([1e6] * 20)])) == {Call.GOOD}


def test_spikes_that_end_are_ordinary():
    judged = judge()
    feed(judged, calm(100))
    short = Health().loss_spike_consecutive_steps - 1
    assert feed(judged, [*([SPIKE] * short), 1.0], 101) == [*([Call.SUSPECT] * short), Call.GOOD]
    assert not judged.suspicious


@pytest.mark.row("T48")
def test_a_loss_fifteen_times_as_high_as_ever_is_bad_at_once():
    judged = judge()
    feed(judged, calm(100))
    verdict = ask(judged, 101, 20.0)
    assert (verdict.call, verdict.reason, verdict.first_suspect) == (Call.BAD, "LossSpike", 101)
    assert "15 times" in verdict.message


@pytest.mark.row("T48")
def test_a_loss_fifteen_times_its_average_but_not_as_high_as_ever_is_suspect():
    judged = judge()
    feed(judged, [10 * loss for loss in calm(100)] + calm(300))  # by now the average is that of the newer ones
    assert ask(judged, 401, 20.0).call is Call.SUSPECT


def test_almost_constant_losses_do_not_make_noise_a_spike():
    judged = judge()
    feed(judged, [1.0] * 50)
    assert feed(judged, [1.05] * 10, 51) == [Call.GOOD] * 10


def test_falling_and_heavy_tailed_losses_are_calm():
    """What a converging classifier shows: ever smaller losses with hard batches in between."""
    generator = random.Random(0)
    losses = [2.3 * math.exp(-step / 300) * generator.lognormvariate(0, 0.9) for step in range(5000)]
    assert Call.BAD not in feed(judge(), losses)


# Gradient


def exploding(norm: float = 100.0, *, loss: float = 1.5, **health: object) -> list[Verdict]:
    judged = judge(**health)
    feed(judged, calm(100))
    return [ask(judged, step, loss, norm=norm) for step in range(101, 106)]


@pytest.mark.parametrize(("action", "call"), ACTIONS)
def test_gradient_far_above_its_average_is_bad_at_the_kth(action: str, call: Call):
    verdicts = exploding(gradient_norm_action=action, loss_spike_action="Ignore")
    assert [verdict.call for verdict in verdicts[:3]] == [Call.SUSPECT, Call.SUSPECT, call]
    last = verdicts[2]
    assert (last.reason, last.action, last.first_suspect) == ("GradientExplosion", action, 101)


def test_ignored_gradient_explosion_is_good():
    assert {verdict.call for verdict in exploding(gradient_norm_action="Ignore", loss=1.0)} == {Call.GOOD}


def test_gradient_that_grows_while_the_loss_falls_is_learning():
    assert {verdict.call for verdict in exploding(loss=0.5)} == {Call.GOOD}


def test_two_large_gradients_and_an_ordinary_one_are_good():
    judged = judge()
    feed(judged, calm(100))
    assert feed(judged, [1.0, 1.0], 101, norm=50.0) == [Call.SUSPECT] * 2
    assert judged.suspicious
    assert feed(judged, [1.0], 103) == [Call.GOOD]
    assert not judged.suspicious


def test_the_loss_names_the_trouble_when_both_are_bad_at_once():
    verdicts = exploding(loss=SPIKE)
    assert [verdict.call for verdict in verdicts[:3]] == [Call.SUSPECT, Call.SUSPECT, Call.BAD]
    assert verdicts[2].reason == "LossSpike"


def test_an_earlier_gradient_dates_the_trouble_of_the_loss():
    judged = judge()
    feed(judged, calm(100))
    assert ask(judged, 101, 1.1, norm=50.0).call is Call.SUSPECT
    assert ask(judged, 102, 100.0, norm=1.0).first_suspect == 101


# Validation


def validated(value: float, best: float, mode: str = "Min", **health: object) -> Verdict:
    settings = Health(**{"validation_action": "Rollback", "validation_max_drop": 0.02, **health})  # type: ignore[arg-type]
    return judge_validation(settings, name="metric", mode=mode, value=value, best=best, best_step=40)


@pytest.mark.parametrize(("action", "call"), [*ACTIONS, ("Ignore", Call.GOOD)])
def test_action_of_the_spec_decides_about_a_worse_epoch(action: str, call: Call):
    verdict = validated(2.0, 1.0, validation_action=action)
    assert verdict.call is call
    if call is Call.BAD:
        assert (verdict.reason, verdict.action, verdict.first_suspect) == ("ValidationRegression", action, 41)
        assert "metric is 2 and was 1 at step 40" in verdict.message


@pytest.mark.parametrize(
    ("value", "best", "mode", "call"),
    [
        (1.019, 1.0, "Min", Call.GOOD),
        (1.021, 1.0, "Min", Call.BAD),
        (0.5, 1.0, "Min", Call.GOOD),
        (0.981, 1.0, "Max", Call.GOOD),
        (0.979, 1.0, "Max", Call.BAD),
        (2.0, 1.0, "Max", Call.GOOD),
        (-0.979, -1.0, "Min", Call.BAD),
        (-0.981, -1.0, "Min", Call.GOOD),
        (math.nan, 1.0, "Min", Call.BAD),
        (math.nan, 1.0, "Max", Call.BAD),
        (math.inf, 1.0, "Min", Call.BAD),
    ],
)
def test_drop_is_a_share_of_the_best_value(value: float, best: float, mode: str, call: Call):
    assert validated(value, best, mode).call is call


# Memory


def test_restored_judge_decides_like_the_one_captured():
    one = judge()
    feed(one, calm(80))
    assert feed(one, [SPIKE, SPIKE], 81) == [Call.SUSPECT] * 2
    assert ask(one, 83, 1.0, norm=30.0).call is Call.SUSPECT
    other = judge()
    other.restore(one.capture())
    assert other.suspicious
    for step in range(84, 90):
        first, second = (ask(j, step, SPIKE, norm=40.0) for j in (one, other))
        assert first == second
        assert first.first_suspect == 81
    assert one.capture() == other.capture()


def test_new_settings_keep_what_is_known():
    judged = judge()
    feed(judged, calm(100))
    judged.configure(Health(loss_spike_window_steps=10, loss_spike_consecutive_steps=1))
    assert ask(judged, 101, SPIKE).call is Call.BAD


def test_memory_is_small_and_of_one_size():
    fresh, used = judge(), judge()
    feed(used, calm(1000))
    assert len(fresh.capture()) == len(used.capture()) < 1024


def test_what_the_first_layout_kept_is_read_as_a_window() -> None:
    """Its first numbers were the lengths of window and open streak."""
    losses = [2.0 - 0.01 * step for step in range(30)]
    old = array("d", [len(losses), 1.0, *losses, 31.0, 9.0]).tobytes()
    judge = Judge(Health())
    judge.restore(old)
    assert not judge.suspicious
    assert judge.check(31, 1.7, 1.0, lambda: True).call is Call.GOOD
    again = Judge(Health())
    again.restore(judge.capture())
    assert again.capture() == judge.capture()
