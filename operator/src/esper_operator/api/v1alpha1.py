"""spec and status of an EsperTrainingRun, version v1alpha1: the source of the CRD and of `kubectl explain`.

Field docstrings are the descriptions; bounds hold in the API server and here alike. Rules across fields are written
once as CEL (`rules(...)`, for the API server) and once in `esper_operator.api.validate`, for objects that came past it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from esper_leyline.env import RESERVED
from esper_leyline.phases import EmergencyStop, FaultKind
from pydantic import Field, PlainValidator, StringConstraints
from pydantic.json_schema import WithJsonSchema

from esper_operator.api.base import (
    DECIMAL_PATTERN,
    ENTRYPOINT_PATTERN,
    ENV_PATTERN,
    FACTOR_PATTERN,
    Boolean,
    FieldError,
    Integer,
    Model,
    ObjectName,
    Quantity,
    listing,
    parse,
    ruled,
    rules,
)
from esper_operator.api.podfields import (
    DOTS_RULES,
    SYSTEM_PATH_RULE,
    Affinity,
    MountPath,
    PodFields,
    SubPath,
    Toleration,
    Volume,
)
from esper_operator.api.runstatus import (
    CheckpointStatus,
    Condition,
    Halt,
    HistoryEntry,
    LastFailure,
    LastRecovery,
    Launched,
    Metric,
    ObservedReport,
    Progress,
    Ranks,
    Rejections,
    Restarts,
    Rollbacks,
    Status,
    Topology,
)

__all__ = [
    "Affinity", "Checkpoint", "CheckpointStatus", "ClaimTemplate", "Condition", "Emergency", "EnvVar", "Fault",
    "FieldError", "Halt", "Health", "HistoryEntry", "LastFailure", "LastRecovery", "Launched", "Metric",
    "ObservedReport", "PodFields", "Progress", "Ranks", "Rejections", "Resources", "Restart", "Restarts", "Rollback",
    "Rollbacks", "Runtime", "Scheduling", "Spec", "Status", "Storage", "Toleration", "Topology", "Volume", "Workers",
]  # fmt: skip

MAX_CONFIG_BYTES = 64 * 1024
"""Of runtime.config as JSON. The API server cannot bound a free-form field; validate() does."""

AnomalyAction = Literal["Ignore", "Rollback", "Halt"]
Step = Annotated[Integer, Field(ge=1, le=100_000_000)]


def _processes(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64):
        return value
    raise ValueError("must be 'auto' or an integer from 1 to 64")


Processes = Annotated[
    Literal["auto"] | int,
    PlainValidator(_processes),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "maxLength": 4,
            **rules(
                (
                    "type(self) == string ? self == 'auto' : (int(self) >= 1 && int(self) <= 64)",
                    "must be 'auto' or an integer from 1 to 64",
                )
            ),
        }
    ),
]


class KeyRef(Model):
    name: ObjectName
    """Name of the object, in the run's namespace."""
    key: Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """Key of the value in it."""


class EnvVar(Model):
    model_config = ruled(
        (
            f"!(self.name in {sorted(n for n in RESERVED if not n.startswith('ESPER_'))})"
            " && !self.name.startsWith('ESPER_')",
            "`name` may not begin with ESPER_ nor be one of the variables that the operator sets; choose another",
        ),
        (
            "[has(self.value), has(self.secretKeyRef), has(self.configMapKeyRef)].filter(x, x).size() == 1",
            "exactly one of `value`, `secretKeyRef`, `configMapKeyRef` must be set",
        ),
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=ENV_PATTERN)]
    """Name of the variable; none of the operator's."""
    value: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """The value itself."""
    secret_key_ref: KeyRef | None = None
    """Value from a Secret."""
    config_map_key_ref: KeyRef | None = None
    """Value from a ConfigMap."""


class Profiler(Model):
    first_step: Step
    """Step from which to record."""
    active_steps: Integer = Field(10, ge=1, le=1000)
    """Steps in one trace."""
    every_steps: Integer = Field(0, ge=0, le=100_000_000)
    """Steps from the beginning of one trace to that of the next; 0: one trace."""
    repeat: Integer = Field(1, ge=1, le=32)
    """Traces to make."""


