"""What the journal is told, in the words of the run's record: name, level and fields of a RuntimeEvent.

Pure. Every event of the trainer has a line; the operator reads the journal, people and `esper report` read this.
Messages are for people and decide nothing: what an event's kind, component and reason leave open, its producer names.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from esper_leyline.events import Level, RunEvent, level_of
from esper_leyline.incidents import FIELD
from esper_leyline.labels import KASMINA, TAMIYO
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.common_pb2 import RollbackTier
from esper_leyline.v1.emergency_pb2 import AckStage
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel


class Told(NamedTuple):
    """One line."""

    event: RunEvent
    level: Level
    fields: dict[str, Any]
    step: int | None = None
    """None: where training is now."""


_NOTICES: dict[str, RunEvent] = {
    RunReason.FAULT_INJECTED: RunEvent.FAULT_INJECTED,
    RunReason.RESTORE_FAILED: RunEvent.RESTORE_FAILED,
    RunReason.BREAKER_OPENED: RunEvent.BREAKER_OPENED,
    RunReason.BREAKER_CLOSED: RunEvent.BREAKER_CLOSED,
    RunReason.BOUNDARY_BUDGET_EXCEEDED: RunEvent.HOOK_BUDGET_EXCEEDED,
    RunReason.COMMAND_APPLIED: RunEvent.COMMAND_ACCEPTED,
    RunReason.COMMAND_REJECTED: RunEvent.COMMAND_REJECTED,
    RunReason.EMERGENCY_LEVEL_RAISED: RunEvent.ESCALATED,
    RunReason.EMERGENCY_LEVEL_LOWERED: RunEvent.DEESCALATED,
    RunReason.LEARNING_RATE_TAMPERED: RunEvent.LR_VIOLATION,
    RunReason.OPTIMIZER_REBUILT: RunEvent.OPTIMIZER_REBUILT,
    RunReason.FEATURE_FALLBACK: RunEvent.FEATURE_FALLBACK,
    RunReason.PROFILER_TRACE: RunEvent.PROFILER_TRACE,
    RunReason.PROFILER_FAILED: RunEvent.PROFILER_FAILED,
    RunReason.CHECKPOINT_FAILED: RunEvent.CHECKPOINT_FAILED,
}
_LEVELS = {
    Level.INFO: TelemetryLevel.TELEMETRY_LEVEL_INFO,
    Level.WARNING: TelemetryLevel.TELEMETRY_LEVEL_WARNING,
    Level.ERROR: TelemetryLevel.TELEMETRY_LEVEL_ERROR,
    Level.CRITICAL: TelemetryLevel.TELEMETRY_LEVEL_CRITICAL,
}
_OF_COMPONENT = {
    TAMIYO: RunEvent.TAMIYO_ERROR,
    KASMINA: RunEvent.KASMINA_ERROR,
    "checkpoint": RunEvent.CHECKPOINT_FAILED,
}


def tell(event: pb.RuntimeEvent, name: RunEvent | None = None, level: Level | None = None) -> Sequence[Told]:
    """Its lines; usually one, each with the incident that it is a part of. `name` is what the producer of a notice or
    degradation calls it, when it knows better; `level` how bad it finds a notice, where the catalogue leaves that
    open."""
    lines = _told(event, name, level)
    if event.incident:
        for told in lines:
            told.fields[FIELD] = event.incident
    return lines


def _told(event: pb.RuntimeEvent, name: RunEvent | None, level: Level | None) -> Sequence[Told]:
    match event.WhichOneof("event"):
        case "transition":
            return [_transition(event.transition)]
        case "recovery":
            return _recovery(event.recovery)
        case "checkpoint":
            return [_checkpoint(event.checkpoint)]
        case "epoch":
            return [_epoch(event.epoch)]
        case "ack":
            return [_acknowledgement(event)]
        case "failure":
            return [_failure(event.failure)]
        case "degradation":
            return [_degradation(event.degradation, name)]
        case "completion":
            return [_completion(event.completion)]
        case "notice":
            return [_notice(event.notice, name, level)]
    return []


def label(event: pb.RuntimeEvent, lines: Sequence[Told]) -> None:
    """Writes the name and level of its lines into the event: of several the last, which is what it came to."""
    if lines:
        event.name = lines[-1].event
        event.level = _LEVELS[lines[-1].level]


def phase(number: int) -> str:
    """ROLLING_BACK -> RollingBack, as in the resource's history."""
    words = pb.RuntimePhase.Name(number).removeprefix("RUNTIME_PHASE_").split("_")
    return "".join(word.capitalize() for word in words)


def _transition(move: pb.Transition) -> Told:
    fields = {"from": phase(move.from_phase), "to": phase(move.to_phase), "reason": move.reason}
    if move.message:
        fields["message"] = move.message
    name, level = {
        pb.RUNTIME_PHASE_ROLLING_BACK: (RunEvent.ROLLBACK_STARTED, Level.WARNING),
        pb.RUNTIME_PHASE_HALTED: (RunEvent.HALT, Level.CRITICAL),
        pb.RUNTIME_PHASE_HALTING: (RunEvent.TRANSITION, Level.WARNING),
        pb.RUNTIME_PHASE_FAILED: (RunEvent.TRANSITION, Level.ERROR),
    }.get(move.to_phase, (RunEvent.TRANSITION, Level.INFO))
    return Told(name, level, fields, move.step)


