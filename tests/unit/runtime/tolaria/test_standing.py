"""Breakers, conservative mode and level together: what they tell, what they keep, what they let go on."""

from pathlib import Path

import pytest
from esper_leyline.reasons import RunReason
from esper_runtime.checkpoint import Wal
from esper_runtime.tolaria.breaker import CLOSED, HALF_OPEN, OPEN
from esper_runtime.tolaria.levels import LevelError
from esper_runtime.tolaria.stability import Part

from tests.support.standing import Ward


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def trip(ward: Ward, part: Part) -> None:
    for number in range(3):
        ward.standing.failed(part, f"failure {number}")


@pytest.mark.row("T24")
@pytest.mark.parametrize(
    ("part", "level", "reason"),
    [
        (Part.TAMIYO, 1, "SidecarDown"),
        (Part.KASMINA, 1, "SidecarDown"),
        (Part.BOUNDARY_TIMING, 1, "BoundaryBudgetExceeded"),
        (Part.OPTIMIZER_REBUILD, 1, "OptimizerRebuildFailed"),
        (Part.LR_INTEGRITY, 2, "LearningRateTampered"),
        (Part.CHECKPOINT, 2, "CheckpointFailed"),
    ],
)
def test_one_failure_has_the_level_of_its_part_and_an_open_breaker_is_level_three(
    ward: Ward, part: Part, level: int, reason: str
):
    ward.standing.failed(part, "no good")
    assert ward.standing.level == level
    assert ward.notices("EmergencyLevelRaised")[0].startswith(f"level {level} (")
    assert f"after 0: {reason}: {part}: no good [id-1]" in ward.notices("EmergencyLevelRaised")[0]
    trip(ward, part)
    assert ward.standing.state_of(part) == OPEN
    assert ward.standing.level == 3
    assert ward.notices("BreakerOpened") == [f"breaker {part} opened for 30 s after 3 failures: failure 1"]
    assert ward.metrics.value("tolaria.breaker.state", name=part) == OPEN


@pytest.mark.row("T24")
@pytest.mark.parametrize(
    ("reason", "level"),
    [
        (RunReason.NON_FINITE_LOSS, 3),
        (RunReason.LOSS_SPIKE, 3),
        (RunReason.GRADIENT_EXPLOSION, 3),
        (RunReason.VALIDATION_REGRESSION, 2),
        (RunReason.FEATURE_FALLBACK, 1),
    ],
)
def test_an_anomaly_has_its_level(ward: Ward, reason: RunReason, level: int):
    ward.standing.anomaly(reason, "x" * 1000)
    assert ward.standing.level == level
    assert ward.metrics.value("tolaria.emergency.level") == level
    labels = {"from": "0", "to": str(level), "reason": str(reason)}
    assert ward.metrics.value("tolaria.emergency.transitions_total", **labels) == 1


@pytest.mark.row("T24")
def test_every_change_is_in_the_log_with_its_id_and_survives_a_restart(ward: Ward, tmp_path: Path):
    ward.standing.anomaly(RunReason.VALIDATION_REGRESSION, "worse")
    ward.standing.rolled_back(RunReason.NON_FINITE_LOSS, "back at step 3")
    assert ward.facts.state.level == 3
    ward.facts._wal.close()
    assert b'"id": "id-2", "level": 3, "reason": "NonFiniteLoss"' in (tmp_path / "wal.log").read_bytes()
    later = Ward(tmp_path, restarted=True)
    assert later.standing.level == 3
    assert later.standing.conservative


@pytest.mark.row("T24")
def test_a_halt_holds_over_a_restart_of_the_trainer_and_not_over_a_new_pod(ward: Ward, tmp_path: Path):
    ward.standing.halted(RunReason.RESTORE_FAILED, "nothing verifies")
    assert ward.standing.halt is not None
    assert (ward.standing.halt.reason, ward.standing.halt.message) == ("RestoreFailed", "nothing verifies")
    assert ward.metrics.value("tolaria.emergency.halt") == 1
    assert ward.metrics.value("tolaria.emergency.halts_total") == 1
    ward.facts._wal.close()
    restarted = Ward(tmp_path, restarted=True)
    assert restarted.standing.level == 4
    assert restarted.standing.halt is not None
    restarted.facts._wal.close()
    new_pod = Ward(tmp_path)
    assert new_pod.standing.level == 0
    assert new_pod.standing.halt is None
    assert new_pod.facts.state.level == 0
    new_pod.facts._wal.close()
    assert Wal(tmp_path / "wal.log").replay().level == 0


@pytest.mark.row("T24")
def test_from_level_two_on_the_status_tells_and_stops_telling_below(ward: Ward):
    ward.standing.failed(Part.TAMIYO, "no answer")
    assert ward.degradations("tolaria") == []
    ward.standing.anomaly(RunReason.VALIDATION_REGRESSION, "worse")
    assert ward.degradations("tolaria") == [True]
    ward.boundaries(5, seconds=11.0)
    assert ward.degradations("tolaria") == [True]
    ward.boundaries(1, seconds=11.0)
    assert ward.standing.level == 1
    assert ward.degradations("tolaria") == [True, False]
    assert len(ward.notices("EmergencyLevelLowered")) == 1
    ward.boundaries(3)
    assert ward.standing.level == 0
    assert len(ward.notices("EmergencyLevelLowered")) == 2


