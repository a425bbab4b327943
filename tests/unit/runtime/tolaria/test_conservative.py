"""Conservative mode: entered for a reason, left when that reason has proved itself."""

import pytest
from esper_runtime.tolaria.conservative import EXIT_SUCCESSES, MIN_DWELL_S, Conservative

from tests.support.standing import Clock

pytestmark = pytest.mark.row("T02")


def entered() -> tuple[Conservative, Clock]:
    clock = Clock()
    mode = Conservative(clock)
    mode.enter("tamiyo", "no answer")
    return mode, clock


def prove(mode: Conservative, times: int = EXIT_SUCCESSES) -> None:
    for _ in range(times):
        mode.succeeded("tamiyo")


def test_it_ends_after_two_successes_an_epoch_and_ten_seconds():
    mode, clock = entered()
    prove(mode)
    clock.pass_s(MIN_DWELL_S)
    mode.boundary()  # of the epoch in which it was entered
    assert mode
    mode.boundary()
    assert not mode


@pytest.mark.parametrize(("successes", "seconds"), [(1, MIN_DWELL_S), (2, MIN_DWELL_S - 0.1)])
def test_none_of_the_conditions_alone_is_enough(successes: int, seconds: float):
    mode, clock = entered()
    prove(mode, successes)
    clock.pass_s(seconds)
    for _ in range(10):
        mode.boundary()
    assert mode


def test_a_failure_between_two_successes_begins_again_and_keeps_the_time_of_entry():
    mode, clock = entered()
    mode.succeeded("tamiyo")
    clock.pass_s(MIN_DWELL_S)
    mode.enter("tamiyo", "no answer again")
    mode.succeeded("tamiyo")
    for _ in range(3):
        mode.boundary()
    assert mode
    assert mode.entries["tamiyo"].since == 1000.0
    mode.succeeded("tamiyo")
    mode.boundary()
    assert not mode


def test_being_left_alone_is_no_success():
    mode, clock = entered()
    for _ in range(1000):
        clock.pass_s(60.0)
        mode.boundary()
    assert mode


def test_every_reason_has_to_end_and_a_success_of_another_is_none():
    mode, clock = entered()
    mode.enter("lr_integrity", "changed")
    prove(mode)
    clock.pass_s(MIN_DWELL_S)
    for _ in range(3):
        mode.boundary()
    assert list(mode.entries) == ["lr_integrity"]
    mode.succeeded("kasmina")
    mode.lift("lr_integrity")
    assert not mode