class Runtime(Model):
    image: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\s]+$")] | None = None
    """Image of the trainer; absent: the operator's runtime image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the trainer's image is pulled."""
    entrypoint: Annotated[str, StringConstraints(min_length=3, max_length=253, pattern=ENTRYPOINT_PATTERN)]
    """Function that builds the workload, as 'package.module:function'."""
    config: Mapping[str, Any] = Field(
        default_factory=dict, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """Handed to the entrypoint as a mapping; at most 64 KiB as JSON (checked by the operator)."""
    code_config_map_name: ObjectName | None = None
    """ConfigMap whose keys are Python files; mounted read-only and put first on the Python path."""
    env: tuple[EnvVar, ...] = Field((), max_length=128, json_schema_extra=listing("map", "name"))
    """Additional environment of the trainer."""
    profiler: Profiler | None = None
    """Record Chrome traces of some steps on the checkpoint volume."""


class Elastic(Model):
    min_count: Integer = Field(ge=1, le=1024)
    """Least number of workers to train with."""
    max_count: Integer = Field(ge=1, le=1024)
    """Greatest number of workers."""


class Resources(Model):
    limits: Mapping[str, Quantity] = Field(default_factory=dict, max_length=32)
    """Most that the trainer may use; GPUs go here, as nvidia.com/gpu."""
    requests: Mapping[str, Quantity] = Field(default_factory=dict, max_length=32)
    """What is reserved for the trainer; absent: as the limits, and without those 500m CPU and 1Gi memory."""


class Workers(Model):
    model_config = ruled(
        (
            "!has(self.elastic) || !has(self.count)"
            " || self.elastic.minCount <= self.count && self.count <= self.elastic.maxCount",
            "`count` must be between `elastic.minCount` and `elastic.maxCount`",
        )
    )

    count: Integer = Field(1, ge=1, le=1024)
    """Number of worker pods (nodes)."""
    processes_per_worker: Processes = "auto"
    """Trainer processes per pod; auto: one per GPU, else one."""
    elastic: Elastic | None = None
    """Bounds within which the number of workers may change while training."""
    resources: Resources = Field(default_factory=Resources)
    """CPU, memory and devices of the trainer's container."""
    shared_memory_size: Quantity = "1Gi"
    """Size limit of the memory volume at /dev/shm, which holds the snapshots; counts against the memory limit."""
    pod: PodFields = Field(default_factory=PodFields)
    """The pod fields that a run may set. All else of the pod is the operator's."""


class ClaimTemplate(Model):
    storage_class_name: ObjectName | None = None
    """StorageClass; absent: the cluster's default."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"] = "ReadWriteOnce"
    """Access mode of the claim."""
    size: Quantity
    """Size of the claim, such as 10Gi."""
    when_deleted: Literal["Retain", "Delete"] = "Retain"
    """What happens to the claim when the run is deleted."""


class Storage(Model):
    model_config = ruled(
        (
            "[has(self.claimName), has(self.claimTemplate)].filter(x, x).size() == 1",
            "exactly one of `claimName` and `claimTemplate` must be set",
        ),
        *(("!has(self.mountPath) || " + rule, message) for rule, message in (SYSTEM_PATH_RULE, DOTS_RULES[0])),
        DOTS_RULES[1],
    )

    claim_name: ObjectName | None = None
    """An existing PersistentVolumeClaim of the namespace."""
    claim_template: ClaimTemplate | None = None
    """A claim of the run's own, named <run>-checkpoints."""
    mount_path: MountPath = "/checkpoints"
    """Directory of the volume in the trainer's container."""
    sub_path: SubPath | None = None
    """Directory of the volume to use; lets runs share a claim."""


class MemorySnapshots(Model):
    mode: Literal["Disabled", "Local", "Replicated"] = "Local"
    """Where snapshots for fast rollback are kept: nowhere, in the pod, or in another pod too."""
    every_steps: Step = 10
    """Steps between snapshots."""
    snapshots: Integer = Field(3, ge=2, le=16)
    """How many to keep; fewer where they do not fit."""
    max_size: Quantity | None = None
    """Upper bound of their size together; absent: what workers.sharedMemorySize offers."""


class Retention(Model):
    keep_latest: Integer = Field(3, ge=1, le=1000)
    """Newest checkpoints to keep."""
    keep_best: Integer = Field(1, ge=0, le=1000)
    """Best checkpoints to keep besides."""
    keep_every_steps: Integer = Field(0, ge=0, le=100_000_000)
    """Keep for ever the checkpoints at multiples of this step; 0: none."""
    max_age_seconds: Integer = Field(0, ge=0, le=315_360_000)
    """Delete older checkpoints, whatever else would keep them, but never the newest verified one; 0: no limit."""
    max_size: Quantity | None = None
    """Delete the oldest while they take more room than this, but never the newest verified one."""
    metric: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "loss"
    """Validation metric that decides which is best."""
    mode: Literal["Min", "Max"] = "Min"
    """Whether less or more of it is better."""


class ResumeFrom(Model):
    model_config = ruled(
        (
            "!has(self.step) || !has(self.select) || self.select == 'LatestVerified'",
            "`step` and `select: Best` exclude each other; remove one",
        )
    )

    run_name: ObjectName
    """Run of the same namespace whose checkpoints to start from; its claim is mounted read-only."""
    step: Integer | None = Field(None, ge=0, le=100_000_000)
    """Step to start from; absent: by select."""
    select: Literal["LatestVerified", "Best"] = "LatestVerified"
    """Which of its checkpoints."""


class Checkpoint(Model):
    storage: Storage
    """Where checkpoints are kept. Immutable."""
    every_steps: Step | None = None
    """Save after this many steps."""
    period_seconds: Integer = Field(60, ge=1, le=604800)
    """Save after this many seconds."""
    memory: MemorySnapshots = Field(default_factory=MemorySnapshots)
    """Snapshots in memory, for rollback in milliseconds."""
    verification: Literal["None", "Checksum", "Load"] = "Checksum"
    """How a checkpoint is checked after it was written."""
    retention: Retention = Field(default_factory=Retention)
    """Which checkpoints are kept."""
    resume_from: ResumeFrom | None = None
    """Start from another run's checkpoint."""


class LossSpike(Model):
    action: AnomalyAction = "Rollback"
    """What to do about a loss spike."""
    window_steps: Integer = Field(100, ge=5, le=100_000)
    """Steps that the loss is compared with."""
    threshold: Annotated[str, StringConstraints(max_length=16, pattern=DECIMAL_PATTERN)] = "3.0"
    """Robust z-score (decimal string) from which a loss counts as a spike."""
    consecutive_steps: Integer = Field(3, ge=1, le=1000)
    """Steps in a row that must be above the threshold."""


class GradientNorm(Model):
    action: AnomalyAction = "Ignore"
    """What to do about exploding gradients."""
    factor: Annotated[str, StringConstraints(max_length=16, pattern=DECIMAL_PATTERN)] = "5.0"
    """How many times its usual value (decimal string) the gradient's L2 norm must be."""
    consecutive_steps: Integer = Field(3, ge=1, le=1000)
    """Steps in a row that must be above it."""


class ValidationDrop(Model):
    action: AnomalyAction = "Ignore"
    """What to do when an epoch ends worse than the best one."""
    max_drop: Annotated[str, StringConstraints(max_length=16, pattern=DECIMAL_PATTERN)] = "0.02"
    """How much worse than its best value retention.metric may become, as a share of that (decimal string)."""


class Health(Model):
    heartbeat_timeout_seconds: Integer = Field(60, ge=5, le=86400)
    """A trainer without a sign of life for so long counts as hung."""
    progress_timeout_seconds: Integer = Field(600, ge=10, le=604800)
    """Hang limit with heartbeats but no new step."""
    non_finite_action: AnomalyAction = "Rollback"
    """What to do about a NaN or infinite loss or gradient."""
    loss_spike: LossSpike = Field(default_factory=LossSpike)
    """What counts as a loss spike and what to do about it."""
    gradient_norm: GradientNorm = Field(default_factory=GradientNorm)
    """What counts as an exploding gradient and what to do about it."""
    validation: ValidationDrop = Field(default_factory=ValidationDrop)
    """What counts as a regression of the validation metric and what to do about it."""


class Rollback(Model):
    max_rollbacks: Integer = Field(3, ge=0, le=1000)
    """Rollbacks allowed within windowSeconds."""
    window_seconds: Integer = Field(86400, ge=60, le=2_592_000)
    """Time that counted rollbacks stay counted."""
    target: Literal["LatestVerified", "BeforeAnomaly", "Best"] = "BeforeAnomaly"
    """Which saved state to go back to."""
    learning_rate_scale: Annotated[str, StringConstraints(max_length=16, pattern=FACTOR_PATTERN)] = "1.0"
    """Factor on the learning rate after each rollback (decimal string, at most 1)."""
    skip_batches: Literal["None", "Anomalous"] = "Anomalous"
    """Whether the batches of the anomaly are left out after the rollback."""
    on_exhausted: Literal["Halt", "Fail"] = "Halt"
    """What to do when maxRollbacks is reached."""
    fast_deadline_milliseconds: Integer = Field(500, ge=1, le=600_000)
    """A rollback from memory that takes longer is given up for one from the checkpoint volume."""
    full_deadline_seconds: Integer = Field(12, ge=1, le=3600)
    """A rollback from the checkpoint volume that takes longer is given up, and onExhausted follows."""


class ExitCodeRule(Model):
    action: Literal["Fail", "Halt", "Rollback", "Restart", "RestartUncounted"]
    """What to do."""
    values: tuple[Annotated[Integer, Field(ge=1, le=255)], ...] = Field(
        min_length=1, max_length=64, json_schema_extra=listing("set")
    )
    """Exit codes of the trainer's container."""


class Restart(Model):
    model_config = ruled(
        (
            "!has(self.initialBackoffSeconds) || !has(self.maxBackoffSeconds)"
            " || self.initialBackoffSeconds <= self.maxBackoffSeconds",
            "`initialBackoffSeconds` must not be greater than `maxBackoffSeconds`",
        )
    )

    max_restarts: Integer = Field(10, ge=0, le=10_000)
    """New attempts after failures before the run fails."""
    reset_after_seconds: Integer = Field(3600, ge=0, le=2_592_000)
    """Healthy time after which the counted restarts go back to 0."""
    initial_backoff_seconds: Integer = Field(5, ge=0, le=3600)
    """Wait before the first new attempt; doubles with each further one."""
    max_backoff_seconds: Integer = Field(300, ge=0, le=86400)
    """Longest wait before a new attempt."""
    strategy: Literal["Auto", "InPlace", "Recreate"] = "Auto"
    """How a dead trainer comes back: cheapest way first, only inside its pod, or only with a new pod."""
    avoid_failed_nodes: Literal["Never", "RepeatOffenders", "Always"] = "Never"
    """Whether new pods keep away from nodes where pods of this run failed."""
    disruptions_count: Boolean = False
    """Whether evictions and preemptions count as restarts."""
    exit_codes: tuple[ExitCodeRule, ...] = Field((), max_length=20, json_schema_extra=listing("atomic"))
    """Actions by exit code of the trainer's container; the first match wins."""
    termination_grace_period_seconds: Integer = Field(120, ge=1, le=3600)
    """Time that a stopping pod has to save its state."""


class Emergency(Model):
    channels: tuple[Literal["ConfigMap", "Redis"], ...] = Field(
        ("Redis", "ConfigMap"), min_length=1, max_length=2, json_schema_extra=listing("set")
    )
    """Ways on which stop signals reach the pods."""
    acknowledge_timeout_seconds: Integer = Field(15, ge=1, le=600)
    """Time after which a rank that did not acknowledge is reported as missing."""


class Fault(Model):
    model_config = ruled(("self.kind != 'SlowStep' || has(self.milliseconds)", "`kind: SlowStep` needs `milliseconds`"))

    kind: FaultKind
    """What goes wrong."""
    step: Step
    """At which step; each fault fires once per run."""
    rank: Integer = Field(0, ge=0, le=65535)
    """At which rank."""
    milliseconds: Integer | None = Field(None, ge=1, le=3_600_000)
    """How long, for Hang and SlowStep."""


class Scheduling(Model):
    queue_name: Annotated[str, StringConstraints(min_length=1, max_length=63)] | None = None
    """Copied to the child Job as kueue.x-k8s.io/queue-name."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    gang: Literal["None", "Kueue", "Native", "Volcano", "Coscheduling"] = "None"
    """Who makes sure that all workers start together."""


_MANAGED_BY_RULES = (
    ("self == oldSelf", "field is immutable"),
    (
        "self in ['esper.dev/operator', 'kueue.x-k8s.io/multikueue']",
        "must be 'esper.dev/operator' or 'kueue.x-k8s.io/multikueue'",
    ),
)
_STOPPED = "self.suspend || self.emergencyStop in ['Checkpoint', 'Kill']"


class Spec(Model):
    """What a run is to do."""

    model_config = ruled(
        ("has(self.managedBy) == has(oldSelf.managedBy)", "`managedBy` may not be added or removed"),
        (
            f"self.runtime == oldSelf.runtime || {_STOPPED}",
            "`runtime` may only be changed while `suspend` is true or `emergencyStop` is Checkpoint or Kill",
        ),
        (
            f"self.workers == oldSelf.workers || {_STOPPED} || has(self.workers.elastic)",
            "`workers` may only be changed while `suspend` is true or `emergencyStop` is Checkpoint or Kill,"
            " unless `workers.elastic` is set",
        ),
        ("self.checkpoint.storage == oldSelf.checkpoint.storage", "`checkpoint.storage` is immutable"),
    )

    suspend: Boolean = False
    """Releases all pods gracefully and keeps state; also Kueue's hook. Resuming starts a new attempt from the latest
    verified checkpoint."""
    managed_by: Annotated[str, StringConstraints(max_length=63)] | None = Field(
        None, json_schema_extra=rules(*_MANAGED_BY_RULES)
    )
    """Controller that reconciles this object. Needed for MultiKueue."""
    emergency_stop: EmergencyStop = EmergencyStop.NONE
    """Desired emergency state. Freeze keeps the pods and stops stepping; Checkpoint saves, then stops; Kill stops at
    once. In force until set back to None."""
    active_deadline_seconds: Integer | None = Field(None, ge=1, le=31_536_000)
    """Time after which an unfinished run fails, counted from its first pod."""
    startup_deadline_seconds: Integer = Field(1800, ge=30, le=86400)
    """Time for all ranks of an attempt to report a first step, counted from pod creation."""
    ttl_seconds_after_finished: Integer | None = Field(None, ge=0, le=31_536_000)
    """Time after which a finished run is deleted; absent: never."""
    runtime: Runtime
    """What is trained."""
    workers: Workers = Field(default_factory=Workers)
    """What it is trained on."""
    checkpoint: Checkpoint
    """How state is kept."""
    health: Health = Field(default_factory=Health)
    """What counts as unhealthy and what to do about it."""
    rollback: Rollback = Field(default_factory=Rollback)
    """How training goes back to a good state."""
    restart: Restart = Field(default_factory=Restart)
    """How failed pods come back."""
    emergency: Emergency = Field(default_factory=Emergency)
    """How stop signals travel."""
    fault_injection: tuple[Fault, ...] = Field((), max_length=16, json_schema_extra=listing("atomic"))
    """Faults for tests and demonstrations; refused unless the operator allows them."""
    scheduling: Scheduling = Field(default_factory=Scheduling)
    """Queue and priority."""
    succeed_when: Literal["AllWorkers", "FirstWorker"] = "AllWorkers"
    """Which workers must complete for the run to succeed."""

    @classmethod
    def parse(cls, raw: Any) -> "Spec":
        """The spec in `raw` with its defaults. FieldError names every bad field and its remedy."""
        return parse(cls, raw, "spec")