@pytest.mark.row("T24")
def test_a_storm_of_causes_is_a_handful_of_notices(ward: Ward):
    for _ in range(60):
        ward.clock.pass_s(0.5)
        ward.standing.anomaly(RunReason.NON_FINITE_LOSS, "nan")
        ward.standing.boundary(healthy=False)
    notices = ward.notices("EmergencyLevelRaised")
    assert len(notices) == 6
    assert notices[1].startswith("still level 3 (conservative), ")
    assert "more causes, the last: nan" in notices[1]


@pytest.mark.row("T02")
@pytest.mark.parametrize("part", [Part.TAMIYO, Part.KASMINA, Part.LR_INTEGRITY])
def test_one_failure_of_a_partner_or_of_the_learning_rate_is_enough_for_conservative_mode(ward: Ward, part: Part):
    ward.standing.failed(part, "no good")
    assert ward.standing.conservative
    assert ward.metrics.value("tolaria.mode.conservative") == 1
    assert ward.notices("ConservativeMode") == [f"conservative mode: {part}: no good"]


@pytest.mark.row("T02")
def test_a_breach_is_not_and_three_in_a_row_are(ward: Ward):
    for failures in (1, 2):
        ward.standing.failed(Part.BOUNDARY_TIMING, "slow")
        assert not ward.standing.conservative, failures
    ward.standing.failed(Part.BOUNDARY_TIMING, "slow")
    assert ward.standing.conservative
    assert ward.standing.level == 3


@pytest.mark.row("T02")
def test_the_mode_ends_when_what_failed_works_again_and_its_time_is_counted(ward: Ward):
    ward.standing.failed(Part.TAMIYO, "no answer")
    for _ in range(6):
        ward.standing.succeeded(Part.TAMIYO)
        ward.boundaries(1, seconds=2.0)
    assert not ward.standing.conservative
    assert ward.notices("ConservativeMode")[-1] == "conservative mode is over"
    assert ward.metrics.value("tolaria.conservative.seconds_total") == 10.0
    ward.boundaries(5, seconds=100.0)
    assert ward.metrics.value("tolaria.conservative.seconds_total") == 10.0
    assert ward.metrics.value("tolaria.mode.conservative") == 0


@pytest.mark.row("T02")
def test_tamiyos_own_word_holds_until_it_takes_it_back(ward: Ward):
    ward.standing.advised(conservative=True, message="tamiyo: worse and worse")
    ward.boundaries(50, seconds=60.0)
    assert ward.standing.conservative
    ward.standing.advised(conservative=False, message="better")
    assert not ward.standing.conservative


@pytest.mark.row("T13")
def test_three_violations_of_the_learning_rate_open_its_breaker_and_silence_closes_it(ward: Ward):
    trip(ward, Part.LR_INTEGRITY)
    assert ward.standing.state_of(Part.LR_INTEGRITY) == OPEN
    assert ward.standing.conservative
    ward.boundaries(2, seconds=10.0)
    assert ward.standing.state_of(Part.LR_INTEGRITY) == OPEN
    ward.boundaries(1, seconds=10.0)
    assert ward.standing.state_of(Part.LR_INTEGRITY) == CLOSED


@pytest.mark.row("T13")
def test_a_violation_since_the_last_boundary_is_no_silence(ward: Ward):
    for _ in range(3):
        ward.standing.failed(Part.LR_INTEGRITY, "changed")
        ward.boundaries(1)
    assert ward.standing.state_of(Part.LR_INTEGRITY) == OPEN


@pytest.mark.row("T15")
def test_a_rebuild_that_nobody_asks_for_again_keeps_nothing_up(ward: Ward):
    trip(ward, Part.OPTIMIZER_REBUILD)
    ward.boundaries(12, seconds=60.0)
    assert ward.standing.level == 2
    ward.boundaries(5, seconds=60.0)
    assert ward.standing.level == 1
    assert not ward.standing.conservative


@pytest.mark.row("T03")
def test_a_rollback_makes_open_breakers_half_open(ward: Ward):
    trip(ward, Part.TAMIYO)
    ward.standing.rolled_back(RunReason.LOSS_SPIKE, "back at step 10")
    assert ward.standing.state_of(Part.TAMIYO) == HALF_OPEN
    assert ward.standing.state_of(Part.KASMINA) == CLOSED
    assert [ward.standing.allows(Part.TAMIYO) for _ in range(2)] == [True, False]


