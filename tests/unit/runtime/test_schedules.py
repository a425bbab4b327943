"""Values of the schedules that one can work out by hand, and what is said of wrong ones."""

import math
import subprocess
import sys

import pytest
from esper_runtime import schedules
from esper_runtime.schedules import Plan, Schedule, ScheduleError, Seen, as_schedule, read

PLAN = Plan(100, 10)


def rates(schedule: Schedule, *steps: int) -> list[float]:
    return [schedule.rate(0.8, step, step // 10, PLAN) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (schedules.constant(), [0.8, 0.8, 0.8]),
        (schedules.frozen(), [0.0, 0.0, 0.0]),
        (schedules.linear(), [0.8, 0.4, 0.008]),
        (schedules.linear(min_rate=0.2, t_max=50), [0.8, 0.2, 0.2]),
        (schedules.cosine(), [0.8, 0.4, 0.4 * (1 + math.cos(0.99 * math.pi))]),
        (schedules.cosine(min_rate=0.2), [0.8, 0.5, 0.2 + 0.3 * (1 + math.cos(0.99 * math.pi))]),
        (schedules.cosine(restarts=1), [0.8, 0.8, 0.4 * (1 + math.cos(0.98 * math.pi))]),
        (schedules.step(every_steps=25, gamma=0.5), [0.8, 0.2, 0.1]),
        (schedules.step(every_epochs=3, gamma=0.1), [0.8, 0.08, 0.0008]),
    ],
)
@pytest.mark.row("T12")
def test_rate_at_the_beginning_the_middle_and_the_last_step(schedule: Schedule, expected: list[float]):
    assert rates(schedule, 0, 50, 99) == pytest.approx(expected, rel=1e-12)


@pytest.mark.row("T12")
def test_step_0_has_the_warm_up_rate_and_decay_counts_from_its_end():
    schedule = schedules.cosine(warmup_steps=20)
    assert rates(schedule, 0, 10, 20, 60) == pytest.approx([0.08, 0.8 * 0.55, 0.8, 0.4], rel=1e-12)
    assert schedule.rate(0.8, 100, 10, PLAN) == 0.0


def test_exponential_warm_up_grows_by_the_same_factor_in_every_step():
    found = rates(schedules.constant(warmup_steps=4, warmup_factor=1e-4, warmup="exponential"), 0, 1, 2, 3, 4)
    assert found == pytest.approx([0.8e-4, 0.8e-3, 0.8e-2, 0.8e-1, 0.8], rel=1e-12)


def test_epochs_of_a_step_schedule_count_from_that_in_which_the_warm_up_ends():
    schedule = schedules.step(every_epochs=2, gamma=0.5, warmup_steps=25)
    assert rates(schedule, 25, 39, 40, 59, 60) == [0.8, 0.8, 0.4, 0.4, 0.2]


def test_plateau_waits_reduces_and_cools_down():
    schedule = schedules.plateau(factor=0.1, patience=1, cooldown=2, threshold=0.1)
    seen, reductions = Seen(), []
    for epoch, loss in enumerate([1.0, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.1, math.nan, 0.2]):
        seen = schedule.observed(seen, loss, step=epoch * 10)
        reductions.append(seen.reductions)
    # 1.0 is best; two epochs without 10 % better reduce; two do not count; two more reduce; 0.1 is better.
    assert reductions == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert schedule.rate(0.8, 99, 9, PLAN, seen.reductions) == pytest.approx(0.008)


def test_plateau_judges_no_epoch_of_the_warm_up():
    schedule = schedules.plateau(patience=0, warmup_steps=30)
    seen = Seen()
    for step in (10, 20, 29):
        seen = schedule.observed(seen, 5.0, step=step)
    assert seen == Seen(best=5.0)
    assert schedule.observed(seen, 5.0, step=30).reductions == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.constant(warmup_steps=-1), "warmup_steps is -1; give an integer of at least 0"),
        (lambda: schedules.constant(warmup_steps=True), "warmup_steps is True"),
        (lambda: schedules.constant(warmup_factor=1.5), "warmup_factor is 1.5; give a number from 0 to 1"),
        (lambda: schedules.constant(warmup="slow"), "warmup is 'slow'; give one of 'linear', 'exponential'"),
        (lambda: schedules.constant(warmup_factor=0.0, warmup="exponential"), "warmup_factor is 0"),
        (lambda: schedules.cosine(t_max=0), "t_max is 0; give an integer of at least 1"),
        (lambda: schedules.cosine(min_rate=-1e-3), "min_rate is -0.001; give a number of at least 0"),
        (lambda: schedules.linear(min_rate=math.inf), "min_rate is inf"),
        (lambda: schedules.step(), "every_epochs, every_steps: give one of them"),
        (lambda: schedules.step(every_steps=2, gamma=math.nan), "gamma is nan"),
        (lambda: schedules.plateau(mode="less"), "mode is 'less'; give 'min' or 'max'"),
        (lambda: schedules.plateau(patience=1.5), "patience is 1.5"),
        (lambda: schedules.plateau(metric=""), "metric is ''"),
        (lambda: read({"policy": "cosin"}), "policy is 'cosin'; give one of constant, linear, cosine, step, plateau"),
        (lambda: read({"policy": "step", "gama": 1}), "gama is unknown to step; it knows warmup_steps,"),
        (lambda: read({}), "policy is None"),
        (lambda: as_schedule("cosine", field="Workload.schedule"), "Workload.schedule is 'cosine'; give one of"),
    ],
)
def test_error_names_the_field_and_the_remedy(make, words: str):
    with pytest.raises(ScheduleError) as error:
        make()
    assert words in str(error.value)


def test_configuration_gives_the_schedule_that_it_names():
    assert read({"policy": "cosine", "warmup_steps": 5}) == schedules.cosine(warmup_steps=5)


def test_schedules_load_no_torch():
    code = "import esper_runtime.schedules, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
