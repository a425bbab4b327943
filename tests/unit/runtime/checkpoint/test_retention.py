"""Which generations stay."""

from pathlib import Path

import pytest
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint.retention import Generation, best, superfluous


def generation(
    number: int,
    *,
    attempt: int = 1,
    step: int | None = None,
    loss: float | None = None,
    verified: bool = True,
    corrupt: bool = False,
    suspect: bool = False,
    size: int = 1,
    aged_at: float = 0.0,
) -> Generation:
    return Generation(
        attempt=attempt,
        number=number,
        step=number * 10 if step is None else step,
        epoch=0,
        path=Path(f"a{attempt:05d}/gen-{number:010d}"),
        size_bytes=size,
        created=0.0,
        aged_at=aged_at,
        suspect=suspect,
        metrics={} if loss is None else {"loss": loss},
        verified=verified,
        corrupt=corrupt,
    )


def deleted(generations: list[Generation], **rule: int | str) -> list[int]:
    return [g.number for g in superfluous(generations, Retention(**{"keep_best": 0, **rule}))]


def test_the_latest_stay():
    assert deleted([generation(n) for n in (1, 2, 3, 4, 5)], keep_latest=2) == [1, 2, 3]


def test_the_best_stays_however_old():
    several = [generation(n, loss=loss) for n, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3))]
    assert deleted(several, keep_latest=1, keep_best=1) == [1, 3]
    assert deleted(several, keep_latest=1, keep_best=1, mode="Max") == [2, 3]


def test_without_the_metric_nothing_is_best():
    assert deleted([generation(n) for n in (1, 2, 3)], keep_latest=1, keep_best=2) == [1, 2]


def test_of_equals_the_newer_is_better():
    several = [generation(n, loss=0.5) for n in (1, 2, 3)]
    assert [g.number for g in best(several, Retention(), 2)] == [3, 2]


def test_milestones_stay_although_no_save_met_them_exactly():
    several = [generation(n, step=step) for n, step in ((1, 40), (2, 90), (3, 110), (4, 160), (5, 205), (6, 250))]
    assert deleted(several, keep_latest=1, keep_every_steps=100) == [1, 2, 4]


def test_without_a_verified_one_nothing_goes():
    assert deleted([generation(n, verified=False) for n in (1, 2, 3, 4)], keep_latest=1) == []


def test_nothing_newer_than_the_last_verified_goes():
    several = [generation(1), generation(2), generation(3, verified=False), generation(4, verified=False)]
    assert deleted(several, keep_latest=1) == [1]


def test_the_last_verified_stays_behind_newer_unverified_ones():
    several = [generation(1), *(generation(n, verified=False) for n in (2, 3, 4, 5))]
    assert deleted(several, keep_latest=1) == []


def test_corrupt_ones_take_no_place_and_go_when_a_verified_one_is_newer():
    several = [generation(1), generation(2, corrupt=True), generation(3), generation(4)]
    assert deleted(several, keep_latest=3) == [2]


def test_a_newer_attempt_is_newer_whatever_its_steps():
    several = [generation(8, attempt=1, step=800), generation(9, attempt=2, step=300)]
    assert deleted(several, keep_latest=1) == [8]


@pytest.mark.parametrize("keep_latest", [0, -1])
def test_one_always_stays(keep_latest: int):
    assert deleted([generation(1), generation(2)], keep_latest=keep_latest) == [1]


HOUR = 3600


@pytest.mark.parametrize(
    ("max_age_seconds", "gone"), [(0, []), (4 * HOUR, []), (3 * HOUR, [1]), (2 * HOUR, [1, 2]), (1, [1, 2, 3, 4])]
)
def test_what_is_older_than_the_newest_by_the_limit_goes_whatever_else_would_keep_it(
    max_age_seconds: int, gone: list[int]
):
    several = [generation(n, loss=n, aged_at=n * HOUR) for n in (1, 2, 3, 4, 5)]
    assert deleted(several, keep_latest=5, keep_best=1, max_age_seconds=max_age_seconds) == gone


def test_ages_are_counted_from_the_newest_verified_one_not_from_now():
    several = [generation(1, aged_at=0), generation(2, aged_at=10), generation(3, aged_at=99, verified=False)]
    assert deleted(several, keep_latest=3, max_age_seconds=50) == []


@pytest.mark.parametrize(
    ("max_bytes", "gone"), [(0, []), (100, []), (99, [1]), (70, [1]), (69, [1, 2]), (40, [1, 2, 3]), (1, [1, 2, 3])]
)
def test_the_oldest_go_until_the_rest_fits_but_never_the_newest(max_bytes: int, gone: list[int]):
    several = [generation(n, size=size) for n, size in ((1, 30), (2, 20), (3, 10), (4, 40))]
    assert deleted(several, keep_latest=4, max_bytes=max_bytes) == gone


def test_nothing_older_is_kept_beyond_one_that_does_not_fit():
    several = [generation(1, size=1), generation(2, size=90), generation(3, size=10)]
    assert deleted(several, keep_latest=3, max_bytes=50) == [1, 2]


def test_a_suspect_one_takes_no_place_is_never_best_and_protects_nothing():
    several = [generation(1, loss=0.5), generation(2, loss=0.1, suspect=True), generation(3, loss=0.9)]
    assert deleted(several, keep_latest=2, keep_best=1) == [2]
    assert [g.number for g in best(several, Retention(), 3)] == [1, 3]
    alone = [generation(1, verified=False), generation(2, suspect=True)]
    assert deleted(alone, keep_latest=1) == []
    behind = [generation(1), generation(2), generation(3, suspect=True)]
    assert deleted(behind, keep_latest=1) == [1], "the newest good one and what is newer stay"
