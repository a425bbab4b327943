"""Events of a run's record (record.jsonl), declared once: whoever writes, draws or alarms takes the names from here."""

from enum import StrEnum

from esper_leyline.v1.common_pb2 import (
    MESSAGE_PRIORITY_CRITICAL,
    MESSAGE_PRIORITY_HIGH,
    MESSAGE_PRIORITY_LOW,
    MESSAGE_PRIORITY_NORMAL,
    HealthStatus,
    MessagePriority,
)


class Level(StrEnum):
    """How bad it is."""

    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class RunEvent(StrEnum):
    """What a line of the record, or a telemetry packet on the bus, is about."""

    # The course of training
    STARTED = "tolaria.trainer.started"
    ENDED = "tolaria.trainer.ended"
    TRAINER_FAILED = "tolaria.trainer.failed"
    TRANSITION = "tolaria.transition"
    PROGRESS = "tolaria.progress"
    EPOCH = "tolaria.epoch.closed"
    METRICS = "tolaria.metrics"
    NOTICE = "tolaria.notice"
    RUN_COMPLETED = "tolaria.run.completed"
    RUN_FAILED = "tolaria.run.failed"
    FAULT_INJECTED = "tolaria.fault_injected"

    # Recovery
    ROLLBACK_STARTED = "tolaria.rollback.started"
    ROLLBACK_COMPLETED = "tolaria.rollback.completed"
    RECOVERY_COMPLETED = "tolaria.recovery.completed"
    RESTORE_FAILED = "tolaria.rollback.restore_failed"
    ROLLBACK_DEADLINE = "rollback_deadline_triggered"
    STALL_DETECTED = "tolaria.stall_detected"
    CHECKPOINT_COMMITTED = "tolaria.checkpoint.committed"
    CHECKPOINT_FAILED = "tolaria.checkpoint.failed"

    # Boundary, breakers, modes
    TAMIYO_ERROR = "tolaria.tamiyo_error"
    TAMIYO_TIMEOUT = "tolaria.tamiyo_timeout"
    KASMINA_ERROR = "tolaria.kasmina_error"
    KASMINA_TIMEOUT = "tolaria.kasmina_timeout"
    CONSERVATIVE_ENTERED = "tolaria.conservative_mode_entered"
    CONSERVATIVE_CLEARED = "tolaria.conservative_mode_cleared"
    BREAKER_OPENED = "tolaria.breaker_opened"
    BREAKER_CLOSED = "tolaria.breaker_closed"
    HOOK_BUDGET_EXCEEDED = "tolaria.hook_budget_exceeded"
    COMMAND_ACCEPTED = "tolaria.command.accepted"
    COMMAND_REJECTED = "tolaria.command.rejected"
    COMMAND_EXPIRED = "tolaria.command.expired"
    ESCALATED = "tolaria.emergency.escalated"
    DEESCALATED = "tolaria.emergency.deescalated"
    HALT = "tolaria.emergency.halt"
    ACKNOWLEDGED = "tolaria.emergency.acknowledged"
    DEGRADED = "tolaria.degraded"
    MENDED = "tolaria.mended"

    # Learning rate, optimizer, features
    LR_VIOLATION = "tolaria.lr_integrity_violation"
    OPTIMIZER_REBUILT = "tolaria.optimizer_rebuilt"
    COMPILE_FALLBACK = "tolaria.compile_fallback"
    GRAPH_FALLBACK = "tolaria.graph_fallback"
    FEATURE_FALLBACK = "tolaria.feature_fallback"
    PROFILER_TRACE = "tolaria.profiler.trace"
    PROFILER_FAILED = "tolaria.profiler.export_failed"

    # Of weatherlight: on the bus alone
    SIGNAL_RECEIVED = "emergency_signal_received"
    WORKER_ERROR = "worker_error"
    WORKER_RESTARTED = "worker_restarted"
    WORKER_CRASH_LOOP = "worker_crash_loop"
    SYSTEM_MODE_CHANGED = "system_mode_changed"
    PREFLIGHT_FAILED = "preflight_failed"
    BUS_CONSERVATIVE_ENTER = "oona_conservative_enter"
    BUS_CONSERVATIVE_PROBE = "oona_conservative_probe"
    BUS_CONSERVATIVE_EXIT = "oona_conservative_exit"
    BUS_CLOCK_SKEW = "oona_clock_skew"