@pytest.mark.row("T03")
def test_a_state_carries_what_was_broken_and_a_restore_probes_it(ward: Ward, tmp_path: Path):
    assert ward.standing.capture() == {"breakers": {}, "conservative": {}}
    trip(ward, Part.CHECKPOINT)
    ward.standing.failed(Part.TAMIYO, "no answer")
    saved = ward.standing.capture()
    other = tmp_path / "another pod"
    other.mkdir()
    later = Ward(other)
    later.standing.restore(saved)
    assert later.standing.state_of(Part.CHECKPOINT) == HALF_OPEN
    assert later.standing.state_of(Part.TAMIYO) == CLOSED
    assert later.standing.conservative
    for _ in range(2):
        later.standing.failed(Part.TAMIYO, "no answer")
    assert later.standing.state_of(Part.TAMIYO) == OPEN
    later.standing.restore({})
    assert later.standing.state_of(Part.TAMIYO) == HALF_OPEN


@pytest.mark.row("T24")
def test_a_commanded_level_must_be_above_the_present_one_and_valid(ward: Ward):
    ward.standing.order_level(2, "somebody says so")
    assert ward.standing.level == 2
    with pytest.raises(LevelError, match="already 2; only health lowers it"):
        ward.standing.order_level(1, "down")
    with pytest.raises(LevelError, match="emergency level 7"):
        ward.standing.order_level(7, "up")
    with pytest.raises(LevelError, match="bytes; give 1 to 256"):
        ward.standing.order_level(3, "x" * 257)
    assert ward.standing.level == 2


@pytest.mark.row("T06")
@pytest.mark.parametrize("state", [OPEN, HALF_OPEN, CLOSED])
def test_a_breaker_is_forced_and_it_shows(ward: Ward, state: int):
    ward.standing.force(Part.TAMIYO, state, "by command")  # type: ignore[arg-type]
    assert ward.standing.state_of(Part.TAMIYO) == state
    assert ward.metrics.value("tolaria.breaker.state", name="tamiyo") == state
    assert bool(ward.notices("BreakerOpened")) == (state == OPEN)
    ward.standing.force(Part.TAMIYO, CLOSED, "by command")
    assert bool(ward.notices("BreakerClosed")) == (state != CLOSED)


# Every mode has its event and its metric


@pytest.mark.row("T43")
def test_conservative_mode_is_told_and_shown_when_it_begins_and_when_it_ends(ward: Ward):
    ward.standing.advised(conservative=True, message="tamiyo: worse and worse")
    assert ("tolaria.conservative_mode_entered", "WARNING") in ward.named()
    assert ward.metrics.value("tolaria.mode.conservative") == 1
    ward.standing.advised(conservative=False, message="better")
    assert ward.named()[-1] == ("tolaria.conservative_mode_cleared", "INFO")
    assert ward.metrics.value("tolaria.mode.conservative") == 0


@pytest.mark.row("T43")
@pytest.mark.parametrize("part", list(Part))
def test_each_breaker_is_told_and_shown_when_it_opens_and_when_it_closes(ward: Ward, part: Part):
    trip(ward, part)
    assert [level for name, level in ward.named() if name == "tolaria.breaker_opened"] == ["WARNING"]
    assert ward.metrics.value("tolaria.breaker.state", name=part) == OPEN
    ward.standing.repaired(part)
    assert ward.metrics.value("tolaria.breaker.state", name=part) == HALF_OPEN
    ward.standing.succeeded(part)
    assert [level for name, level in ward.named() if name == "tolaria.breaker_closed"] == ["INFO"]
    assert ward.metrics.value("tolaria.breaker.state", name=part) == CLOSED


@pytest.mark.row("T43", "K14")
@pytest.mark.parametrize(
    ("reason", "level", "severity"),
    [
        (RunReason.FEATURE_FALLBACK, 1, "WARNING"),
        (RunReason.VALIDATION_REGRESSION, 2, "WARNING"),
        (RunReason.NON_FINITE_LOSS, 3, "CRITICAL"),
    ],
)
def test_each_emergency_level_is_told_as_bad_as_it_is_and_shown(
    ward: Ward, reason: RunReason, level: int, severity: str
):
    ward.standing.anomaly(reason, "m")
    assert ward.named()[0] == ("tolaria.emergency.escalated", severity)
    assert ward.metrics.value("tolaria.emergency.level") == level
    ward.clock.pass_s(10.0)
    ward.standing.anomaly(reason, "once more")
    ward.standing.boundary(healthy=False)
    assert [found for name, found in ward.named() if name == "tolaria.emergency.escalated"] == [severity] * 2


@pytest.mark.row("T43")
def test_a_halt_is_told_critical_and_shown_and_a_lower_level_is_told(ward: Ward, tmp_path: Path):
    ward.standing.halted(RunReason.RESTORE_FAILED, "m")
    assert ward.named()[0] == ("tolaria.emergency.escalated", "CRITICAL")
    assert ward.metrics.value("tolaria.emergency.halt") == 1
    ward.facts._wal.close()
    later = Ward(tmp_path)
    assert ("tolaria.emergency.deescalated", "INFO") in later.named()
    assert later.metrics.value("tolaria.emergency.halt") == 0
