import pytest
from esper_leyline.oona import Backoff, Breaker, BreakerState
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def breaker(clock, failures=3):
    return Breaker(failures=failures, backoff=Backoff(first_s=1.0, max_s=8.0, jitter=lambda: 0.0), clock=clock)


def test_a_back_off_doubles_up_to_its_cap_and_starts_over_after_a_reset():
    backoff = Backoff(first_s=1.0, max_s=5.0, jitter=lambda: 0.0)
    assert [backoff.next_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next_s() == 1.0


@pytest.mark.parametrize(("jitter", "delay_s"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_jitter_only_ever_shortens_a_delay_and_at_most_by_half(jitter, delay_s):
    assert Backoff(first_s=1.0, max_s=5.0, jitter=lambda: jitter).next_s() == pytest.approx(delay_s)


@pytest.mark.row("K10")
def test_it_opens_after_three_failures_in_a_row_and_probes_once_after_the_back_off():
    clock = Clock()
    it = breaker(clock)
    for _ in range(3):
        assert it.admits()
        it.failed()
    assert (it.state, it.admits()) == (BreakerState.OPEN, False)
    clock.now += 1.0
    assert it.admits()
    assert not it.admits(), "the second caller must wait for the probe's result"
    it.succeeded()
    assert it.state is BreakerState.CLOSED


@pytest.mark.row("K10")
def test_each_change_is_told_once_and_at_the_time_the_clock_says():
    clock, told = Clock(), []
    backoff = Backoff(first_s=1.0, max_s=8.0, jitter=lambda: 0.0)
    it = Breaker(
        failures=3, backoff=backoff, clock=clock, changed=lambda state: told.append((clock.now - 100.0, str(state)))
    )
    for _ in range(5):  # more failures change nothing
        it.failed()
    for wait_s in (0.9, 0.1, 0.0):
        clock.now += wait_s
        it.admits()
    it.failed()
    clock.now += 2.0
    assert it.admits()
    it.abandoned()
    assert it.admits(), "a probe that was cancelled says nothing: the next caller may probe"
    it.succeeded()
    it.succeeded()
    assert told == [
        (0.0, "open"),
        (1.0, "half-open"),
        (1.0, "open"),
        (3.0, "half-open"),
        (3.0, "open"),
        (3.0, "half-open"),
        (3.0, "closed"),
    ]


@pytest.mark.row("K10")
def test_a_failed_probe_opens_it_again_for_longer():
    clock = Clock()
    it = breaker(clock, failures=1)
    it.failed()
    clock.now += 1.0
    assert it.admits()
    it.failed()
    clock.now += 1.9
    assert not it.admits()
    clock.now += 0.1
    assert it.admits()


def test_a_success_between_failures_starts_the_count_anew():
    it = breaker(Clock())
    for _ in range(10):
        it.failed()
        it.failed()
        it.succeeded()
    assert it.state is BreakerState.CLOSED


def test_a_cancelled_probe_leaves_the_chance_to_the_next_caller():
    clock = Clock()
    it = breaker(clock, failures=1)
    it.failed()
    clock.now += 1.0
    assert it.admits()
    it.abandoned()
    assert it.admits()


class BreakerMachine(RuleBasedStateMachine):
    """Whatever the calls do, an open breaker lets somebody through again after at most the longest back-off."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.breaker = breaker(self.clock)
        self.under_way = 0

    @rule()
    def call(self):
        if self.breaker.admits():
            self.under_way += 1

    @precondition(lambda self: self.under_way)
    @rule(end=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def end(self, end):
        self.under_way -= 1
        getattr(self.breaker, end)()

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def never_shut_for_good(self):
        if self.under_way == 0:
            before = self.clock.now
            assert self.breaker.state is not BreakerState.HALF_OPEN
            self.clock.now = before + 8.0
            may_try = self.breaker.state is BreakerState.CLOSED or self.clock.now >= self.breaker._open_until
            assert may_try
            self.clock.now = before


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