_RECOVERY = "kind, cause, tier, fromStep, toStep, detectMs, recoverMs, verified"
MEANING: dict[RunEvent, tuple[str, str]] = {
    RunEvent.STARTED: (
        "A trainer process is ready to train",
        "source, trainerStart, device, threads, torch, optimizerPath, epochs",
    ),
    RunEvent.ENDED: ("Its last word, or its supervisor's for it", "exitCode, savedStep"),
    RunEvent.TRAINER_FAILED: (
        "A trainer process crashed, hung, was killed, or could not be started, as its supervisor saw it",
        "exitCode, evidence",
    ),
    RunEvent.TRANSITION: ("The run moves to another phase", "from, to"),
    RunEvent.PROGRESS: ("Loss of a step: one a second at most, fewer the longer the run is", "loss"),
    RunEvent.EPOCH: ("An epoch is trained and validated", "epoch, epochs, totalSteps, loss, metrics, samplesPerSecond"),
    RunEvent.METRICS: ("Gauges and counters at the end of an epoch", "values"),
    RunEvent.NOTICE: ("What has no name of its own; `reason` says what it is", ""),
    RunEvent.RUN_COMPLETED: ("Training is complete, the model is exported", "bestStep, exportPath, metrics"),
    RunEvent.RUN_FAILED: ("An end that no restart cures", "exitCode"),
    RunEvent.FAULT_INJECTED: ("spec.faultInjection fires", ""),
    RunEvent.ROLLBACK_STARTED: ("The loss or state is bad; the run goes back", "from, to"),
    RunEvent.ROLLBACK_COMPLETED: ("The trainer is back at a good state, in place", _RECOVERY),
    RunEvent.RECOVERY_COMPLETED: ("A new trainer process goes on where an earlier one ended", _RECOVERY),
    RunEvent.RESTORE_FAILED: ("A tier of rollback failed", ""),
    RunEvent.ROLLBACK_DEADLINE: ("A tier of rollback took longer than it may", ""),
    RunEvent.STALL_DETECTED: ("The trainer before this one hung", "detectMs"),
    RunEvent.CHECKPOINT_COMMITTED: (
        "The state of the checkpoints after a save, or at the start",
        "latestStep, bestStep, count, bytes, stallMs",
    ),
    RunEvent.CHECKPOINT_FAILED: ("A save failed; training goes on", ""),
    RunEvent.TAMIYO_ERROR: ("Tamiyo does not answer", ""),
    RunEvent.TAMIYO_TIMEOUT: ("Tamiyo did not answer in time", ""),
    RunEvent.KASMINA_ERROR: ("Kasmina does not answer", ""),
    RunEvent.KASMINA_TIMEOUT: ("Kasmina did not answer in time", ""),
    RunEvent.CONSERVATIVE_ENTERED: ("Conservative mode begins", ""),
    RunEvent.CONSERVATIVE_CLEARED: ("Conservative mode is over", ""),
    RunEvent.BREAKER_OPENED: ("A breaker opened", ""),
    RunEvent.BREAKER_CLOSED: ("A breaker closed", ""),
    RunEvent.HOOK_BUDGET_EXCEEDED: ("The boundary took longer than its budget", ""),
    RunEvent.COMMAND_ACCEPTED: ("A command of Tamiyo took effect", ""),
    RunEvent.COMMAND_REJECTED: ("A command was refused", ""),
    RunEvent.COMMAND_EXPIRED: ("A command came too late", ""),
    RunEvent.ESCALATED: ("The emergency level rose", ""),
    RunEvent.DEESCALATED: ("The emergency level fell", ""),
    RunEvent.HALT: ("The run is halted", "from, to"),
    RunEvent.ACKNOWLEDGED: ("An emergency signal was obeyed", "signal, stage"),
    RunEvent.DEGRADED: ("A part does not work as it should; training goes on", "component"),
    RunEvent.MENDED: ("It works again", "component"),
    RunEvent.LR_VIOLATION: ("Something else than the schedule had changed a learning rate", ""),
    RunEvent.OPTIMIZER_REBUILT: ("The optimizer was rebuilt", ""),
    RunEvent.COMPILE_FALLBACK: ("torch.compile is off", ""),
    RunEvent.GRAPH_FALLBACK: ("CUDA graphs are off", ""),
    RunEvent.FEATURE_FALLBACK: ("A feature that was asked for is off", ""),
    RunEvent.PROFILER_TRACE: ("A trace was written", ""),
    RunEvent.PROFILER_FAILED: ("A trace could not be written", ""),
    RunEvent.SIGNAL_RECEIVED: ("An emergency signal of the operator took effect", ""),
    RunEvent.WORKER_ERROR: ("A part of weatherlight failed, hung or stopped", ""),
    RunEvent.WORKER_RESTARTED: ("It was started again", ""),
    RunEvent.WORKER_CRASH_LOOP: ("It failed too often, and the container ends", ""),
    RunEvent.SYSTEM_MODE_CHANGED: ("The pod is degraded, or operational again", ""),
    RunEvent.PREFLIGHT_FAILED: ("Redis can be reached and is not as it must be", ""),
    RunEvent.BUS_CONSERVATIVE_ENTER: ("Redis has failed several times: it is left alone between probes", ""),
    RunEvent.BUS_CONSERVATIVE_PROBE: ("The first probe since then; the later ones are only counted", ""),
    RunEvent.BUS_CONSERVATIVE_EXIT: ("It answers again", ""),
    RunEvent.BUS_CLOCK_SKEW: ("The clocks of pod and Redis differ, or no longer do", ""),
}
"""In a sentence, and what its `fields` hold beside reason and message."""