def _recovery(recovery: pb.Recovery) -> list[Told]:
    kind = pb.RecoveryKind.Name(recovery.kind).removeprefix("RECOVERY_KIND_")
    fields: dict[str, Any] = {
        "kind": "".join(word.capitalize() for word in kind.split("_")),
        "cause": recovery.cause,
        "fromStep": recovery.from_step,
        "toStep": recovery.to_step,
        "detectMs": round(recovery.detect_ms, 3),
        "recoverMs": round(recovery.recover_ms, 3),
        "verified": recovery.verified,
    }
    if recovery.tier:
        fields["tier"] = RollbackTier.Name(recovery.tier).removeprefix("ROLLBACK_TIER_").capitalize()
    inside = recovery.kind == pb.RECOVERY_KIND_IN_PROCESS
    name = RunEvent.ROLLBACK_COMPLETED if inside else RunEvent.RECOVERY_COMPLETED
    told = [Told(name, Level.WARNING, fields, recovery.to_step)]
    if recovery.cause == RunReason.HANG:
        stall = {"detectMs": fields["detectMs"]}
        told.insert(0, Told(RunEvent.STALL_DETECTED, Level.ERROR, stall, recovery.from_step))
    return told


def _checkpoint(state: pb.CheckpointState) -> Told:
    fields: dict[str, Any] = {"count": state.count, "bytes": state.total_bytes}
    for name, field in (("latest_step", "latestStep"), ("best_step", "bestStep"), ("last_stall_ms", "stallMs")):
        if state.HasField(name):
            fields[field] = getattr(state, name)
    if state.last_error:
        return Told(RunEvent.CHECKPOINT_FAILED, Level.ERROR, {**fields, "message": state.last_error})
    return Told(RunEvent.CHECKPOINT_COMMITTED, Level.INFO, fields)


def _epoch(progress: pb.Progress) -> Told:
    fields: dict[str, Any] = {
        "epoch": progress.epoch,
        "epochs": progress.total_epochs,
        "totalSteps": progress.total_steps,
        "metrics": {metric.name: metric.value for metric in progress.metrics},
    }
    if progress.HasField("loss"):
        fields["loss"] = progress.loss
    if progress.HasField("samples_per_second"):
        fields["samplesPerSecond"] = progress.samples_per_second
    return Told(RunEvent.EPOCH, Level.INFO, fields, progress.step)


def _acknowledgement(event: pb.RuntimeEvent) -> Told:
    ack = event.ack
    stage = AckStage.Name(ack.stage).removeprefix("ACK_STAGE_").capitalize()
    return Told(RunEvent.ACKNOWLEDGED, Level.WARNING, {"signal": ack.signal_id, "stage": stage}, ack.step)


def _failure(failure: pb.Failure) -> Told:
    fields = {"reason": failure.reason, "message": failure.message, "exitCode": failure.exit_code}
    return Told(RunEvent.RUN_FAILED, Level.CRITICAL, fields, failure.step)


def _degradation(change: pb.Degradation, name: RunEvent | None) -> Told:
    fields = {"component": change.component, "reason": change.reason, "message": change.message}
    if change.reason == RunReason.CONSERVATIVE_MODE:
        return _conservative(entered=change.degraded, fields=fields)
    if not change.degraded:
        return Told(RunEvent.MENDED, Level.INFO, fields)
    name = name or _OF_COMPONENT.get(change.component, RunEvent.DEGRADED)
    return Told(name, level_of(name, Level.WARNING), fields)


def _conservative(*, entered: bool, fields: dict[str, Any]) -> Told:
    if entered:
        return Told(RunEvent.CONSERVATIVE_ENTERED, Level.WARNING, fields)
    return Told(RunEvent.CONSERVATIVE_CLEARED, Level.INFO, fields)


def _completion(completion: pb.Completion) -> Told:
    metrics = {metric.name: metric.value for metric in completion.metrics}
    fields: dict[str, Any] = {"exportPath": completion.export_path, "metrics": metrics}
    if completion.HasField("best_step"):
        fields["bestStep"] = completion.best_step
    return Told(RunEvent.RUN_COMPLETED, Level.INFO, fields)


def _notice(notice: pb.Notice, name: RunEvent | None, level: Level | None) -> Told:
    fields = {"reason": notice.reason, "message": notice.message}
    if notice.reason == RunReason.CONSERVATIVE_MODE:
        return _conservative(entered=notice.warning, fields=fields)
    name = name or _NOTICES.get(notice.reason, RunEvent.NOTICE)
    return Told(name, level_of(name, level or (Level.WARNING if notice.warning else Level.INFO)), fields)
