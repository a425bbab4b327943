"""Whatever happens in whatever order, a breaker keeps its promises."""

import pytest
from esper_runtime.tolaria.breaker import CLOSED, HALF_OPEN, MAX_WINDOW_S, OPEN, THRESHOLD, WINDOW_S, Breaker
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.standing import Clock


class Promises(RuleBasedStateMachine):
    """A caller that asks before each call and tells its outcome, and others who tell what nobody asked."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(self.clock)
        self.in_a_row = 0
        self.opened_at = 0.0
        self.probes = 0

    @rule(seconds=st.floats(min_value=0.0, max_value=2 * MAX_WINDOW_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.pass_s(seconds)

    @rule(outcome=st.sampled_from(["well", "badly", "not made"]))
    def a_call(self, outcome: str) -> None:
        before = self.breaker.state
        ready = self.breaker.ready
        allowed = self.breaker.allow()
        assert allowed == ready
        if not allowed:
            assert self.breaker.state == before != CLOSED
            return
        assert (self.breaker.state == CLOSED) == (before == CLOSED)
        if outcome == "not made":
            self.breaker.give_back()
            assert self.breaker.ready
        elif outcome == "well":
            self.breaker.succeeded()
            assert self.breaker.state == CLOSED
            self.in_a_row = 0
        else:
            self._fails(before)

    def _fails(self, before: int) -> None:
        window = self.breaker.window_s
        self.breaker.failed()
        self.in_a_row += 1
        if before == CLOSED:
            assert (self.breaker.state == OPEN) == (self.in_a_row >= THRESHOLD)
        else:
            assert self.breaker.state == OPEN
            assert self.breaker.window_s == min(2 * window, MAX_WINDOW_S)
        if self.breaker.state == OPEN:
            self.opened_at = self.clock.now

    @rule()
    def an_old_failure_is_told_while_it_is_open(self) -> None:
        if self.breaker.state == OPEN and not self.breaker.ready:
            self.breaker.failed()
            assert self.breaker.state == OPEN

    @rule()
    def the_state_is_restored(self) -> None:
        before = self.breaker.state
        self.breaker.restore(self.breaker.capture())
        assert self.breaker.state == (CLOSED if before == CLOSED else HALF_OPEN)

    @invariant()
    def an_open_one_lets_nobody_by_before_its_window_is_over(self) -> None:
        breaker = self.breaker
        if breaker.state == OPEN:
            assert breaker.ready == (self.clock.now - self.opened_at >= breaker.window_s)

    @invariant()
    def the_window_is_between_first_and_last(self) -> None:
        assert WINDOW_S <= self.breaker.window_s <= MAX_WINDOW_S
        assert self.breaker.state in (CLOSED, OPEN, HALF_OPEN)


test_promises = pytest.mark.row("T03")(Promises.TestCase)
