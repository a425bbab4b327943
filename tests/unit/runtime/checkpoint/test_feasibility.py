"""Whether the volume does for the state."""

from dataclasses import replace

import pytest
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint.feasibility import MAX_SAMPLES, Demand, Rate, obstacles

MIB = 1 << 20
FITS = Demand(
    size_bytes=100 * MIB,
    count=4,
    total_bytes=400 * MIB,
    save_seconds=2.0,
    free_bytes=100 * MIB,
    read_bytes_per_s=10 * MIB,
    deadline_seconds=10.0,
    period_seconds=2.0,
    rule=Retention(keep_latest=3, keep_best=1),
)


def test_just_enough_is_enough():
    assert obstacles(FITS) == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"read_bytes_per_s": 9.9 * MIB}, "read", "100.0 MiB at 9.9 MiB/s: 10.1 s, more than rollback.fullDeadline"),
        ({"deadline_seconds": 9.0}, "read", "(9 s)"),
        ({"save_seconds": 2.1}, "save", "took 2.1 s, but a checkpoint is asked for every 2.0 s"),
        ({"free_bytes": 99 * MIB}, "space", "needs 100.0 MiB more for checkpoints of 100.0 MiB; the volume has 99.0"),
        ({"count": 2, "free_bytes": 299 * MIB}, "space", "needs 300.0 MiB more"),
    ],
)
def test_each_obstacle_has_its_numbers(change: dict[str, float], kind: str, words: str):
    found = obstacles(replace(FITS, **change))  # type: ignore[arg-type]
    assert list(found) == [kind]
    assert words in found[kind]


@pytest.mark.parametrize("unknown", ["read_bytes_per_s", "period_seconds", "free_bytes"])
def test_what_is_not_known_is_no_obstacle(unknown: str):
    hard = replace(FITS, read_bytes_per_s=1.0, save_seconds=9e9, free_bytes=0)
    assert len(obstacles(hard)) == 3
    assert len(obstacles(replace(hard, **{unknown: None}))) == 2  # type: ignore[arg-type]


def test_a_limit_of_bytes_bounds_what_retention_needs():
    rule = Retention(keep_latest=50, keep_best=1, max_bytes=450 * MIB)
    assert obstacles(replace(FITS, rule=rule, free_bytes=150 * MIB)) == {}
    assert "space" in obstacles(replace(FITS, rule=rule, free_bytes=149 * MIB))


def test_a_rate_is_the_median_of_the_newest_transfers():
    rate = Rate()
    assert rate.bytes_per_s is None
    for seconds in (1.0, 2.0, 100.0):
        rate.add(100, seconds)
    assert rate.bytes_per_s == 50.0
    rate.add(100, 0.0)
    rate.add(0, 1.0)
    assert len(rate.samples) == 3
    for _ in range(100):
        rate.add(100, 1.0)
    assert len(rate.samples) == MAX_SAMPLES