_INFO, _WARNING, _ERROR, _CRITICAL = ((level,) for level in Level)
LEVELS: dict[RunEvent, tuple[Level, ...]] = {
    RunEvent.STARTED: _INFO,
    RunEvent.ENDED: (Level.INFO, Level.CRITICAL),
    RunEvent.TRAINER_FAILED: _ERROR,
    RunEvent.TRANSITION: (Level.INFO, Level.WARNING, Level.ERROR),
    RunEvent.PROGRESS: _INFO,
    RunEvent.EPOCH: _INFO,
    RunEvent.METRICS: _INFO,
    RunEvent.NOTICE: (Level.INFO, Level.WARNING),
    RunEvent.RUN_COMPLETED: _INFO,
    RunEvent.RUN_FAILED: _CRITICAL,
    RunEvent.FAULT_INJECTED: _WARNING,
    RunEvent.ROLLBACK_STARTED: _WARNING,
    RunEvent.ROLLBACK_COMPLETED: _WARNING,
    RunEvent.RECOVERY_COMPLETED: _WARNING,
    RunEvent.RESTORE_FAILED: _CRITICAL,
    RunEvent.ROLLBACK_DEADLINE: _CRITICAL,
    RunEvent.STALL_DETECTED: _ERROR,
    RunEvent.CHECKPOINT_COMMITTED: _INFO,
    RunEvent.CHECKPOINT_FAILED: _ERROR,
    RunEvent.TAMIYO_ERROR: _WARNING,
    RunEvent.TAMIYO_TIMEOUT: _WARNING,
    RunEvent.KASMINA_ERROR: _WARNING,
    RunEvent.KASMINA_TIMEOUT: _WARNING,
    RunEvent.CONSERVATIVE_ENTERED: _WARNING,
    RunEvent.CONSERVATIVE_CLEARED: _INFO,
    RunEvent.BREAKER_OPENED: _WARNING,
    RunEvent.BREAKER_CLOSED: _INFO,
    RunEvent.HOOK_BUDGET_EXCEEDED: _WARNING,
    RunEvent.COMMAND_ACCEPTED: _INFO,
    RunEvent.COMMAND_REJECTED: (Level.WARNING, Level.ERROR, Level.CRITICAL),
    RunEvent.COMMAND_EXPIRED: _WARNING,
    RunEvent.ESCALATED: (Level.WARNING, Level.CRITICAL),
    RunEvent.DEESCALATED: _INFO,
    RunEvent.HALT: _CRITICAL,
    RunEvent.ACKNOWLEDGED: _WARNING,
    RunEvent.DEGRADED: _WARNING,
    RunEvent.MENDED: _INFO,
    RunEvent.LR_VIOLATION: _WARNING,
    RunEvent.OPTIMIZER_REBUILT: _INFO,
    RunEvent.COMPILE_FALLBACK: _WARNING,
    RunEvent.GRAPH_FALLBACK: _WARNING,
    RunEvent.FEATURE_FALLBACK: _WARNING,
    RunEvent.PROFILER_TRACE: _INFO,
    RunEvent.PROFILER_FAILED: _WARNING,
    RunEvent.SIGNAL_RECEIVED: _CRITICAL,
    RunEvent.WORKER_ERROR: _WARNING,
    RunEvent.WORKER_RESTARTED: _WARNING,
    RunEvent.WORKER_CRASH_LOOP: _CRITICAL,
    RunEvent.SYSTEM_MODE_CHANGED: (Level.INFO, Level.WARNING),
    RunEvent.PREFLIGHT_FAILED: _ERROR,
    RunEvent.BUS_CONSERVATIVE_ENTER: _WARNING,
    RunEvent.BUS_CONSERVATIVE_PROBE: _INFO,
    RunEvent.BUS_CONSERVATIVE_EXIT: _INFO,
    RunEvent.BUS_CLOCK_SKEW: (Level.INFO, Level.WARNING),
}
"""How bad it can be, mildest first; most events are always the same."""

