"""What is usual for the L2 norm of the gradient, and whether it has left it.

The norm is that of what backward gave, before any clipping: clipping limits the step, not the cause. A norm is unusual
when it is more than `factor` times its moving average (corrected for its start at zero) and above a maximum that fades
by a hundredth per step, unless the loss is among the lowest quarter of its window: a gradient that grows while the loss
falls is learning, such as that of a deep network which leaves its first plateau.
"""

import math
from collections.abc import Sequence

WARM_UP_STEPS = 20
"""Norms that are accepted before any is judged."""
_RATE = 0.02
"""Of the moving average."""
_FADE = 0.99


class NormStatistics:
    """Moving average, fading maximum and open streak of one run."""

    def __init__(self) -> None:
        self.streak: list[float] = []
        """The unusual norms since the last usual one."""
        self._mean = 0.0
        self._weight = 0.0
        self._maximum = 0.0
        self._count = 0

    @property
    def mean(self) -> float:
        """0 before the first norm."""
        return self._mean / self._weight if self._weight else 0.0

    def unusual(self, norm: float, factor: float) -> bool:
        return norm > self._maximum and self._count >= WARM_UP_STEPS and norm > factor * self.mean

    def suspect(self, norm: float) -> None:
        self.streak.append(norm)

    def absorb(self, norm: float, factor: float) -> None:
        """An ordinary norm ends a streak, whose norms then count as ordinary, the average's share of them limited."""
        if self.streak:
            for spike in self.streak:
                self._keep(spike, factor)
            self.streak.clear()
        self._keep(norm, factor)

    def _keep(self, norm: float, factor: float) -> None:
        if not math.isfinite(norm):
            return  # a sum of squares that overflowed, while warming up
        if self._count < WARM_UP_STEPS:
            self._count += 1
            share = norm
        else:
            share = min(norm, factor * self.mean)
        self._maximum = max(norm, _FADE * self._maximum)
        self._mean += _RATE * (share - self._mean)
        self._weight += _RATE * (1.0 - self._weight)

    def capture(self) -> list[float]:
        return [self._mean, self._weight, self._maximum, self._count, *self.streak]

    def restore(self, saved: Sequence[float]) -> None:
        """What `capture` gave."""
        self._mean, self._weight, self._maximum = saved[:3]
        self._count = int(saved[3])
        self.streak = list(saved[4:])
