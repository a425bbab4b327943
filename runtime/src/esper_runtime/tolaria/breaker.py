"""A circuit breaker: after so many failures in a row a call is left alone for a while, then tried once.

Pure; time comes in as a function. A denied call is no failure and changes nothing, so an open breaker cannot keep
itself open. What is told while it is open and its window runs belongs to calls from before, and is ignored too.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from esper_leyline.v1.common_pb2 import CircuitBreakerState

CLOSED: Final = CircuitBreakerState.CIRCUIT_BREAKER_STATE_CLOSED
OPEN: Final = CircuitBreakerState.CIRCUIT_BREAKER_STATE_OPEN
HALF_OPEN: Final = CircuitBreakerState.CIRCUIT_BREAKER_STATE_HALF_OPEN

THRESHOLD: Final = 3
WINDOW_S: Final = 30.0
MAX_WINDOW_S: Final = 600.0


class Breaker:
    """Closed: every call. Open: none until the window is over. Half-open: one probe, whose outcome decides."""

    def __init__(
        self,
        monotonic: Callable[[], float],
        *,
        threshold: int = THRESHOLD,
        window_s: float = WINDOW_S,
        max_window_s: float = MAX_WINDOW_S,
    ) -> None:
        self._monotonic = monotonic
        self._threshold = threshold
        self._first_window_s = window_s
        self._max_window_s = max_window_s
        self.state: CircuitBreakerState = CLOSED
        self.failures = 0
        """In a row."""
        self.window_s = window_s
        """How long it is open, now or the next time. Doubled by each probe that fails."""
        self._opened_at = 0.0
        self._probed_at: float | None = None

    @property
    def ready(self) -> bool:
        """A call would be allowed now. Asking changes nothing."""
        if self.state == CLOSED:
            return True
        now = self._monotonic()
        if self.state == OPEN:
            return now - self._opened_at >= self.window_s
        # A probe of which nothing was heard for a whole window is lost.
        return self._probed_at is None or now - self._probed_at >= self.window_s

    def allow(self) -> bool:
        """Whether the call may be made; True makes it the probe when the breaker is not closed."""
        if not self.ready:
            return False
        if self.state != CLOSED:
            self.state = HALF_OPEN
            self._probed_at = self._monotonic()
        return True

    def give_back(self) -> None:
        """The allowed call was not made after all."""
        self._probed_at = None

    def succeeded(self) -> None:
        if self._counts():
            self._close()

    def failed(self) -> None:
        if not self._counts():
            return
        self.failures += 1
        if self.state != CLOSED:
            self.window_s = min(2 * self.window_s, self._max_window_s)
            self._open()
        elif self.failures >= self._threshold:
            self._open()

    def _counts(self) -> bool:
        """What is told after the window is a probe, asked for or not."""
        return self.state != OPEN or self.ready

    def force(self, state: CircuitBreakerState) -> None:
        """By command. ValueError for a state that is none."""
        if state == CLOSED:
            self._close()
        elif state == OPEN:
            self.window_s = self._first_window_s
            self._open()
        elif state == HALF_OPEN:
            self.state, self._probed_at = HALF_OPEN, None
        else:
            raise ValueError(f"{state} is no state of a breaker")

    def half_open(self) -> None:
        """What is protected may have changed: after a restore, a repair, a rollback. Closed stays closed."""
        if self.state == OPEN:
            self.state = HALF_OPEN
            self._probed_at = None

    def _open(self) -> None:
        self.state = OPEN
        self._opened_at = self._monotonic()
        self._probed_at = None

    def _close(self) -> None:
        self.state = CLOSED
        self.failures = 0
        self.window_s = self._first_window_s
        self._probed_at = None

    def capture(self) -> dict[str, Any]:
        return {"state": int(self.state), "failures": self.failures, "window": self.window_s}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Of two states the more careful one, and never open: what was broken may be repaired, so one probe tells."""
        self.failures = max(self.failures, int(saved["failures"]))
        self.window_s = max(self.window_s, float(saved["window"]))
        if self.state != CLOSED or saved["state"] != CLOSED:
            self.state = HALF_OPEN
        self._probed_at = None
