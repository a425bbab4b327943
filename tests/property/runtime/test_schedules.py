"""What every schedule promises, for any of its values."""

import math

import pytest
from esper_runtime import schedules
from esper_runtime.schedules import Plan, Schedule, Seen
from hypothesis import assume, given
from hypothesis import strategies as st

BASES = st.floats(1e-6, 10.0)
PLANS = st.builds(Plan, steps=st.integers(1, 5000), steps_per_epoch=st.integers(1, 500))
STEPS = st.integers(0, 6000)
WARM = {
    "warmup_steps": st.integers(0, 300),
    "warmup_factor": st.floats(1e-3, 1.0),
    "warmup": st.sampled_from(["linear", "exponential"]),
}
LENGTHS = st.none() | st.integers(1, 3000)
CONSTANT = st.builds(schedules.constant, **WARM)
LINEAR = st.builds(schedules.linear, t_max=LENGTHS, min_rate=st.floats(0, 1e-6), **WARM)
COSINE = st.builds(schedules.cosine, t_max=LENGTHS, min_rate=st.floats(0, 1e-6), restarts=st.integers(0, 4), **WARM)
STEP = st.builds(schedules.step, every_steps=st.integers(1, 500), gamma=st.floats(0, 1), **WARM) | st.builds(
    schedules.step, every_epochs=st.integers(1, 50), gamma=st.floats(0, 1), **WARM
)
PLATEAU = st.builds(
    schedules.plateau,
    factor=st.floats(0, 1),
    patience=st.integers(0, 4),
    cooldown=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
    **WARM,
)
ANY = st.one_of(CONSTANT, LINEAR, COSINE, STEP, PLATEAU, st.builds(schedules.frozen))


def at(schedule: Schedule, base: float, step: int, plan: Plan, reductions: int = 0) -> float:
    return schedule.rate(base, step, step // plan.steps_per_epoch, plan, reductions)


@pytest.mark.row("T12")
@given(ANY, BASES, STEPS, PLANS, st.integers(0, 50))
def test_rate_lies_between_zero_and_the_base_rate(
    schedule: Schedule, base: float, step: int, plan: Plan, reductions: int
) -> None:
    assert 0.0 <= at(schedule, base, step, plan, reductions) <= base


@pytest.mark.row("T12")
@given(ANY, BASES, STEPS, PLANS, st.integers(0, 50))
def test_same_arguments_give_the_same_bits(
    schedule: Schedule, base: float, step: int, plan: Plan, reductions: int
) -> None:
    first = at(schedule, base, step, plan, reductions)
    at(schedule, base / 2, step + 1, plan)
    assert at(schedule, base, step, plan, reductions).hex() == first.hex()


@pytest.mark.row("T12")
@given(ANY, BASES, PLANS)
def test_warm_up_only_rises(schedule: Schedule, base: float, plan: Plan) -> None:
    assume(not isinstance(schedule, schedules.Frozen))
    rates = [at(schedule, base, step, plan) for step in range(schedule.warmup_steps + 1)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(base, rel=1e-12)
    if schedule.warmup_steps:
        assert rates[0] == pytest.approx(base * schedule.warmup_factor, rel=1e-12)


@pytest.mark.row("T12")
@given(ANY, BASES, PLANS)
def test_warm_up_ends_without_a_jump(schedule: Schedule, base: float, plan: Plan) -> None:
    """Warm-up and decay, both continued to where they meet, meet."""
    assume(schedule.warmup_steps > 0 and not isinstance(schedule, schedules.Frozen))
    end = schedule.warmup_steps
    assert abs(base * schedule.warm(end) - at(schedule, base, end, plan)) < 1e-9 * base


@pytest.mark.row("T12")
@given(COSINE | LINEAR, BASES, PLANS)
def test_at_t_max_the_rate_is_min_rate_and_stays_there(
    schedule: schedules.Cosine | schedules.Linear, base: float, plan: Plan
) -> None:
    cycles = schedule.restarts + 1 if isinstance(schedule, schedules.Cosine) else 1
    length = schedule.t_max or max(1, max(1, plan.steps - schedule.warmup_steps) // cycles)
    end = schedule.warmup_steps + length * cycles
    assert at(schedule, base, end, plan) == schedule.min_rate
    assert at(schedule, base, end + 17, plan) == schedule.min_rate
    if schedule.t_max is None:
        assert end <= max(plan.steps, schedule.warmup_steps + cycles)


@given(st.floats(0, 1e-7), st.integers(1, 200), st.integers(1, 3), BASES)
def test_cosine_restarts_at_the_base_rate(min_rate: float, length: int, restarts: int, base: float) -> None:
    schedule = schedules.cosine(min_rate=min_rate, t_max=length, restarts=restarts)
    plan = Plan(10_000, 10)
    tops = [at(schedule, base, length * cycle, plan) for cycle in range(restarts + 1)]
    assert tops == pytest.approx([base] * (restarts + 1), rel=1e-12)
    assert all(at(schedule, base, length * (cycle + 1) - 1, plan) < base for cycle in range(restarts) if length > 1)


VALUES = st.lists(st.floats(-100, 100) | st.just(math.nan) | st.just(math.inf), max_size=40)


@pytest.mark.row("T12")
@given(PLATEAU, VALUES, st.data())
def test_plateau_replays_from_any_remembered_point(
    schedule: schedules.Plateau, values: list[float], data: st.DataObject
) -> None:
    trail = [Seen()]
    for epoch, value in enumerate(values):
        trail.append(schedule.observed(trail[-1], value, step=(epoch + 1) * 20))
    back = data.draw(st.integers(0, len(values)))
    seen = Seen(*trail[back])
    for epoch, value in enumerate(values[back:], back):
        seen = schedule.observed(seen, value, step=(epoch + 1) * 20)
    assert seen == trail[-1]
    reductions = [entry.reductions for entry in trail]
    assert reductions == sorted(reductions)
    assert seen.reductions * (schedule.patience + 1) <= len(values)
    assert seen.best is None or math.isfinite(seen.best)
