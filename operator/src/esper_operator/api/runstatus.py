"""status of an EsperTrainingRun: written by the operator alone, read leniently (an older one may know more)."""

from datetime import datetime
from typing import Annotated, Literal

from esper_leyline.phases import EmergencyStop, HaltSource, Phase, RecoveryKind, RollbackTier
from pydantic import ConfigDict, Field, StringConstraints

from esper_operator.api.base import Boolean, Integer, Model, listing

Count = Annotated[Integer, Field(ge=0)]
Percentage = Annotated[Integer, Field(ge=0, le=100)]
Reason = Annotated[str, StringConstraints(max_length=128)]
Name = Annotated[str, StringConstraints(max_length=253)]

MAX_HISTORY = 20
MAX_METRICS = 32
MAX_MESSAGE = 2048


class StatusModel(Model):
    model_config = ConfigDict(extra="ignore")


class Condition(StatusModel):
    type: Annotated[
        str,
        StringConstraints(
            max_length=316,
            pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$",
        ),
    ]
    """Aspect of the run that this condition is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Count | None = None
    """metadata.generation that it was derived from."""
    last_transition_time: datetime
    """When status last changed."""
    reason: Annotated[
        str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    ]
    """CamelCase reason, for programs."""
    message: Annotated[str, StringConstraints(max_length=32768)]
    """What happened and what to do, for people."""


class ObservedReport(StatusModel):
    attempt: Count = 0
    """Attempt of the report."""
    seq: Count = 0
    """Its number within the attempt."""


class Launched(StatusModel):
    runtime_hash: Annotated[str, StringConstraints(max_length=64)] = ""
    """Hash of spec.runtime that the current attempt was started with."""
    workers_hash: Annotated[str, StringConstraints(max_length=64)] = ""
    """Hash of spec.workers that the current attempt was started with."""
    storage_hash: Annotated[str, StringConstraints(max_length=64)] = ""
    """Hash of spec.checkpoint.storage that the run was started with."""


class Ranks(StatusModel):
    desired: Count = 0
    """Worker pods wanted."""
    ready: Count = 0
    """Worker pods whose containers are all ready."""
    failed: Count = 0
    """Worker pods that failed in this attempt."""
    succeeded: Count = 0
    """Worker pods that completed."""
    summary: Annotated[str, StringConstraints(max_length=32)] = ""
    """ready/desired, for the column."""


class Metric(StatusModel):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """Name, such as validation_accuracy."""
    value: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """Decimal number."""


class Progress(StatusModel):
    epoch: Count | None = None
    """Epoch in progress, from 0."""
    total_epochs: Count | None = None
    """Epochs of the whole training."""
    step: Count | None = None
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps of the whole training."""
    percentage: Percentage | None = None
    """Steps done of all steps."""
    estimated_remaining_seconds: Count | None = None
    """At the present speed."""
    loss: Annotated[str, StringConstraints(max_length=32)] | None = None
    """Last training loss, a decimal number, or NaN, Infinity."""
    samples_per_second: Annotated[str, StringConstraints(max_length=32)] | None = None
    """Training speed, a decimal number."""
    last_heartbeat_time: datetime | None = None
    """When the runtime last reported."""
    goodput_percentage: Percentage | None = None
    """Share of the wall time that moved training forward."""
    metrics: tuple[Metric, ...] = Field((), max_length=MAX_METRICS, json_schema_extra=listing("map", "name"))
    """Metrics of the last epoch."""


class Topology(StatusModel):
    generation: Count | None = None
    """Changes of the model's structure so far."""
    active_seeds: Count | None = None
    """Seeds that are growing."""
    fossilized_seeds: Count | None = None
    """Seeds that became part of the model."""
    parameter_count: Count | None = None
    """Trainable parameters."""


class CheckpointStatus(StatusModel):
    latest_step: Count | None = None
    """Step of the newest checkpoint."""
    latest_verified_step: Count | None = None
    """Step of the newest checkpoint whose digests were checked."""
    best_step: Count | None = None
    """Step of the best checkpoint by retention.metric."""
    count: Count | None = None
    """Checkpoints kept."""
    total_bytes: Count | None = None
    """Their size."""
    last_saved_time: datetime | None = None
    """When the newest was saved."""
    last_stall_milliseconds: Count | None = None
    """How long the last save held up training."""
    feasible: Boolean | None = None
    """False when the volume is too slow or too small to save this state within its bounds."""
    failures: Count | None = None
    """Saves that failed."""
    last_error: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)] | None = None
    """Why the last save failed; absent when it did not."""
    corrupt_files: tuple[Annotated[str, StringConstraints(max_length=512)], ...] = Field(
        (), max_length=8, json_schema_extra=listing("atomic")
    )
    """Files that did not verify, newest first."""
    export_path: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Directory of the exported model on the checkpoint volume."""


class Restarts(StatusModel):
    total: Count = 0
    """Restarts of any kind: of the trainer in its pod, of the pod, new attempts after failures."""
    counted: Count = 0
    """New attempts that count against restart.maxRestarts now."""
    in_place: Count = 0
    """Restarts of the trainer inside its pod."""
    last_time: datetime | None = None
    """When the last new attempt was decided."""


class RestoreFailures(StatusModel):
    no_checkpoint: Count = 0
    """There was nothing to go back to."""
    integrity_failed: Count = 0
    """Nothing that was there verified."""
    deadline_exceeded: Count = 0
    """It was not read in time."""
    apply_failed: Count = 0
    """It verified and could not be put in place."""


class Rollbacks(StatusModel):
    total: Count = 0
    """Rollbacks so far."""
    counted: Count = 0
    """Those within rollback.windowSeconds."""
    skipped_batches: Count = 0
    """Batches that were left out."""
    restore_failures: RestoreFailures | None = None
    """Attempts to restore a state that failed, by outcome; absent while there are none."""


class Rejections(StatusModel):
    signals: Count = 0
    """Emergency signals that were forged, replayed or not for this run."""
    commands: Count = 0
    """Commands that Kasmina refused."""


class LastRecovery(StatusModel):
    kind: RecoveryKind
    """How far the run had to go back to recover."""
    cause: Reason = ""
    """Reason of the anomaly or failure."""
    tier: RollbackTier | None = None
    """Where the state came from: memory (Fast) or the checkpoint volume (Full); absent when training began anew."""
    from_step: Count | None = None
    """Step at which it happened."""
    to_step: Count | None = None
    """Step that training went on from."""
    detected_time: datetime | None = None
    """When it was noticed."""
    completed_time: datetime | None = None
    """When training went on."""
    detect_milliseconds: Count | None = None
    """From the event to its detection."""
    recover_milliseconds: Count | None = None
    """From the detection to the next step."""
    incident: Annotated[str, StringConstraints(max_length=64)] | None = None
    """By which logs, Events, telemetry and the run's record tell of it."""


