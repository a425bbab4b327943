"""Events of the journal in the words of the record."""

from typing import Any

import pytest
from esper_leyline.events import LEVELS, MEANING, Level, RunEvent
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.common_pb2 import ROLLBACK_TIER_FULL
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE, EmergencyAck
from esper_runtime.tolaria.narrate import Told, tell


def one(name: RunEvent | None = None, **event: Any) -> Told:
    (told,) = tell(pb.RuntimeEvent(**event), name)
    return told


def notice(reason: RunReason, message: str = "m", *, warning: bool = True, name: RunEvent | None = None) -> Told:
    return one(name, notice=pb.Notice(reason=reason, message=message, warning=warning))


def degradation(
    component: str, reason: RunReason, message: str = "m", *, degraded: bool = True, name: RunEvent | None = None
) -> Told:
    change = pb.Degradation(component=component, degraded=degraded, reason=reason, message=message)
    return one(name, degradation=change)


LATE, EXPIRED = RunEvent.TAMIYO_TIMEOUT, RunEvent.COMMAND_EXPIRED
COMPILE, GRAPH = RunEvent.COMPILE_FALLBACK, RunEvent.GRAPH_FALLBACK


@pytest.mark.parametrize(
    ("told", "event", "level"),
    [
        (notice(RunReason.RESTORE_FAILED), RunEvent.RESTORE_FAILED, Level.CRITICAL),
        (notice(RunReason.BREAKER_OPENED), RunEvent.BREAKER_OPENED, Level.WARNING),
        (notice(RunReason.BREAKER_CLOSED, warning=False), RunEvent.BREAKER_CLOSED, Level.INFO),
        (notice(RunReason.BOUNDARY_BUDGET_EXCEEDED), RunEvent.HOOK_BUDGET_EXCEEDED, Level.WARNING),
        (notice(RunReason.COMMAND_APPLIED, warning=False), RunEvent.COMMAND_ACCEPTED, Level.INFO),
        (notice(RunReason.COMMAND_REJECTED, "bad signature"), RunEvent.COMMAND_REJECTED, Level.WARNING),
        (notice(RunReason.COMMAND_REJECTED, name=EXPIRED), RunEvent.COMMAND_EXPIRED, Level.WARNING),
        (notice(RunReason.CONSERVATIVE_MODE, warning=True), RunEvent.CONSERVATIVE_ENTERED, Level.WARNING),
        (notice(RunReason.CONSERVATIVE_MODE, warning=False), RunEvent.CONSERVATIVE_CLEARED, Level.INFO),
        (notice(RunReason.EMERGENCY_LEVEL_RAISED), RunEvent.ESCALATED, Level.WARNING),
        (notice(RunReason.EMERGENCY_LEVEL_LOWERED, warning=False), RunEvent.DEESCALATED, Level.INFO),
        (notice(RunReason.LEARNING_RATE_TAMPERED), RunEvent.LR_VIOLATION, Level.WARNING),
        (notice(RunReason.FEATURE_FALLBACK, name=COMPILE), RunEvent.COMPILE_FALLBACK, Level.WARNING),
        (notice(RunReason.FEATURE_FALLBACK, name=GRAPH), RunEvent.GRAPH_FALLBACK, Level.WARNING),
        (notice(RunReason.FEATURE_FALLBACK, "no pinned memory"), RunEvent.FEATURE_FALLBACK, Level.WARNING),
        (notice(RunReason.PROFILER_FAILED), RunEvent.PROFILER_FAILED, Level.WARNING),
        (notice(RunReason.FAULT_INJECTED), RunEvent.FAULT_INJECTED, Level.WARNING),
        (notice(RunReason.CONFIG_CHANGED, warning=False), RunEvent.NOTICE, Level.INFO),
        (degradation("tamiyo", RunReason.SIDECAR_DOWN), RunEvent.TAMIYO_ERROR, Level.WARNING),
        (degradation("tamiyo", RunReason.SIDECAR_DOWN, name=LATE), RunEvent.TAMIYO_TIMEOUT, Level.WARNING),
        (degradation("kasmina", RunReason.SIDECAR_DOWN), RunEvent.KASMINA_ERROR, Level.WARNING),
        (degradation("checkpoint", RunReason.CHECKPOINT_VOLUME_FULL), RunEvent.CHECKPOINT_FAILED, Level.ERROR),
        (degradation("snapshot", RunReason.SNAPSHOTS_DISABLED), RunEvent.DEGRADED, Level.WARNING),
        (degradation("tamiyo", RunReason.SIDECAR_DOWN, degraded=False), RunEvent.MENDED, Level.INFO),
    ],
)
def test_what_is_told_by_its_own_name(told: Told, event: RunEvent, level: Level):
    assert (told.event, told.level) == (event, level)
    assert told.fields["message"]


