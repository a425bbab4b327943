"""Decides whether a step is good, before the optimizer may apply it.

A loss or gradient that is not finite is bad at once. A loss spike is judged by a robust z-score over a window of the
last good losses: distance from the median in units of the median absolute deviation, on a logarithmic scale while all
losses are positive (so that the threshold means the same early and late in training). Only `consecutiveSteps` spikes
in a row are bad; until then the step is suspect: it is applied, but nothing after it is kept as good.
"""

import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Health

WARM_UP_STEPS = 20
"""Losses in the window before a spike is judged at all (or the whole window, if that is shorter)."""
LEAST_DEVIATION = 0.05
"""Floor of the deviation, as a share of the median: early losses are often almost equal."""
_MAD_TO_SIGMA = 1.4826


class Call(StrEnum):
    GOOD = "good"
    SUSPECT = "suspect"
    """Applied, but the state after it is not to be trusted yet."""
    DISCARD = "discard"
    """Not applied; training goes on."""
    BAD = "bad"
    """Not applied; `action` says what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """About one step."""

    call: Call
    reason: RunReason | None = None
    message: str = ""
    action: str = ""
    """Rollback or Halt, of a bad step."""
    first_suspect: int = 0
    """The step with which the trouble began; rollback goes to before it."""


GOOD = Verdict(call=Call.GOOD)


class LossWindow:
    """The last `size` losses, with median and deviation by order statistics in O(log n) per question."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, loss: float) -> None:
        if len(self._recent) == self._size:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
        self._recent.append(loss)
        insort(self._ordered, loss)

    def resize(self, size: int) -> None:
        kept = list(self._recent)[-size:]
        self._size = size
        self.load(kept)

    def load(self, losses: list[float]) -> None:
        self._recent = deque(losses[-self._size :])
        self._ordered = sorted(self._recent)

    def losses(self) -> list[float]:
        """Oldest first."""
        return list(self._recent)

    def z_score(self, loss: float) -> float:
        """Of `loss` above the window. 0 when it is not above the median."""
        ordered = self._ordered
        middle = ordered[(len(ordered) - 1) // 2]
        if loss <= middle:
            return 0.0
        logarithmic = ordered[0] > 0.0
        scale = math.log if logarithmic else float
        median = scale(middle)
        least = math.log1p(LEAST_DEVIATION) if logarithmic else LEAST_DEVIATION * abs(middle)
        deviation = max(_MAD_TO_SIGMA * _median_deviation(ordered, median, scale), least, 1e-12)
        return (scale(loss) - median) / deviation


def _median_deviation(ordered: list[float], median: float, scale: Callable[[float], float]) -> float:
    """Lower median of |scale(x) - median|: the smallest d such that half of all x lie within d, by bisection."""
    count = len(ordered)
    middle = (count - 1) // 2
    wanted = (count + 1) // 2
    # A run of `wanted` neighbours that contains the middle; slide it to where its farther end is nearest.
    low, high = max(0, middle - wanted + 1), min(middle, count - wanted)
    while low < high:
        start = (low + high) // 2
        if median - scale(ordered[start]) > scale(ordered[start + wanted]) - median:
            low = start + 1
        else:
            high = start
    return max(median - scale(ordered[low]), scale(ordered[low + wanted - 1]) - median)


class Judge:
    """One per run. Its memory is part of the state that a rollback restores."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._window = LossWindow(health.loss_spike_window_steps)
        self._streak: list[tuple[int, float]] = []

    def configure(self, health: Health) -> None:
        """New limits; what is known stays."""
        if health.loss_spike_window_steps != self._health.loss_spike_window_steps:
            self._window.resize(health.loss_spike_window_steps)
        self._health = health

    @property
    def suspicious(self) -> bool:
        """A spike streak is open: states since its first step are not good."""
        return bool(self._streak)

    def check(self, step: int, loss: float, squared_norm: float, all_finite: Callable[[], bool]) -> Verdict:
        """`all_finite` is asked only when the sum of squares is not finite (it may merely overflow)."""
        if not math.isfinite(loss):
            return self._not_finite(step, RunReason.NON_FINITE_LOSS, f"the loss of step {step} is {loss}")
        if not math.isfinite(squared_norm) and not all_finite():
            message = f"the gradient of step {step} has values that are not finite"
            return self._not_finite(step, RunReason.NON_FINITE_GRADIENT, message)
        return self._spike(step, loss)

    def unsound(self, step: int, message: str) -> Verdict:
        """The state after `step`, which was applied, is not finite: treated as a loss that is not."""
        return self._not_finite(step, RunReason.NON_FINITE_WEIGHT, message)

    def _not_finite(self, step: int, reason: RunReason, message: str) -> Verdict:
        action = self._health.non_finite_action
        if action == "Ignore":
            return Verdict(call=Call.DISCARD, reason=reason, message=message)
        first = self._streak[0][0] if self._streak else step
        return Verdict(call=Call.BAD, reason=reason, message=message, action=action, first_suspect=first)

    def _spike(self, step: int, loss: float) -> Verdict:
        health = self._health
        enough = len(self._window) >= min(WARM_UP_STEPS, health.loss_spike_window_steps)
        if health.loss_spike_action == "Ignore" or not enough:
            self._absorb(loss)
            return GOOD
        z = self._window.z_score(loss)
        if z <= health.loss_spike_threshold:
            self._absorb(loss)
            return GOOD
        self._streak.append((step, loss))
        first = self._streak[0][0]
        message = f"loss {loss:.6g} at step {step}: robust z-score {z:.1f}, above {health.loss_spike_threshold:g}"
        if len(self._streak) < health.loss_spike_consecutive_steps:
            return Verdict(call=Call.SUSPECT, reason=RunReason.LOSS_SPIKE, message=message, first_suspect=first)
        if len(self._streak) > 1:
            message += f", the {len(self._streak)}th in a row"
        action = health.loss_spike_action
        return Verdict(call=Call.BAD, reason=RunReason.LOSS_SPIKE, message=message, action=action, first_suspect=first)

    def _absorb(self, loss: float) -> None:
        """A good loss ends a streak, whose losses then count as ordinary ones."""
        if self._streak:
            for _, spike in self._streak:
                self._window.add(spike)
            self._streak.clear()
        self._window.add(loss)

    def capture(self) -> bytes:
        """Window, then the open streak's losses behind it, as float64 with both counts in front."""
        window = self._window.losses()
        flat = array("d", [len(window), len(self._streak), *window])
        for step, loss in self._streak:
            flat.extend((step, loss))
        return flat.tobytes()

    def restore(self, state: bytes) -> None:
        flat = array("d")
        flat.frombytes(state)
        count, streak = int(flat[0]), int(flat[1])
        self._window.load(list(flat[2 : 2 + count]))
        rest = flat[2 + count :]
        self._streak = [(int(rest[2 * i]), rest[2 * i + 1]) for i in range(streak)]
