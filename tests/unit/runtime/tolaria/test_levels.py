"""The emergency levels: the table of entries and exits, one step down at a time, nothing lost on the way."""

from itertools import count

import pytest
from esper_leyline.reasons import RunReason
from esper_runtime.tolaria.levels import LEAVE, LevelError, Levels, cut

from tests.support.standing import Clock

pytestmark = pytest.mark.row("T24")
CAUSE = RunReason.SIDECAR_DOWN


class Run:
    def __init__(self, level: int = 0) -> None:
        self.clock = Clock()
        ids = count(1)
        self.levels = Levels(level, seconds=self.clock, new_id=lambda: f"id-{next(ids)}")
        self.quiet = True

    def healthy(self, boundaries: int, *, seconds: float = 0.0) -> list[int]:
        """Levels after each of so many healthy boundaries, `seconds` apart."""
        seen = []
        for _ in range(boundaries):
            self.clock.pass_s(seconds)
            self.levels.boundary(healthy=True, breakers_closed=self.quiet)
            seen.append(self.levels.level)
        return seen


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_any_level_is_reached_at_once_and_a_lower_cause_changes_nothing(level: int):
    run = Run()
    change = run.levels.cause(level, CAUSE, "why")
    assert change is not None
    assert (change.before, change.after, change.reason, change.message, change.id) == (0, level, CAUSE, "why", "id-1")
    for lower in range(1, level + 1):
        assert run.levels.cause(lower, CAUSE, "why") is None
    assert run.levels.level == level


@pytest.mark.parametrize("level", [-1, 0, 5, 99])
def test_an_illegal_level_is_rejected(level: int):
    run = Run(2)
    with pytest.raises(LevelError, match=f"emergency level {level}; it must be from 1 to 4"):
        run.levels.cause(level, CAUSE, "why")
    assert run.levels.level == 2


@pytest.mark.parametrize("message", ["", "é" * 129])
def test_a_text_of_no_or_too_many_bytes_is_rejected(message: str):
    run = Run()
    with pytest.raises(LevelError, match="bytes; give 1 to 256"):
        run.levels.cause(3, CAUSE, message)
    assert run.levels.level == 0
    assert len(cut("é" * 200).encode()) <= 256


@pytest.mark.parametrize(
    ("level", "boundaries", "seconds"), [(1, 3, 0.0), (2, 5, 60.0), (3, 10, 300.0)], ids=["L1", "L2", "L3"]
)
def test_a_level_is_left_one_down_after_its_healthy_boundaries_and_its_time(
    level: int, boundaries: int, seconds: float
):
    run = Run()
    run.levels.cause(level, CAUSE, "why")
    run.clock.pass_s(seconds)
    assert run.healthy(boundaries) == [level] * (boundaries - 1) + [level - 1]
    if seconds:
        early = Run()
        early.levels.cause(level, CAUSE, "why")
        early.clock.pass_s(seconds - 0.1)
        assert early.healthy(boundaries + 5)[-1] == level
        assert early.healthy(1, seconds=0.1) == [level - 1]


def test_from_three_to_none_every_level_asks_for_its_own_health_and_time():
    run = Run(3)
    seen = run.healthy(400, seconds=1.0)
    assert [seen.count(level) for level in (3, 2, 1)] == [299, 60, 3]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0


def test_level_three_is_kept_while_a_breaker_is_open():
    run = Run(3)
    run.quiet = False
    assert set(run.healthy(20, seconds=100.0)) == {3}
    run.quiet = True
    assert run.healthy(1) == [2]


def test_an_unhealthy_boundary_and_any_cause_begin_the_count_again():
    for disturb in (
        lambda run: run.levels.boundary(healthy=False, breakers_closed=True),
        lambda run: run.levels.cause(1, CAUSE, "again"),
    ):
        run = Run()
        run.levels.cause(1, CAUSE, "why")
        run.healthy(2)
        disturb(run)
        assert run.healthy(3) == [1, 1, 0]


def test_a_boundary_at_which_nobody_could_be_asked_counts_neither_way():
    run = Run()
    run.levels.cause(1, CAUSE, "why")
    run.healthy(2)
    for _ in range(10):
        run.levels.boundary(healthy=None, breakers_closed=True)
    assert run.levels.level == 1
    assert run.healthy(1) == [0]


def test_halt_is_never_left_by_health():
    run = Run(4)
    assert set(run.healthy(1000, seconds=100.0)) == {4}
    assert 4 not in LEAVE


def test_a_new_pod_lifts_a_halt_and_nothing_less():
    for level, after in [(4, 0), (3, 3), (1, 1)]:
        run = Run(level)
        change = run.levels.begin_again("a new pod")
        assert run.levels.level == after
        assert (change is not None) == (level == 4)


@pytest.mark.row("T26")
@pytest.mark.parametrize("kinds", [["a", "a", "a"], ["a", "b", "a"]])
def test_three_failed_boundaries_without_a_healthy_one_between_halt(kinds: list[str]):
    run = Run()
    levels = []
    for kind in kinds:
        run.levels.boundary(healthy=None, breakers_closed=True)  # neither failed nor healthy: no way out
        run.levels.boundary(healthy=False, failure=kind, breakers_closed=True)
        levels.append(run.levels.level)
    assert levels == [0, 2, 4]
    assert run.levels.owed_to is not None
    assert run.levels.owed_to.message.endswith(", ".join(kinds))


def test_a_healthy_boundary_between_failed_ones_saves_from_halt_but_not_from_elevated():
    run = Run()
    for _ in range(20):
        run.levels.boundary(healthy=False, failure="a", breakers_closed=True)
        run.healthy(1)
    assert run.levels.level == 2


def test_two_failed_boundaries_far_apart_are_no_reason():
    run = Run()
    for _ in range(5):
        run.levels.boundary(healthy=False, failure="a", breakers_closed=True)
        run.healthy(4)
    assert run.levels.level == 0


def test_repeated_causes_are_told_together_at_most_every_five_seconds():
    run = Run()
    run.levels.cause(2, CAUSE, "first")
    told = []
    for second in range(20):
        run.levels.cause(2, CAUSE, f"at {second}")
        run.clock.pass_s(1.0)
        repeats = run.levels.repeats()
        if repeats is not None:
            told.append((second, repeats.count, repeats.message))
    assert told == [(4, 5, "at 4"), (9, 5, "at 9"), (14, 5, "at 14"), (19, 5, "at 19")]
    assert run.levels.repeats() is None


def test_a_change_in_the_middle_of_a_storm_is_told_at_once():
    run = Run()
    run.levels.cause(2, CAUSE, "first")
    for _ in range(100):
        run.levels.cause(2, CAUSE, "again")
    change = run.levels.cause(4, CAUSE, "worse")
    assert change is not None
    assert (change.before, change.after) == (2, 4)
