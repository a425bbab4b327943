"""Tiers of going back with sources that say how they end, and a clock that they move."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.events import RunEvent
from esper_leyline.phases import RestoreOutcome, RollbackTier
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Rollback
from esper_runtime.checkpoint import Wal
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.restore import NotRestored, Restored, Tiers, TornStateError

OK, NONE, BROKEN, LATE, UNFIT = (
    RestoreOutcome.OK,
    RestoreOutcome.NO_CHECKPOINT,
    RestoreOutcome.INTEGRITY_FAILED,
    RestoreOutcome.DEADLINE_EXCEEDED,
    RestoreOutcome.APPLY_FAILED,
)
FAST, FULL = RollbackTier.FAST, RollbackTier.FULL
FAST_S, FULL_S = 0.5, 12.0


@dataclass
class World:
    """Both sources, the live state and the clock in one."""

    directory: Path
    fast: RestoreOutcome = OK
    fast_takes: float = 0.1
    full: RestoreOutcome = OK
    full_takes: float = 2.0
    best: RestoreOutcome = OK
    unfit: type[Exception] | None = None
    unsound: bool = False
    now: float = 100.0
    asked: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    snapshots: object = True

    def __post_init__(self) -> None:
        self.metrics = Metrics(None)
        self.facts = Facts(Wal(self.directory / "wal.log"), run_seconds=lambda: 0.0)
        this: Any = self
        self.tiers = Tiers(
            memory=this,
            checkpoints=this,
            facts=self.facts,
            events=this,
            metrics=self.metrics,
            monotonic=lambda: self.now,
        )

    def restore(self, target: str = "BeforeAnomaly", *, detected: float = 100.0) -> Restored | NotRestored:
        config = Rollback(
            target=target, fast_deadline_milliseconds=int(FAST_S * 1e3), full_deadline_seconds=int(FULL_S)
        )
        state: Any = self
        return self.tiers.restore(state, before_step=30, cause=RunReason.NON_FINITE_LOSS, config=config, began=detected)

    # Memory

    def restore_good(self, _: object, *, before_step: int, late: Any) -> tuple[RestoreOutcome, int | None]:
        self.asked.append(f"memory before {before_step}")
        self.now += self.fast_takes
        return self.fast, 20 if self.fast is OK else None

    def start_again_at(self, _: object) -> None:
        self.touched.append("memory")

    # Checkpoints

    def load_newest(self, *, before_step: int, deadline_s: float) -> tuple[RestoreOutcome, Any]:
        self.asked.append(f"newest before {before_step} within {deadline_s:g}")
        return self._load(self.full)

    def load_best(self, *, before_step: int, deadline_s: float) -> tuple[RestoreOutcome, Any]:
        self.asked.append(f"best before {before_step} within {deadline_s:g}")
        return self._load(self.best)

    def _load(self, outcome: RestoreOutcome) -> tuple[RestoreOutcome, Any]:
        self.now += self.full_takes
        self.step = 10
        return outcome, self if outcome is OK else None

    # State and events

    def is_sound(self, _: object) -> bool:
        return not self.unsound

    def restore_generation(self, _: object) -> None:
        self.touched.append("state")
        if self.unfit is not None:
            raise self.unfit("it does not fit")

    def notice(self, reason: RunReason, message: str, *, warning: bool, name: RunEvent) -> None:
        assert (reason, warning) == (RunReason.RESTORE_FAILED, True)
        assert name in (RunEvent.RESTORE_FAILED, RunEvent.ROLLBACK_DEADLINE)
        self.notices.append(message)

    # What was counted

    def counted(self) -> dict[str, float]:
        names = ("fast_hits_total", "fast_misses_total", "failures_total", "deadline_exceeded_total")
        found = {name: self.metrics.value(f"tolaria.rollback.{name}") for name in names}
        return {name: value for name, value in found.items() if value}

    def attempts(self) -> list[tuple[RollbackTier, RestoreOutcome]]:
        def tried(tier: RollbackTier, outcome: RestoreOutcome) -> bool:
            name = "tolaria.rollback.attempts_total"
            return bool(self.metrics.value(name, tier=tier, result=outcome, reason=RunReason.NON_FINITE_LOSS))

        return [(tier, outcome) for tier in (FAST, FULL) for outcome in RestoreOutcome if tried(tier, outcome)]

    def in_the_log(self) -> dict[str, int]:
        """Read anew, so what counts is what is durable."""
        counters = Facts(Wal(self.directory / "wal.log"), run_seconds=lambda: 0.0).counters()
        names = (
            "restores_without_checkpoint",
            "restores_failed_integrity",
            "restores_over_deadline",
            "restores_failed_apply",
        )
        return {name: getattr(counters, name) for name in names if getattr(counters, name)}


def test_memory_comes_first_and_is_enough(tmp_path: Path):
    world = World(tmp_path)
    assert world.restore() == Restored(step=20, tier=FAST, late=False)
    assert world.asked == ["memory before 30"]
    assert world.attempts() == [(FAST, OK)]
    assert world.counted() == {"fast_hits_total": 1}
    assert (world.notices, world.in_the_log()) == ([], {})


LOGGED = {
    NONE: "restores_without_checkpoint",
    BROKEN: "restores_failed_integrity",
    LATE: "restores_over_deadline",
    UNFIT: "restores_failed_apply",
}


@pytest.mark.row("T19", "T20")
@pytest.mark.parametrize("outcome", [NONE, BROKEN, LATE, UNFIT])
def test_a_fast_tier_that_fails_escalates_and_its_outcome_is_kept_apart(tmp_path: Path, outcome: RestoreOutcome):
    world = World(tmp_path, fast=outcome)
    assert world.restore() == Restored(step=10, tier=FULL, late=False)
    assert world.asked == ["memory before 30", "newest before 30 within 12"]
    assert world.attempts() == [(FAST, outcome), (FULL, OK)]
    late = {"deadline_exceeded_total": 1} if outcome is LATE else {}
    assert world.counted() == {"fast_misses_total": 1, "failures_total": 1, **late}
    assert world.in_the_log() == {LOGGED[outcome]: 1}
    assert world.notices == [f"Fast tier of rollback: {outcome} after 100 ms"]


@pytest.mark.row("T19")
@pytest.mark.parametrize(("takes", "late"), [(0.5, False), (0.51, True)])
def test_a_fast_state_in_place_after_its_deadline_is_kept_and_said_to_be_late(tmp_path: Path, takes: float, late: bool):
    world = World(tmp_path, fast_takes=takes)
    assert world.restore() == Restored(step=20, tier=FAST, late=late)
    assert world.attempts() == [(FAST, LATE if late else OK)]
    assert world.counted() == {"fast_hits_total": 1, **({"deadline_exceeded_total": 1} if late else {})}
    assert world.in_the_log() == ({"restores_over_deadline": 1} if late else {})
    said = "Fast tier of rollback: deadline_exceeded after 510 ms; "
    kept = "the state of step 20 is verified and in place, and is kept"
    assert world.notices == ([said + kept] if late else [])


def test_the_fast_deadline_counts_from_the_detection(tmp_path: Path):
    restored = World(tmp_path).restore(detected=99.5)
    assert isinstance(restored, Restored)
    assert restored.late


def test_time_that_the_fast_tier_took_is_not_taken_off_the_full_one(tmp_path: Path):
    world = World(tmp_path, fast=BROKEN, fast_takes=30.0)
    assert world.restore() == Restored(step=10, tier=FULL, late=False)


@pytest.mark.row("T20", "T26")
@pytest.mark.parametrize("outcome", [NONE, BROKEN, LATE])
def test_when_both_tiers_fail_there_is_no_state(tmp_path: Path, outcome: RestoreOutcome):
    world = World(tmp_path, fast=NONE, full=outcome)
    failed = world.restore()
    assert failed == NotRestored(outcomes=((FAST, NONE), (FULL, outcome)))
    assert str(failed) == f"Fast tier: no_checkpoint, Full tier: {outcome}"
    assert failed.nothing_there is (outcome is NONE)
    assert world.attempts() == [(FAST, NONE), (FULL, outcome)]


@pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError])
def test_a_broken_off_copy_that_nothing_replaces_ends_the_process(tmp_path: Path, error: type[Exception]):
    world = World(tmp_path, fast=BROKEN, unfit=error)
    with pytest.raises(TornStateError, match="Fast tier: integrity_failed, Full tier: apply_failed"):
        world.restore()
    assert world.in_the_log() == {"restores_failed_integrity": 1, "restores_failed_apply": 1}


def test_a_broken_off_copy_may_be_replaced_by_another_source(tmp_path: Path):
    world = World(tmp_path, unfit=RuntimeError)
    assert world.restore("LatestVerified") == Restored(step=20, tier=FAST, late=False)
    assert world.attempts() == [(FAST, OK), (FULL, UNFIT)]


def test_a_checkpoint_that_is_not_finite_is_no_state(tmp_path: Path):
    world = World(tmp_path, fast=NONE, unsound=True)
    assert world.restore() == NotRestored(outcomes=((FAST, NONE), (FULL, BROKEN)))
    assert world.touched == [], "what memory holds may still be needed"


def test_the_best_is_asked_for_then_the_newest_then_memory(tmp_path: Path):
    world = World(tmp_path, best=NONE, full=NONE)
    assert world.restore("Best") == Restored(step=20, tier=FAST, late=False)
    assert world.asked == ["best before 30 within 12", "newest before 30 within 10", "memory before 30"]


def test_a_late_load_is_not_followed_by_another_one(tmp_path: Path):
    world = World(tmp_path, best=LATE)
    assert world.restore("Best") == Restored(step=20, tier=FAST, late=False)
    assert world.asked == ["best before 30 within 12", "memory before 30"]


def test_memory_that_is_off_is_a_miss_and_no_failure(tmp_path: Path):
    world = World(tmp_path, snapshots=None)
    assert world.restore() == Restored(step=10, tier=FULL, late=False)
    assert world.attempts() == [(FULL, OK)]
    assert world.counted() == {"fast_misses_total": 1}
    assert world.in_the_log() == {}