@pytest.mark.parametrize(
    ("told", "event"),
    [
        (notice(RunReason.COMMAND_REJECTED, "its key has expired"), RunEvent.COMMAND_REJECTED),
        (notice(RunReason.FEATURE_FALLBACK, "not torch.compile, no CUDA graph"), RunEvent.FEATURE_FALLBACK),
        (degradation("tamiyo", RunReason.SIDECAR_DOWN, "UNAVAILABLE: connect timeout"), RunEvent.TAMIYO_ERROR),
        (degradation("kasmina", RunReason.SIDECAR_DOWN, "no deadline"), RunEvent.KASMINA_ERROR),
    ],
)
def test_words_of_a_message_are_for_people_and_change_no_name(told: Told, event: RunEvent):
    assert told.event is event


def test_a_sidecar_that_answers_again_is_mended_whatever_it_was_called():
    assert degradation("tamiyo", RunReason.SIDECAR_DOWN, degraded=False, name=LATE).event is RunEvent.MENDED


def test_transitions_name_both_phases_in_the_resource_s_words():
    move = pb.Transition(
        from_phase=pb.RUNTIME_PHASE_RUNNING, to_phase=pb.RUNTIME_PHASE_ROLLING_BACK, reason="NonFiniteLoss", step=22
    )
    told = one(transition=move)
    assert told == Told(
        RunEvent.ROLLBACK_STARTED,
        Level.WARNING,
        {"from": "Running", "to": "RollingBack", "reason": "NonFiniteLoss"},
        22,
    )
    move.to_phase = pb.RUNTIME_PHASE_HALTED
    assert one(transition=move)[:2] == (RunEvent.HALT, Level.CRITICAL)
    move.to_phase = pb.RUNTIME_PHASE_SUCCEEDED
    assert one(transition=move)[:2] == (RunEvent.TRANSITION, Level.INFO)


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        (pb.RECOVERY_KIND_IN_PROCESS, RunEvent.ROLLBACK_COMPLETED),
        (pb.RECOVERY_KIND_IN_PLACE, RunEvent.RECOVERY_COMPLETED),
        (pb.RECOVERY_KIND_NEW_ATTEMPT, RunEvent.RECOVERY_COMPLETED),
    ],
)
def test_recoveries_have_all_their_fields(kind: pb.RecoveryKind, event: RunEvent):
    recovery = pb.Recovery(
        kind=kind, cause="LossSpike", from_step=9, to_step=5, detect_ms=1.5, recover_ms=2.0, verified=True,
        tier=ROLLBACK_TIER_FULL,
    )  # fmt: skip
    told = one(recovery=recovery)
    assert (told.event, told.step, told.fields["tier"], told.fields["cause"]) == (event, 5, "Full", "LossSpike")
    assert set(told.fields) == set(MEANING[event][1].split(", "))


def test_a_recovery_from_a_hang_tells_of_the_stall_first():
    recovery = pb.Recovery(kind=pb.RECOVERY_KIND_IN_PLACE, cause=RunReason.HANG, from_step=9, to_step=8, detect_ms=900)
    stall, recovered = tell(pb.RuntimeEvent(recovery=recovery))
    assert stall == Told(RunEvent.STALL_DETECTED, Level.ERROR, {"detectMs": 900.0}, 9)
    assert recovered.event is RunEvent.RECOVERY_COMPLETED