class Halt(StatusModel):
    id: Annotated[str, StringConstraints(max_length=63)]
    """Id of the emergency signal."""
    mode: EmergencyStop
    """What was asked for."""
    source: HaltSource
    """Who asked for it."""
    requested_time: datetime | None = None
    """When it was asked for."""
    completed_time: datetime | None = None
    """When the last rank acknowledged."""
    acknowledged: Count = 0
    """Ranks that acknowledged."""
    expected: Count = 0
    """Ranks that have to."""
    missing: tuple[Name, ...] = Field((), max_length=32, json_schema_extra=listing("atomic"))
    """Who has not acknowledged: a pod stands for its trainer, <pod>/kasmina and <pod>/tamiyo for its sidecars."""
    milliseconds: Count | None = None
    """From the request to the last acknowledgement."""
    saved_step: Count | None = None
    """Step that was saved by the halt."""


class LastFailure(StatusModel):
    rank: Count | None = None
    """Rank that failed."""
    pod_name: Name | None = None
    """Pod that failed."""
    node_name: Name | None = None
    """Its node."""
    container_name: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Container that failed."""
    exit_code: Integer | None = None
    """Its exit code; 128 + signal when killed."""
    reason: Reason = ""
    """CamelCase reason."""
    message: Annotated[str, StringConstraints(max_length=MAX_MESSAGE)] = ""
    """What the process said last."""
    time: datetime | None = None
    """When it happened."""


class HistoryEntry(StatusModel):
    time: datetime
    """When, by the runtime's own clock where the runtime reported it."""
    from_: Annotated[str, StringConstraints(max_length=32)] | None = Field(None, alias="from")
    """Phase before."""
    to: Annotated[str, StringConstraints(max_length=32)]
    """Phase after."""
    reason: Reason = ""
    """CamelCase reason."""
    attempt: Count | None = None
    """Attempt at that time."""
    step: Count | None = None
    """Step at that time."""


class Status(StatusModel):
    """What became of the run so far; written by the operator."""

    observed_generation: Count | None = None
    """metadata.generation that this status is about."""
    phase: Phase | None = None
    """Summary derived from conditions, for people and columns only; new values may be added."""
    reason: Reason | None = None
    """Why this phase."""
    conditions: tuple[Condition, ...] = Field((), max_length=16, json_schema_extra=listing("map", "type"))
    """The run's state, one aspect each."""
    attempt: Count = 0
    """Rises by one with each new child Job (restart, rollback, resume)."""
    job_name: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Job of the current attempt."""
    next_attempt_time: datetime | None = None
    """The current attempt is over; the next one starts at this time at the earliest. Absent while an attempt lasts."""
    start_time: datetime | None = None
    """When the first pod was created."""
    paused_seconds: Count | None = None
    """Time spent frozen, halted or suspended so far; activeDeadlineSeconds does not count it."""
    completion_time: datetime | None = None
    """When the run ended."""
    observed_report: ObservedReport | None = None
    """Last report of the runtime that this status includes."""
    launched: Launched | None = None
    """What the current attempt was started with: tells edits that must wait from those already in force."""
    ranks: Ranks | None = None
    """Worker pods by state."""
    progress: Progress | None = None
    """How far training is."""
    topology: Topology | None = None
    """Morphogenetic state of the model."""
    checkpoint: CheckpointStatus | None = None
    """Checkpoints on the volume."""
    restarts: Restarts | None = None
    """Restarts so far."""
    rollbacks: Rollbacks | None = None
    """Rollbacks so far."""
    rejections: Rejections | None = None
    """Signals and commands that were refused."""
    last_recovery: LastRecovery | None = None
    """The last recovery from an anomaly or failure."""
    halt: Halt | None = None
    """The emergency stop in force, or the last one."""
    last_failure: LastFailure | None = None
    """The last failure of a container."""
    history: tuple[HistoryEntry, ...] = Field((), max_length=MAX_HISTORY, json_schema_extra=listing("atomic"))
    """The last transitions, oldest first."""

    def condition(self, kind: str) -> Condition | None:
        """The condition of type `kind`, if it was ever written."""
        return next((c for c in self.conditions if c.type == kind), None)
