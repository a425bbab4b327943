import math
import random
import statistics

import pytest
from esper_runtime.tolaria.losses import (
    BURST_SHARE,
    BURST_STREAKS,
    EARLY_DEVIATION,
    EARLY_LOSSES,
    EXPLOSION_FACTOR,
    LEAST_DEVIATION,
    LONGEST_STREAKS,
    OUTLIER_SHARE,
    LossStatistics,
    LossWindow,
)
from hypothesis import given
from hypothesis import strategies as st

THRESHOLD = 3.0
CONSECUTIVE = 3


def filled(losses: list[float], size: int = 100) -> LossStatistics:
    found = LossStatistics(size)
    for loss in losses:
        found.absorb(loss)
    return found


def noise(steps: int, *, level: float = 1.0, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [level * generator.lognormvariate(0, 0.1) for _ in range(steps)]


def wandering(steps: int) -> list[float]:
    """Losses of which each is much like the one before."""
    generator = random.Random(1)
    place, found = 0.0, []
    for _ in range(steps):
        place = 0.95 * place + generator.gauss(0, 0.05)
        found.append(math.exp(place))
    return found


def streak(stats: LossStatistics, z: float, length: int) -> list[bool]:
    """Whether it is trouble after each of so many losses with this z-score."""
    found = []
    for _ in range(length):
        stats.suspect(9.0, z)
        found.append(stats.is_trouble(THRESHOLD, CONSECUTIVE))
    return found


@given(
    st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=60),
    st.floats(min_value=1e-3, max_value=1e6),
    st.integers(min_value=1, max_value=40),
)
def test_z_score_equals_the_definition(losses: list[float], loss: float, size: int):
    window = LossWindow(size)
    for value in losses:
        window.add(value)
    kept = losses[-size:]
    logs = sorted(math.log(value) for value in kept)
    median = logs[(len(logs) - 1) // 2]
    deviation = statistics.median_low([abs(value - median) for value in logs])
    scale = max(1.4826 * deviation, math.log1p(LEAST_DEVIATION))
    expected = max(0.0, (math.log(loss) - median) / scale)
    assert window.z_score(loss, logarithmic=True, least=LEAST_DEVIATION) == pytest.approx(expected, abs=1e-9)
    assert window.losses() == kept


def test_a_loss_inside_the_band_is_usual_whatever_its_z_score():
    losses = [1.0] * 90 + [3.0] * 10
    assert filled(losses).unusual(2.9, THRESHOLD) == 0.0
    assert filled(losses).unusual(3.1, THRESHOLD) > THRESHOLD


def test_the_highest_few_losses_do_not_widen_the_band():
    few = 100 // OUTLIER_SHARE
    losses = noise(100)
    spiked = [*losses[:40], *([50.0] * few), *losses[40 : 100 - few]]
    assert filled(spiked).unusual(3.0, THRESHOLD) > THRESHOLD
    spiked = [*losses[:40], *([50.0] * (few + 1)), *losses[40 : 99 - few]]
    assert filled(spiked).unusual(3.0, THRESHOLD) == 0.0


def test_a_falling_loss_is_compared_with_its_newest_part():
    falling = [math.exp(-step / 40) for step in range(100)]
    rise = 5 * falling[-1]
    assert rise < falling[0]
    assert filled(falling).unusual(rise, THRESHOLD) > THRESHOLD
    assert filled(list(reversed(falling))).unusual(rise, THRESHOLD) == 0.0


def test_losses_below_zero_are_judged_on_a_linear_scale():
    signed = filled([-1.0 + 0.01 * (step % 7) for step in range(50)])
    assert signed.unusual(-0.9, THRESHOLD) == 0.0
    assert signed.unusual(3.0, THRESHOLD) > THRESHOLD


def test_few_losses_need_a_wider_step():
    early, late = filled([1.0] * 5), filled([1.0] * 50)
    assert early.unusual(1.3, THRESHOLD) == 0.0
    widest = 1.0 + EARLY_DEVIATION * (1.0 + EARLY_LOSSES / 5)
    assert early.unusual(widest ** (THRESHOLD - 0.1), THRESHOLD) == 0.0
    assert early.unusual(widest ** (THRESHOLD + 0.1), THRESHOLD) > THRESHOLD
    assert late.unusual(1.3, THRESHOLD) > THRESHOLD
    assert LossStatistics(100).unusual(1e9, THRESHOLD) == 0.0


def test_early_signed_losses_are_measured_by_what_they_have_spanned():
    early = filled([0.1, 0.1, 0.1, -0.5])
    assert early.unusual(0.8, THRESHOLD) == 0.0
    assert early.unusual(2.0, THRESHOLD) > THRESHOLD


def test_independent_losses_are_trouble_at_the_kth():
    assert streak(filled(noise(100)), THRESHOLD + 0.01, 3) == [False, False, True]


def test_wandering_losses_need_more_by_height_or_by_length():
    longest = LONGEST_STREAKS * CONSECUTIVE
    low = streak(filled(wandering(100)), THRESHOLD + 0.01, longest)
    assert low.index(True) > CONSECUTIVE
    assert low[-1]
    assert streak(filled(wandering(100)), 10 * THRESHOLD, CONSECUTIVE)[-1]


def test_a_steady_fall_is_no_wandering():
    falling = [math.exp(-step / 20) * loss for step, loss in enumerate(noise(100))]
    assert streak(filled(falling), THRESHOLD + 0.01, 3)[-1]


def test_a_burst_far_below_the_first_losses_is_given_time():
    fallen = [2.0] * 50 + noise(200, level=0.001)
    longest = BURST_STREAKS * CONSECUTIVE
    found = []
    stats = filled(fallen)
    for _ in range(longest):
        stats.suspect(2.0 * BURST_SHARE * 0.9, 30.0)
        found.append(stats.is_trouble(THRESHOLD, CONSECUTIVE))
    assert found == [False] * (longest - 1) + [True]
    stats = filled(fallen)
    for _ in range(CONSECUTIVE):
        stats.suspect(2.0 * BURST_SHARE * 1.1, 30.0)
    assert stats.is_trouble(THRESHOLD, CONSECUTIVE), "as bad as in the beginning"


def test_one_loss_beyond_everything_is_an_explosion():
    stats = filled(noise(100))
    assert stats.is_explosion(2 * EXPLOSION_FACTOR, 100.0, THRESHOLD)
    assert not stats.is_explosion(0.5 * EXPLOSION_FACTOR, 100.0, THRESHOLD), "not so high"
    assert not stats.is_explosion(2 * EXPLOSION_FACTOR, 4 * THRESHOLD, THRESHOLD), "heavy tails reach any factor"
    assert not filled(noise(30)).is_explosion(2 * EXPLOSION_FACTOR, 100.0, THRESHOLD), "too early"
    assert not filled([*noise(99), -1.0]).is_explosion(2 * EXPLOSION_FACTOR, 100.0, THRESHOLD), "no ratio of signed"


def test_a_loss_once_high_is_no_explosion_when_it_comes_back():
    """From 2.3 to a thousandth of it; then a batch at 1.0."""
    fallen = filled([2.3] * 50 + [0.002] * 300)
    assert not fallen.is_explosion(1.0, 100.0, THRESHOLD)


def test_a_benign_spike_leaves_the_average_alone():
    stats = filled(noise(100))
    stats.suspect(1e6, 50.0)
    stats.absorb(1.0)
    assert not stats.streak
    assert stats.is_explosion(2 * EXPLOSION_FACTOR, 100.0, THRESHOLD)


@given(
    st.lists(st.floats(min_value=-1e3, max_value=1e3), max_size=60),
    st.lists(st.floats(min_value=1e4, max_value=1e6), max_size=4),
    st.integers(min_value=5, max_value=40),
    st.lists(st.floats(min_value=-1e4, max_value=1e7), max_size=10),
)
def test_what_was_restored_goes_on_like_what_was_captured(
    losses: list[float], spikes: list[float], size: int, later: list[float]
):
    one = filled(losses, size)
    for spike in spikes:
        one.suspect(spike, 5.0)
    other = LossStatistics(size)
    other.restore(one.capture())
    for loss in later:
        zs = [stats.unusual(loss, THRESHOLD) for stats in (one, other)]
        assert zs[0] == zs[1]
        for stats in (one, other):
            if zs[0]:
                stats.suspect(loss, zs[0])
            else:
                stats.absorb(loss)
        assert one.is_trouble(THRESHOLD, 2) == other.is_trouble(THRESHOLD, 2)
        assert one.capture() == other.capture()


def test_what_is_captured_is_as_long_for_an_empty_window_as_for_a_full_one():
    assert len(LossStatistics(100).capture()) == len(filled(noise(500)).capture())


def test_a_window_of_another_size_keeps_the_newest_losses():
    stats = filled(noise(100))
    stats.resize(10)
    assert stats.capture()[6:] == noise(100)[-10:]
    other = LossStatistics(20)
    other.restore(filled(noise(100)).capture())
    assert other.capture()[6:] == noise(100)[-20:]