def test_checkpoints_epochs_ends_and_answers():
    committed = one(checkpoint=pb.CheckpointState(latest_step=7, count=2, total_bytes=30, last_stall_ms=0.5))
    assert committed == Told(
        RunEvent.CHECKPOINT_COMMITTED, Level.INFO, {"count": 2, "bytes": 30, "latestStep": 7, "stallMs": 0.5}
    )
    assert one(checkpoint=pb.CheckpointState(last_error="full")).event is RunEvent.CHECKPOINT_FAILED
    progress = pb.Progress(epoch=2, step=30, total_epochs=9, loss=0.0, metrics=[pb.NamedMetric(name="a", value=1.5)])
    epoch = one(epoch=progress)
    assert (epoch.event, epoch.step, epoch.fields["metrics"], epoch.fields["loss"]) == (
        RunEvent.EPOCH,
        30,
        {"a": 1.5},
        0.0,
    )
    failure = one(failure=pb.Failure(reason="UserCodeError", message="m", exit_code=71, step=3))
    assert failure[:2] == (RunEvent.RUN_FAILED, Level.CRITICAL)
    done = one(ack=EmergencyAck(signal_id="ab", stage=ACK_STAGE_DONE, step=4))
    assert done == Told(RunEvent.ACKNOWLEDGED, Level.WARNING, {"signal": "ab", "stage": "Done"}, 4)
    completion = one(completion=pb.Completion(export_path="e", best_step=3))
    assert completion.fields == {"exportPath": "e", "metrics": {}, "bestStep": 3}


def test_no_event_of_the_trainer_goes_untold():
    """A boot is told by the first line of its incarnation."""
    kinds = [field.name for field in pb.RuntimeEvent.DESCRIPTOR.oneofs_by_name["event"].fields]
    untold = []
    for kind in kinds:
        event = pb.RuntimeEvent()
        getattr(event, kind).SetInParent()
        if not list(tell(event)):
            untold.append(kind)
    assert untold == ["boot"]


def everything() -> list[pb.RuntimeEvent]:
    """An event of every kind, phase, reason, component and outcome that there is."""
    made = [pb.RuntimeEvent(transition=pb.Transition(to_phase=phase)) for phase in pb.RuntimePhase.values()]
    made += [
        pb.RuntimeEvent(recovery=pb.Recovery(kind=kind, cause=cause))
        for cause in (RunReason.HANG, RunReason.NON_FINITE_LOSS)
        for kind in pb.RecoveryKind.values()
    ]
    made += [pb.RuntimeEvent(checkpoint=pb.CheckpointState(last_error=error)) for error in ("", "full")]
    for reason in RunReason:
        for bad in (True, False):
            made.append(pb.RuntimeEvent(notice=pb.Notice(reason=reason, message="m", warning=bad)))
            made += [
                pb.RuntimeEvent(degradation=pb.Degradation(component=part, degraded=bad, reason=reason, message="m"))
                for part in ("tamiyo", "kasmina", "checkpoint", "tolaria", "snapshot")
            ]
    return [
        *made,
        pb.RuntimeEvent(epoch=pb.Progress()),
        pb.RuntimeEvent(ack=EmergencyAck()),
        pb.RuntimeEvent(failure=pb.Failure()),
        pb.RuntimeEvent(completion=pb.Completion()),
    ]


@pytest.mark.row("K14")
def test_whatever_happens_is_told_at_a_level_of_the_catalogue():
    for event in everything():
        for told in tell(event):
            assert told.level in LEVELS[told.event], (told, event)
    for name in RunEvent:
        for wanted in (None, *Level):
            (told,) = tell(pb.RuntimeEvent(notice=pb.Notice(warning=True)), name, wanted)
            assert told.level in LEVELS[name], (name, wanted)


@pytest.mark.row("K14")
def test_the_word_of_a_level_that_only_some_survive_passes_everything_else():
    raised = pb.RuntimeEvent(notice=pb.Notice(reason=RunReason.EMERGENCY_LEVEL_RAISED, message="m", warning=True))
    assert [told.level for told in tell(raised, None, Level.CRITICAL)] == [Level.CRITICAL]
    assert [told.level for told in tell(raised)] == [Level.WARNING]


@pytest.mark.row("T22", "K07")
def test_a_missed_deadline_has_a_name_of_its_own_and_is_critical():
    told = notice(RunReason.RESTORE_FAILED, name=RunEvent.ROLLBACK_DEADLINE)
    assert (told.event, told.level) == ("rollback_deadline_triggered", Level.CRITICAL)
