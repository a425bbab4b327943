import math

import pytest
from esper_runtime.tolaria.gradients import WARM_UP_STEPS, NormStatistics

FACTOR = 5.0


def filled(norms: list[float]) -> NormStatistics:
    found = NormStatistics()
    for norm in norms:
        found.absorb(norm, FACTOR)
    return found


def test_the_average_is_right_from_the_first_norm():
    assert filled([3.0]).mean == pytest.approx(3.0)
    assert filled([3.0] * 500).mean == pytest.approx(3.0)
    assert NormStatistics().mean == 0.0


def test_a_norm_above_factor_and_maximum_is_unusual():
    stats = filled([1.0] * 50)
    assert not stats.unusual(4.9, FACTOR)
    assert stats.unusual(5.1, FACTOR)


def test_norms_that_spike_now_and_then_may_spike_again():
    stats = filled([1.0] * 100 + [20.0] + [1.0] * 10)
    assert not stats.unusual(15.0, FACTOR)
    assert stats.unusual(21.0, FACTOR)


def test_the_maximum_fades():
    stats = filled([1.0] * 100 + [20.0] + [1.0] * 500)
    assert stats.unusual(15.0, FACTOR)


def test_one_spike_moves_the_average_no_more_than_the_factor_allows():
    assert filled([1.0] * 100 + [1e9]).mean == pytest.approx(1.0 + 0.02 * (FACTOR - 1), rel=0.2)


@pytest.mark.parametrize("norms", [[], [1.0] * (WARM_UP_STEPS - 1)])
def test_nothing_is_unusual_while_warming_up(norms: list[float]):
    assert not filled(norms).unusual(1e9, FACTOR)
    assert filled([1.0] * WARM_UP_STEPS).unusual(1e9, FACTOR)


def test_a_norm_that_overflowed_while_warming_up_leaves_no_trace():
    stats = filled([1.0] * 10 + [math.inf] + [1.0] * 20)
    assert stats.mean == pytest.approx(1.0)
    assert stats.unusual(math.inf, FACTOR)


def test_a_usual_norm_ends_the_streak():
    stats = filled([1.0] * 50)
    stats.suspect(100.0)
    stats.absorb(1.0, FACTOR)
    assert not stats.streak


def test_what_was_restored_equals_what_was_captured():
    one = filled([1.0 + 0.1 * math.sin(step) for step in range(70)])
    one.suspect(12.0)
    one.suspect(13.0)
    other = NormStatistics()
    other.restore(one.capture())
    assert other.streak == [12.0, 13.0]
    assert other.capture() == one.capture()
    assert other.unusual(40.0, FACTOR) == one.unusual(40.0, FACTOR)
