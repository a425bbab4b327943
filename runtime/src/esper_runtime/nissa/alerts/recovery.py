"""Of rollback, checkpoints and the trainer's deaths."""

from esper_runtime.nissa.expressions import grew, since
from esper_runtime.nissa.model import Alert, Group, Recording, Severity

_RUN = "{{ $labels.namespace }}/{{ $labels.run }}"
_TIER = 'tier="Fast"'

SLOW_ROLLBACKS = Recording(
    record="esper:rollbacks_slow:total",
    expr=(
        f"esper_tolaria_rollback_duration_ms_count{{{_TIER}}}"
        f' - ignoring (le) esper_tolaria_rollback_duration_ms_bucket{{{_TIER},le="500"}}'
    ),
    of=("namespace", "run", "attempt", "rank", "pod", "container", "instance", "job", "tier"),
)
"""Restores from memory that took longer than their 500 ms, since the trainer began."""

_ALERTS = (
    Alert(
        name="TolariaRollbackSlow",
        expr=f"{since('esper:rollbacks_slow:total', '10m')} > 0",
        severity=Severity.CRITICAL,
        summary=f"A rollback of {_RUN} from memory took more than 500 ms",
        value="{{ $value | humanize }} within ten minutes.",
        action="Compare the size of the snapshots with the node's free memory and its memory bandwidth.",
        cause="Copying the last good snapshot back was slow: memory is swapped or shared with busy neighbours.",
        panel="run/restore-time",
    ),
    Alert(
        name="TolariaRollbackDeadlineExceeded",
        expr=grew("esper_tolaria_rollback_deadline_exceeded_total", "10m"),
        severity=Severity.CRITICAL,
        summary=f"A restore of {_RUN} missed its deadline",
        value="{{ $value | humanize }} within ten minutes.",
        action="Raise the deadline of the tier, or mend the volume or memory that is slow.",
        cause="The snapshot or checkpoint was not in place in time; the next tier was tried, or the run halted.",
        panel="run/restore-failures",
    ),
    Alert(
        name="TolariaRollbackFailed",
        expr=grew("esper_tolaria_rollback_failures_total", "10m"),
        severity=Severity.CRITICAL,
        summary=f"An attempt to restore {_RUN} failed",
        value="{{ $value | humanize }} within ten minutes.",
        action="`esper checkpoint ls` shows which checkpoints verify; the event names the tier and the reason.",
        cause="A tier had no sound state to give. The next tier follows; without one the run fails.",
        panel="run/restore-failures",
    ),
    Alert(
        name="TolariaRollbacksRepeat",
        expr=f"{since('esper_tolaria_rollbacks_initiated_total', '30m')} >= 3",
        severity=Severity.WARNING,
        summary=f"{_RUN} rolls back again and again",
        value="{{ $value | humanize }} times within half an hour.",
        action="Look at loss and gradient norm before each: lower the learning rate, or look into the data.",
        cause="Loss or state went bad several times; rollback treats the symptom.",
        panel="run/rollbacks",
    ),
    Alert(
        name="TolariaCheckpointsFail",
        expr=grew("esper_tolaria_checkpoint_failures_total", "15m"),
        severity=Severity.WARNING,
        summary=f"Checkpoints of {_RUN} fail",
        value="{{ $value | humanize }} within fifteen minutes; training goes on.",
        action="Look for a full or read-only volume: `esper status` says CheckpointFailed or CheckpointVolumeFull.",
        cause="A save raised an error. Until one succeeds a lost pod costs the steps since the last good one.",
        panel="run/checkpoint-failures",
    ),
    Alert(
        name="TolariaCheckpointOld",
        expr="esper_tolaria_checkpoint_age_s > 3600",
        wait="5m",
        severity=Severity.WARNING,
        summary=f"The newest checkpoint of {_RUN} is more than an hour old",
        value="It is {{ $value | humanizeDuration }} old.",
        action="If `periodSeconds` is meant to be so long, silence this; else see why saves fail or never fall due.",
        cause="Nothing was saved for an hour, so a lost pod costs as much.",
        panel="run/checkpoint-age",
    ),
    Alert(
        name="TolariaTrainerSilent",
        expr="esper_tolaria_trainer_silent_seconds > 120",
        wait="1m",
        severity=Severity.CRITICAL,
        summary=f"The trainer of {_RUN} gives no sign of life",
        value="It has been silent for {{ $value | humanizeDuration }}.",
        action="Its supervisor restarts it after `health.heartbeatTimeoutSeconds`; is that longer than it should be?",
        cause="No heartbeat came for two minutes of watched time: the trainer hangs, and its limit allows it to.",
        panel="run/trainer-silent",
    ),
    Alert(
        name="TolariaTrainerHung",
        expr=grew("esper_tolaria_hangs_total", "15m"),
        severity=Severity.WARNING,
        summary=f"The trainer of {_RUN} hung and was replaced",
        value="{{ $value | humanize }} within fifteen minutes.",
        action="Its stacks are in the log of container tolaria. Look for a lock, a full pipe, or a volume that stalls.",
        cause="No step ended within the limit of `health`, so the supervisor ended the process and started another.",
        panel="run/restarts",
    ),
    Alert(
        name="TolariaTrainerRestarts",
        expr=f"{since('esper_tolaria_in_place_restarts_total', '30m')} >= 3",
        severity=Severity.WARNING,
        summary=f"The trainer of {_RUN} dies again and again",
        value="{{ $value | humanize }} restarts within half an hour.",
        action="status.lastFailure has its last words; `esper logs` the rest.",
        cause="Crashes, kills or hangs of the trainer process. Each was recovered from inside the pod.",
        panel="run/restarts",
    ),
)

RECOVERY = Group(name="esper-recovery", interval="15s", recordings=(SLOW_ROLLBACKS,), alerts=_ALERTS)
