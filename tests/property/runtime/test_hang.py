"""No course of step times that stays within what the watch has seen is ever a hang; every end of steps is one."""

import hypothesis.strategies as st
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.tolaria.supervisor.hang import SAMPLES, Pulse
from hypothesis import given, settings

from tests.unit.runtime.tolaria.supervisor.test_hang import LIMITS, Looker

STEP_S = st.floats(0.001, 5.0)


@given(st.lists(st.floats(0.0005, 0.9), min_size=60, max_size=300))
@settings(max_examples=60, deadline=None)
def test_steps_below_a_second_are_never_a_hang_whatever_their_order(times: list[float]):
    looker = Looker()
    for seconds in times:
        assert looker.steps(1, seconds) == ""


@given(STEP_S, st.lists(st.floats(0.1, 1.9), max_size=200))
@settings(max_examples=60, deadline=None)
def test_steps_that_grow_by_less_than_twice_are_never_a_hang(first_s: float, growth: list[float]):
    looker = Looker()
    assert looker.steps(60, first_s) == ""
    longest_s = first_s
    for factor in growth:
        seconds = min(longest_s * factor, LIMITS.heartbeat_s * 0.9)
        assert looker.steps(1, seconds) == "", (seconds, longest_s, looker.watch.limit_s)
        longest_s = max(longest_s, seconds)


@given(STEP_S, st.floats(1.0, 9.0))
@settings(max_examples=60, deadline=None)
def test_a_step_that_is_suddenly_ten_times_slower_and_works_is_no_hang(step_s: float, times: float):
    looker = Looker()
    looker.pulse = Pulse(cpu_s=0.0, io_bytes=0, wants=True)
    assert looker.steps(100, step_s) == ""
    assert looker.steps(1, min(step_s * times, LIMITS.heartbeat_s * 0.9)) == ""


@given(st.lists(st.tuples(st.floats(0.001, 3.0), st.booleans()), min_size=1, max_size=150))
@settings(max_examples=60, deadline=None)
def test_an_end_of_steps_is_noticed_by_the_heartbeat_limit_at_the_latest(course: list[tuple[float, bool]]):
    looker = Looker()
    for seconds, step in course:
        if looker.quiet(seconds):
            return
        looker.beats(step=step)
    assert looker.noticed_s() <= LIMITS.heartbeat_s + 2.0
    assert len(looker.watch.times) <= SAMPLES


@given(
    st.lists(st.tuples(st.floats(0.0, 100.0), st.sampled_from(pb.RuntimePhase.values()), st.booleans()), max_size=80)
)
@settings(max_examples=60, deadline=None)
def test_a_trainer_that_beats_every_second_is_no_hang_before_the_progress_limit(
    course: list[tuple[float, int, bool]],
):
    looker = Looker()
    for seconds, phase, validating in course:
        looker.phase, looker.validating = phase, validating
        left_s = seconds
        while left_s > 0:
            assert looker.quiet(min(left_s, 0.8)) == ""
            left_s -= 0.8
            looker.beats(step=False)
        looker.beats(step=True)
        assert looker.quiet(0.01) == ""