HEALTH: dict[Level, HealthStatus] = {
    Level.INFO: HealthStatus.HEALTH_STATUS_HEALTHY,
    Level.WARNING: HealthStatus.HEALTH_STATUS_DEGRADED,
    Level.ERROR: HealthStatus.HEALTH_STATUS_UNHEALTHY,
    Level.CRITICAL: HealthStatus.HEALTH_STATUS_CRITICAL,
}
"""What an event says of its writer."""


PRIORITY: dict[Level, MessagePriority] = {
    Level.INFO: MESSAGE_PRIORITY_NORMAL,
    Level.WARNING: MESSAGE_PRIORITY_HIGH,
    Level.ERROR: MESSAGE_PRIORITY_HIGH,
    Level.CRITICAL: MESSAGE_PRIORITY_CRITICAL,
}
LOW = frozenset({RunEvent.PROGRESS, RunEvent.METRICS})
"""Dropped before all others where there is no room."""


def level_of(event: RunEvent, wanted: Level) -> Level:
    """The level of one occurrence: as wanted where the catalogue leaves it open, else what the catalogue says."""
    held = LEVELS[event]
    return wanted if wanted in held else held[0]


def priority(event: RunEvent, level: Level) -> MessagePriority:
    """Of a line, by which a full queue chooses what to drop."""
    return MESSAGE_PRIORITY_LOW if event in LOW and level is Level.INFO else PRIORITY[level]


def reference() -> str:
    """docs/reference/record.md."""
    lines = [*_INTRODUCTION.strip().splitlines(), "", "| Event | Level | Meaning | Fields |", "|---|---|---|---|"]
    for event, (meaning, held) in MEANING.items():
        fields = ", ".join(f"`{name}`" for name in held.split(", ") if held)
        lines.append(f"| `{event}` | {', '.join(LEVELS[event])} | {meaning}. | {fields} |")
    return "\n".join(lines) + "\n"


_INTRODUCTION = """
# The run's record

`<run-uid>/record.jsonl` on the checkpoint volume, one JSON object a line, written by the trainer, and by its
supervisor while no trainer lives. `esper report` draws a report from it. Generated from `esper_leyline.events`; do not
edit.

| Key | Meaning |
|---|---|
| `id` | attempt, incarnation of the pod, start of the trainer in it (0: its supervisor), a rising number: `1.1.2.42` |
| `time` | wall clock, UTC, for people |
| `ns` | CLOCK_MONOTONIC of the node: order and durations within one incarnation |
| `attempt`, `incarnation` | of the run, of its pod |
| `step` | where training was |
| `level` | INFO, WARNING, ERROR or CRITICAL |
| `event`, `fields` | see below; most have `reason` and `message`, parts of an incident its id in `incident` |
| `repeats`, `count` | the line stands for so many more of the line with that id, within its epoch |
| `dropped` | lines before this one that found no room in the queue, by priority |
| `lost` | lines before this one that the volume did not take |

Bounds: 10,000 lines wait at most (then the least important go), 16 KiB a line, 8 MiB a file; the older file is
`record.1.jsonl`. Lines are not synchronised one by one: a node that loses power may lose the last seconds, and readers
pass over a torn line. A volume that takes no lines degrades the run (`RecordIncomplete`) and stops nothing.
"""
