"""When to try again: a circuit breaker for calls, and the back-off that it and the readers share. No clock of its
own and no randomness of its own: both arrive as arguments."""

import random
from collections.abc import Callable
from enum import StrEnum


class Backoff:
    """Doubling delays up to a cap, each shortened by up to a half at random, so that a thousand pods do not return
    in one instant."""

    def __init__(self, *, first_s: float, max_s: float, jitter: Callable[[], float] = random.random) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._jitter = jitter
        self._tries = 0

    def next_s(self) -> float:
        """The delay before the next try, in seconds."""
        delay_s = min(self._max_s, self._first_s * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return delay_s * (1.0 - 0.5 * self._jitter())

    def reset(self) -> None:
        self._tries = 0


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    """Calls are refused until the back-off is over."""
    HALF_OPEN = "half-open"
    """One call is on its way as a probe; the others are refused."""


class Breaker:
    """Refuses calls after `failures` in a row, lets one through as a probe after a back-off, closes on a success."""

    def __init__(
        self,
        *,
        failures: int,
        backoff: Backoff,
        clock: Callable[[], float],
        changed: Callable[[BreakerState], None] = lambda state: None,
    ) -> None:
        """`changed` is told each new state at once; it must not wait."""
        self._limit = failures
        self._backoff = backoff
        self._clock = clock
        self._changed = changed
        self._failures = 0
        self._open_until = 0.0
        self.state = BreakerState.CLOSED

    def admits(self) -> bool:
        """True when the caller may try. In the half-open state that is one caller, who must report the result."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN and self._clock() >= self._open_until:
            self._move(BreakerState.HALF_OPEN)
            return True
        return False

    def succeeded(self) -> None:
        self._failures = 0
        self._backoff.reset()
        self._move(BreakerState.CLOSED)

    def failed(self) -> None:
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED and self._failures >= self._limit
        ):
            self._open_until = self._clock() + self._backoff.next_s()
            self._move(BreakerState.OPEN)

    def abandoned(self) -> None:
        """The probe was cancelled and says nothing: the next caller may probe."""
        if self.state is BreakerState.HALF_OPEN:
            self._move(BreakerState.OPEN)

    def _move(self, state: BreakerState) -> None:
        if state is not self.state:
            self.state = state
            self._changed(state)
