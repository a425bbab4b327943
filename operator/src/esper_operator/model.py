"""The values that flow through one reconcile: what was seen, what is to be done, what will be said.

Frozen dataclasses only; no I/O, no clock, no raw Kubernetes dicts except manifests that are about to be written.
`observe` makes an Observation, `decide` turns it into a Plan, `status` turns both into a StatusChange; the operator's
`apply` and the laptop runner's both only carry a Plan out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from esper_leyline.paths import POD, PathLayout
from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import RunReport

from esper_operator.api.v1alpha1 import LastFailure, Spec, Status

Manifest = dict[str, Any]
"""A Kubernetes object as it will be sent."""


@dataclass(frozen=True, slots=True, order=True)
class RunKey:
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision explains itself: status, Events, logs, metrics and tests all use this pair."""

    reason: RunReason
    message: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a spec: where, what, and how to mend it."""

    field: str
    """Path such as spec.workers.count."""
    message: str
    reason: RunReason = RunReason.INVALID_SPEC

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


# --- configuration that arrives as a value -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the pure core needs to know of the operator's own configuration."""

    runtime_image: str
    """For runs without spec.runtime.image."""
    sidecar_image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    fault_injection: bool = False
    key_seed: bytes = field(repr=False, default=b"")
    """Seed of all run keys; at least 32 bytes."""
    key_generation: int = 1
    """Number of the keys in force; one more is a rotation."""
    bus_url: str = ""
    """redis:// or rediss:// URL that pods use; empty = no Redis."""
    bus_username: str = ""
    bus_password: str = field(repr=False, default="")
    bus_ca: str = ""
    bus_per_run_users: bool = False
    """Each run logs in to Redis as a user of its own, whom somebody makes there."""
    layout: PathLayout = POD
    http_ports_fixed: bool = True
    """False on a laptop: sidecars take free ports and write them to <run dir>/<name>.port."""
    log_format: str = "json"


