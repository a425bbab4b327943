"""The breaker, transition by transition, on a clock that the test moves."""

import pytest
from esper_leyline.v1.common_pb2 import CircuitBreakerState
from esper_runtime.tolaria.breaker import CLOSED, HALF_OPEN, MAX_WINDOW_S, OPEN, THRESHOLD, WINDOW_S, Breaker

from tests.support.standing import Clock

pytestmark = pytest.mark.row("T03")


def tripped(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(THRESHOLD):
        assert breaker.allow()
        breaker.failed()
    assert breaker.state == OPEN
    return breaker


def test_it_opens_at_the_third_failure_in_a_row_and_a_success_starts_the_count_again():
    breaker = Breaker(Clock())
    for told, state, failures in [
        (breaker.failed, CLOSED, 1),
        (breaker.failed, CLOSED, 2),
        (breaker.succeeded, CLOSED, 0),
        (breaker.failed, CLOSED, 1),
        (breaker.failed, CLOSED, 2),
        (breaker.failed, OPEN, 3),
    ]:
        told()
        assert (breaker.state, breaker.failures) == (state, failures)


def test_denied_calls_and_late_outcomes_do_not_keep_it_open():
    clock = Clock()
    breaker = tripped(clock)
    for _ in range(29):
        clock.pass_s(1.0)
        assert not breaker.allow()
        breaker.failed()
        assert breaker.state == OPEN
    clock.pass_s(1.0)
    assert breaker.allow()
    assert breaker.state == HALF_OPEN


def test_a_success_from_before_does_not_close_it():
    breaker = tripped(Clock())
    breaker.succeeded()
    assert breaker.state == OPEN


def test_half_open_admits_exactly_one_probe():
    clock = Clock()
    breaker = tripped(clock)
    clock.pass_s(WINDOW_S)
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert breaker.state == CLOSED
    assert [breaker.allow() for _ in range(3)] == [True, True, True]


def test_one_failed_probe_opens_it_again_for_twice_as_long_up_to_the_cap():
    clock = Clock()
    breaker = tripped(clock)
    windows = []
    for _ in range(7):
        windows.append(breaker.window_s)
        clock.pass_s(breaker.window_s - 0.001)
        assert not breaker.allow()
        clock.pass_s(0.001)
        assert breaker.allow()
        breaker.failed()
        assert breaker.state == OPEN
    assert windows == [30, 60, 120, 240, 480, 600, 600]
    assert breaker.window_s == MAX_WINDOW_S
    clock.pass_s(MAX_WINDOW_S)
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.window_s == WINDOW_S


def test_a_probe_that_was_not_made_is_given_back_and_one_that_is_lost_ends_with_a_window():
    clock = Clock()
    breaker = tripped(clock)
    clock.pass_s(WINDOW_S)
    assert breaker.allow()
    breaker.give_back()
    assert breaker.allow()
    clock.pass_s(WINDOW_S - 1)
    assert not breaker.ready
    clock.pass_s(1)
    assert breaker.allow()


@pytest.mark.parametrize(("to", "allows"), [(CLOSED, [True, True]), (OPEN, [False, False]), (HALF_OPEN, [True, False])])
def test_a_forced_state_is_the_state_from_closed_and_from_open(to: CircuitBreakerState, allows: list[bool]):
    for breaker in (tripped(Clock()), Breaker(Clock())):
        breaker.force(to)
        assert breaker.state == to
        assert [breaker.allow(), breaker.allow()] == allows


def test_a_state_that_is_none_cannot_be_forced():
    breaker = Breaker(Clock())
    with pytest.raises(ValueError, match="0 is no state of a breaker"):
        breaker.force(CircuitBreakerState.CIRCUIT_BREAKER_STATE_UNSPECIFIED)
    assert breaker.state == CLOSED


def test_after_a_restore_an_open_breaker_is_half_open_and_remembers_its_window():
    clock = Clock()
    breaker = tripped(clock)
    clock.pass_s(WINDOW_S)
    breaker.allow()
    breaker.failed()
    another = Breaker(clock)
    another.restore(breaker.capture())
    assert (another.state, another.window_s) == (HALF_OPEN, 60)
    assert another.allow()
    another.failed()
    assert (another.state, another.window_s) == (OPEN, 120)


def test_a_restore_of_two_closed_ones_is_closed_and_keeps_the_failures():
    breaker, another = Breaker(Clock()), Breaker(Clock())
    breaker.failed()
    another.restore(breaker.capture())
    assert (another.state, another.failures) == (CLOSED, 1)
