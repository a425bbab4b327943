"""What is usual for the training loss, and whether losses have left it: the statistics behind the judge.

A loss is unusual when it lies above its band (the highest few of a window of accepted losses do not count, so that one
bad batch does not hide the next) and its robust z-score is above the threshold: distance from the median in units of
the median absolute deviation, on a logarithmic scale while all losses are positive, so that a threshold means the same
early and late in training. While the loss falls, the band is that of the newest quarter of the window; an old, higher
one would hide a divergence. Unusual losses are kept apart, as the streak, until it is known what they are.

A streak of K losses is trouble when independent losses would hardly ever give it. Losses that wander (a high learning
rate, a small validation-like batch) stay on one side for many steps by themselves, so at the K-th the window's
autocorrelation is looked at: the more of it, the more must come together, by length or by height.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

WARM_UP_STEPS = 20
"""With fewer losses (or than the whole window, if that is shorter) the floor of the deviation is EARLY_DEVIATION."""
LEAST_DEVIATION = 0.05
"""Floor of the deviation, as a share of the median: losses may be almost equal."""
EARLY_DEVIATION = 0.25
EARLY_LOSSES = 5.0
"""With so many losses EARLY_DEVIATION counts twice, with fewer more often: of one or two next to nothing is known."""
NEWEST_SHARE = 4
"""The band of a falling loss is that of one in so many of the window."""
LEAST_NEWEST = 5
OUTLIER_SHARE = 33
"""One in so many of the highest losses of a window is no part of its band."""
EXPLOSION_FACTOR = 15.0
"""A single loss so many times the highest moving average is trouble at once ..."""
EXPLOSION_THRESHOLDS = 5.0
"""... when its z-score is so many thresholds: heavy-tailed losses reach any factor."""
LONGEST_STREAKS = 5
"""So many times K losses in a row are trouble, however much they wander."""
BURST_SHARE = 1.0 / 3.0
"""A streak whose losses stay below this share of the highest moving average is a burst, as of an optimizer whose
denominators have become small; most end by themselves ..."""
BURST_STREAKS = 4
"""... before so many times K losses."""
CORRELATED_STEPS = 200
"""Losses at most that the autocorrelation is taken from."""
_MAX_CORRELATION = 0.9
_RATE = 0.02
"""Of the moving average."""
_MAD_TO_SIGMA = 1.4826


class LossWindow:
    """The last `size` losses, with median and deviation by order statistics in O(log n) per question."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: deque[float] = deque()
        """Oldest first."""
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, loss: float) -> None:
        recent, ordered = self._recent, self._ordered
        if len(recent) == self._size:
            del ordered[bisect_left(ordered, recent.popleft())]
        recent.append(loss)
        insort(ordered, loss)

    def load(self, losses: Sequence[float]) -> None:
        self._recent = deque(losses[-self._size :])
        self._ordered = sorted(self._recent)

    def losses(self) -> list[float]:
        """Oldest first."""
        return list(self._recent)

    @property
    def positive(self) -> bool:
        """All of them; of an empty window too."""
        return not self._ordered or self._ordered[0] > 0.0

    @property
    def median(self) -> float:
        """The lower one."""
        return self._ordered[(len(self._ordered) - 1) // 2]

    @property
    def lower_quartile(self) -> float:
        return self._ordered[len(self._ordered) // 4]

    @property
    def top(self) -> float:
        """Of the band: the highest loss but for outliers."""
        ordered = self._ordered
        return ordered[-1 - len(ordered) // OUTLIER_SHARE]

    def z_score(self, loss: float, *, logarithmic: bool, least: float) -> float:
        """Of `loss` above the window. 0 when it is not above the median. `least` is the floor of the deviation, as a
        share of the median.
        """
        ordered = self._ordered
        middle = self.median
        if loss <= middle:
            return 0.0
        scale = math.log if logarithmic else float
        median = scale(middle)
        floor = math.log1p(least) if logarithmic else least * abs(middle)
        deviation = max(_MAD_TO_SIGMA * _median_deviation(ordered, median, scale), floor, 1e-12)
        return (scale(loss) - median) / deviation

    @property
    def spread(self) -> float:
        return self._ordered[-1] - self._ordered[0]


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


class LossStatistics:
    """Window, moving average and open streak of one run."""

    def __init__(self, size: int) -> None:
        self._resize(size)
        self.streak: list[tuple[float, float]] = []
        """(loss, z-score) of the unusual losses since the last usual one."""
        self._mean = 0.0
        self._weight = 0.0
        self._highest_mean = 0.0
        self._spacing = 1.0

    def _resize(self, size: int) -> None:
        self._size = size
        self._window = LossWindow(size)
        self._newest = LossWindow(max(LEAST_NEWEST, size // NEWEST_SHARE))

    def resize(self, size: int) -> None:
        """Keeps the newest losses."""
        kept = self._window.losses()
        self._resize(size)
        self._window.load(kept)
        self._newest.load(kept)

    def __len__(self) -> int:
        return len(self._window)

    # Judging

    def unusual(self, loss: float, threshold: float) -> float:
        """Its z-score, when that is above `threshold` and the loss above the band; 0 otherwise."""
        window, newest = self._window, self._newest
        if not len(window) or (loss <= window.top and (loss <= newest.top or not self._falling())):
            return 0.0
        band = newest if self._falling() else window
        if loss <= band.top:
            return 0.0
        z = band.z_score(loss, logarithmic=window.positive, least=self._least_deviation())
        return z if z > threshold else 0.0

    def _falling(self) -> bool:
        """Half of the newest losses are among the lowest quarter of all."""
        window, newest = self._window, self._newest
        return len(window) >= 2 * len(newest) and newest.median < window.lower_quartile

    def _least_deviation(self) -> float:
        window = self._window
        if len(window) >= min(WARM_UP_STEPS, self._size):
            return LEAST_DEVIATION
        early = EARLY_DEVIATION * (1.0 + EARLY_LOSSES / len(window))
        if window.positive:
            return early
        # Signed losses have no natural scale: what they have spanned so far stands for one.
        return early * max(1.0, window.spread / max(abs(window.median), 1e-12))

    def suspect(self, loss: float, z: float) -> None:
        self.streak.append((loss, z))

    def is_explosion(self, loss: float, z: float, threshold: float) -> bool:
        """This loss alone is trouble."""
        grown = len(self._window) >= self._size // 2 and self._window.positive
        return grown and loss > EXPLOSION_FACTOR * self._highest_mean and z > EXPLOSION_THRESHOLDS * threshold

    def is_trouble(self, threshold: float, consecutive: int) -> bool:
        """The open streak is."""
        length = len(self.streak)
        if length < consecutive:
            return False
        if length == consecutive or self._spacing == 0.0:
            self._spacing = self._independent_every()
        if length >= LONGEST_STREAKS * consecutive:
            return True
        if self._is_burst() and length < BURST_STREAKS * consecutive:
            return False
        mean_z = sum(z for _, z in self.streak) / length
        return mean_z * math.sqrt(length / self._spacing) >= threshold * math.sqrt(consecutive)

    def _is_burst(self) -> bool:
        """Far above the band, yet the run is far better than it was in the beginning: it may well come back."""
        mean = sum(loss for loss, _ in self.streak) / len(self.streak)
        return self._window.positive and mean < BURST_SHARE * self._highest_mean

    def _independent_every(self) -> float:
        """Steps between two losses that say something new: (1 + r) / (1 - r) for autocorrelation r at one step."""
        losses = self._window.losses()[-CORRELATED_STEPS:]
        if len(losses) < WARM_UP_STEPS:
            return 1.0
        scale = math.log if self._window.positive else float
        rest = _without_trend([scale(loss) for loss in losses])
        limit = 3.0 * _MAD_TO_SIGMA * sorted(map(abs, rest))[len(rest) // 2]
        rest = [max(-limit, min(limit, value)) for value in rest]
        power = sum(value * value for value in rest)
        if power <= 0.0:
            return 1.0
        # Less twice its standard error: independent losses count as such.
        found = sum(a * b for a, b in pairwise(rest)) / power - 2.0 / math.sqrt(len(rest))
        correlation = min(max(found, 0.0), _MAX_CORRELATION)
        return (1.0 + correlation) / (1.0 - correlation)

    def is_low(self, loss: float) -> bool:
        """Among the lowest quarter of the window."""
        return bool(len(self._window)) and loss < self._window.lower_quartile

    # Remembering

    def absorb(self, loss: float) -> None:
        """An ordinary loss ends a streak, whose losses then belong to the window, but not to the average."""
        if self.streak:
            for spike, _ in self.streak:
                self._window.add(spike)
                self._newest.add(spike)
            self.streak.clear()
        self._window.add(loss)
        self._newest.add(loss)
        self._mean += _RATE * (loss - self._mean)
        self._weight += _RATE * (1.0 - self._weight)
        mean = self._mean / self._weight
        if mean > self._highest_mean:
            self._highest_mean = mean

    def capture(self) -> list[float]:
        """As long as `size` and the open streak say, however full the window is: snapshots keep their layout."""
        losses = self._window.losses()
        padding = [0.0] * (self._size - len(losses))
        streak = [value for entry in self.streak for value in entry]
        averages = [self._mean, self._weight, self._highest_mean]
        return [len(losses), len(self.streak), self._size, *averages, *losses, *padding, *streak]

    def restore(self, saved: Sequence[float]) -> None:
        """What `capture` gave, perhaps of a window of another size."""
        count, streak, size = (int(value) for value in saved[:3])
        self._mean, self._weight, self._highest_mean = saved[3:6]
        losses = saved[6 : 6 + count]
        self._window.load(losses)
        self._newest.load(losses)
        rest = saved[6 + size :]
        self.streak = [(rest[2 * i], rest[2 * i + 1]) for i in range(streak)]
        self._spacing = 0.0  # of the window as it is now, when it is asked for


def _without_trend(values: Sequence[float]) -> list[float]:
    """Distances from the least-squares line."""
    count = len(values)
    middle, mean = (count - 1) / 2.0, math.fsum(values) / count
    slope = sum((i - middle) * value for i, value in enumerate(values)) * 12.0 / (count * (count * count - 1.0))
    return [value - mean - slope * (i - middle) for i, value in enumerate(values)]