# --- what was seen -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One EsperTrainingRun. `spec` has its defaults; `problems` is what validate() found."""

    key: RunKey
    uid: str
    generation: int
    resource_version: str
    created: datetime
    deleting: bool
    labels: Mapping[str, str]
    spec: Spec
    status: Status
    """The status as last written; empty at first."""
    problems: tuple[Problem, ...] = ()
    readable: bool = True
    """False: parts of the spec do not parse. `spec` then holds the parts that do, placeholders for the rest, and
    `problems` says which; nothing is ever built from it, but stopping still works."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Termination:
    exit_code: int
    reason: str
    message: str
    """The termination message, cut to 2048 characters."""
    finished: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    name: str
    ready: bool
    started: bool
    restarts: int
    waiting_reason: str = ""
    waiting_message: str = ""
    terminated: Termination | None = None
    last_terminated: Termination | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """The little of a pod that decisions need."""

    name: str
    uid: str
    namespace: str
    run: str
    run_uid: str
    job_uid: str
    """UID of the controlling Job; a copied label does not make a pod ours."""
    attempt: int
    rank: int
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown."""
    node: str
    ip: str
    deleting: bool
    created: datetime
    ready: bool
    disrupted: bool
    """DisruptionTarget is True: eviction, preemption, taint."""
    node_lost: bool
    """Ready is False because its node is unreachable."""
    unschedulable: str
    """The scheduler's message while it finds no place; empty otherwise."""
    status_message: str
    containers: tuple[Container, ...]
    """Init (sidecar) and main containers."""
    job_name: str = ""
    """Name of the controlling Job, for when that Job is already gone."""
    started: datetime | None = None
    """When its node's kubelet accepted it; None while it waits for a place."""
    config_hash: str = ""
    """Its annotation esper.dev/config-hash."""

    def container(self, name: str) -> Container | None:
        return next((c for c in self.containers if c.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    name: str
    uid: str
    attempt: int
    created: datetime
    deleting: bool
    suspended: bool
    """By a queue manager."""
    complete: bool
    failed: bool
    failed_reason: str
    failed_message: str
    owner_uid: str = ""
    """UID of the controlling run; a copied label does not make a Job ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The PersistentVolumeClaim of the run's checkpoints."""

    name: str
    phase: str
    """Pending, Bound, Lost, or empty when it does not exist."""
    storage_class: str = ""
    """Empty: it names none, and the cluster has no default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """A Secret that the spec names. Whose it is matters, not what it holds."""

    name: str
    found: bool
    owner: str = ""
    """A run or the operator, in words; empty: the user's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Broadcast:
    """One key of ConfigMap esper-emergency that matches this run."""

    id: str
    mode: EmergencyStop
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalRecord:
    """The last emergency signal sent to the run's pods, as ConfigMap <run>-emergency remembers it."""

    term: int
    seq: int
    signal_id: str
    mode: EmergencyStop
    source: HaltSource
    attempt: int
    clear: bool
    time: datetime | None = field(default=None, compare=False)
    """When it was sealed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeSource:
    """Another run, whose checkpoints this one starts from, and where they lie."""

    uid: str
    claim: str = ""
    """Its claim; empty where its checkpoints can be seen anyway (a laptop)."""
    sub_path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One consistent look at a run and all that belongs to it."""

    run: Run
    now: datetime
    settings: Settings
    jobs: tuple[Job, ...] = ()
    """All Jobs that this run controls, by attempt."""
    pods: tuple[Pod, ...] = ()
    """Pods of those Jobs, by attempt and rank."""
    claim: Claim | None = None
    """None: not looked up, because no pod waits for a place."""
    secrets: tuple[Secret, ...] = ()
    """Those that the spec names, as they are before a Job is created; empty while there is one."""
    reports: tuple[RunReport, ...] = ()
    """Verified reports newer than status.observedReport, by (attempt, seq)."""
    report_age_s: float | None = None
    """Since the last report of the current attempt, by the operator's monotonic clock. None: none yet."""
    broadcasts: tuple[Broadcast, ...] = ()
    signal: SignalRecord | None = None
    claim_user: str = ""
    """Another live run (namespace/name) that was first on the same claim and subPath; empty when none."""
    resume: ResumeSource | None = None
    """The run that checkpoint.resumeFrom names; None when unset or not found."""
    report_cursor: tuple[int, int] | None = None
    """(attempt, seq) up to which reports were dropped after StatusChange.folded allowed it; None: none were."""

    @property
    def job(self) -> Job | None:
        """The Job of the highest attempt."""
        return self.jobs[-1] if self.jobs else None


# --- what is to be done --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A desired object. Equal content is not sent again: `apply` compares against what it last wrote."""

    manifest: Manifest
    create_only: bool = False
    """One that exists is left alone (after its owner UID is checked). False: server-side apply under our manager."""
    key_generation: int = 0
    """Of a `create_only` one that holds keys: one with older keys is written again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    kind: str
    """Job or EsperTrainingRun (TTL)."""
    name: str
    uid: str
    """Precondition."""
    grace_seconds: int | None = None
    """None: the object's own. Never 0, which would be a force-delete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalOrder:
    """Send this to the pods: leg 2 (Oona) and leg 3 (ConfigMap and annotation) at once."""

    mode: EmergencyStop
    source: HaltSource
    reason: str
    attempt: int
    clear: bool = False
    signal_id: str | None = None
    """For a clear: the signal it lifts. None: a new id."""


class Ending(StrEnum):
    """How an attempt or the run came to an end, where a plan decides so."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    """The run has failed."""
    RESTART = "Restart"
    """The attempt failed; another one follows."""
    RESUME = "Resume"
    """The attempt was halted and the halt is lifted; another one follows, which is no restart."""
    HALTED = "Halted"
    """The runtime halted by itself; a person decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """An end that the status must record before anything is deleted or created because of it."""

    ending: Ending
    next_time: datetime | None = None
    """RESTART, RESUME: when the next attempt may start."""
    counted: int = 0
    """RESTART, FAILED: restarts that count against maxRestarts, with this one."""
    failure: LastFailure | None = None
    saved_step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do now, in this order: children, signal, deletions, job; then one status write, then Events."""

    verdict: Verdict
    children: tuple[Child, ...] = ()
    signal: SignalOrder | None = None
    deletions: tuple[Deletion, ...] = ()
    job: Manifest | None = None
    attempt: int | None = None
    """Attempt of `job`."""
    touch_pods: str | None = None
    """New value of the config-hash annotation of all pods, so that the kubelet refreshes their mounts."""
    requeue_after_s: float | None = None
    """Look again after so long at the latest. 0: at once, after this plan is carried out."""
    outcome: Outcome | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRecord:
    """A Kubernetes Event to post after the status write succeeded."""

    reason: RunReason
    message: str
    warning: bool = False
    action: str = "Reconcile"
    incident: str = ""
    """What it is a part of (esper_leyline.incidents); empty: nothing has gone wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What carrying out a plan brought back."""

    signal: SignalRecord | None = None
    refused: str = ""
    """What the API server refused (quota, admission) and why, beginning with kind and name; the Job was not created."""
    waiting: str = ""
    """What has to be gone before the Job can be created: objects of an earlier run of the same name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusChange:
    """The complete next status and the Events of this transition."""

    status: Status
    events: tuple[EventRecord, ...] = ()
    urgent: bool = False
    """A transition: write at once. Otherwise progress: at most every 10 s per run."""
    changed: bool = True
    """False: equal to what is stored; write nothing."""
    folded: tuple[int, int] | None = None
    """Only when nothing changed: reports up to this (attempt, seq) hold no news and may be dropped; hand it back as
    Observation.report_cursor."""
