"""Observations in one line: `a_run().with_job().with_pods(1).failed(70).seen()`.

Everything is built as the raw object that the API server would give and read by `esper_operator.observe`, so a test
of a policy also tests what observe makes of the cluster. A Scene never changes; each method gives another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, cast

from esper_leyline import labels
from esper_leyline.phases import EmergencyStop, HaltSource
from esper_leyline.v1.emergency_pb2 import EmergencyAck
from esper_leyline.v1.report_pb2 import (
    CheckpointState,
    Counters,
    Progress,
    RunReport,
    RuntimePhase,
    Transition,
)

from esper_operator import observe
from esper_operator.decide import decide
from esper_operator.model import (
    Applied,
    Broadcast,
    Claim,
    Observation,
    Plan,
    ResumeSource,
    Secret,
    Settings,
    SignalRecord,
    StatusChange,
)
from esper_operator.status import next_status
from esper_operator.testing.clock import START

UID = "5b6b9d0e-5f2c-4e0b-9a55-000000000001"
SETTINGS = Settings(runtime_image="esper/runtime:test", sidecar_image="esper/sidecar:test", key_seed=b"s" * 32)
SPEC: Mapping[str, Any] = {
    "runtime": {"entrypoint": "esper_runtime.workloads.digits:build"},
    "checkpoint": {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 50},
}


def a_run(name: str = "digits", **spec: Any) -> "Scene":
    """A valid run that nobody has looked at yet; keywords replace top-level fields of its spec (camelCase)."""
    return Scene(name=name, spec={**SPEC, **spec})


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def runtime_phase(name: str) -> RuntimePhase:
    """RUNNING -> RUNTIME_PHASE_RUNNING."""
    return cast(RuntimePhase, RuntimePhase.Value(f"RUNTIME_PHASE_{name}"))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run with all that belongs to it, at one moment."""

    name: str
    spec: Mapping[str, Any]
    namespace: str = "team"
    uid: str = UID
    now: datetime = START
    generation: int = 1
    deleting: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    jobs: tuple[Mapping[str, Any], ...] = ()
    pods: tuple[Mapping[str, Any], ...] = ()
    reports: tuple[RunReport, ...] = ()
    report_age_s: float | None = None
    report_cursor: tuple[int, int] | None = None
    broadcasts: tuple[Broadcast, ...] = ()
    signal: SignalRecord | None = None
    claim: Claim | None = None
    secrets: tuple[Secret, ...] = ()
    claim_user: str = ""
    resume: ResumeSource | None = None
    settings: Settings = SETTINGS

    # --- the run ---

    def at(self, seconds: float) -> "Scene":
        """So many seconds after the start of the test."""
        return replace(self, now=START + timedelta(seconds=seconds))

    def later(self, seconds: float) -> "Scene":
        return replace(self, now=self.now + timedelta(seconds=seconds))

    def having(self, **changes: Any) -> "Scene":
        """Any field replaced: settings, claim, resume, labels …"""
        return replace(self, **changes)

    def edited(self, **spec: Any) -> "Scene":
        """A person edits top-level fields of the spec; None removes one."""
        merged = {k: v for k, v in {**self.spec, **spec}.items() if v is not None}
        return replace(self, spec=merged, generation=self.generation + 1)

    def suspended(self, value: bool = True) -> "Scene":
        return self.edited(suspend=value)

    def stopped(self, mode: str) -> "Scene":
        """spec.emergencyStop"""
        return self.edited(emergencyStop=mode)

    def broadcast(self, mode: str, name: str = "fire") -> "Scene":
        found = Broadcast(id=name, mode=EmergencyStop(mode), reason=f"{name} in the building")
        return replace(self, broadcasts=(*self.broadcasts, found))

    def signalled(self, mode: str, *, attempt: int = 1, clear: bool = False, seq: int = 1) -> "Scene":
        """What <run>-emergency remembers."""
        record = SignalRecord(
            term=1,
            seq=seq,
            signal_id=f"{seq:032x}",
            mode=EmergencyStop(mode),
            source=HaltSource.SPEC,
            attempt=attempt,
            clear=clear,
        )
        return replace(self, signal=record)

    # --- Jobs and pods ---

    def with_job(self, attempt: int = 1, *, deleting: bool = False, suspended: bool = False, **ended: Any) -> "Scene":
        """`ended`: complete=True or failed="BackoffLimitExceeded". A Job of the same attempt is replaced."""
        job = job_manifest(self, attempt, deleting=deleting, suspended=suspended, **ended)
        others = tuple(j for j in self.jobs if j["metadata"]["name"] != job["metadata"]["name"])
        return replace(self, jobs=(*others, job))

    def without_jobs(self) -> "Scene":
        return replace(self, jobs=(), pods=())

    def with_pods(self, count: int = 1, state: str = "training", **options: Any) -> "Scene":
        """`count` ranks; state is pending, placed, training or failed. Options are pod_manifest's."""
        added = tuple(pod_manifest(self, state, rank=rank, **options) for rank in range(count))
        return replace(self, pods=(*self.pods, *added))

    def failed(self, exit_code: int, *, message: str = "", reason: str = "Error", **options: Any) -> "Scene":
        """The trainer of the newest pod has ended so."""
        name = self.pods[-1]["metadata"]["name"]
        attempt = int(self.pods[-1]["metadata"]["labels"][labels.ATTEMPT])
        ended = {"exitCode": exit_code, "reason": reason, "message": message, "finishedAt": stamp(self.now)}
        pod = pod_manifest(self, "failed", attempt=attempt, name=name, terminated=ended, **options)
        return replace(self, pods=(*self.pods[:-1], pod))

    # --- what the runtime says ---

    def reporting(self, phase: str = "RUNNING", *, step: int = 0, total: int = 1000, **options: Any) -> "Scene":
        """One more report of the newest pod; options are report's."""
        last = self.reports[-1] if self.reports else None
        seq = last.seq if last is not None else self._observed_seq()
        attempt = options.pop("attempt", self.attempt)
        if last is not None and last.attempt != attempt:
            seq = 0
        seq = options.pop("seq", seq + 1 if seq else (1 << 32) + 1)
        pod = options.pop("pod", self.pods[-1]["metadata"]["name"] if self.pods else "")
        told = report(self, phase, seq=seq, attempt=attempt, pod=pod, step=step, total=total, **options)
        return replace(self, reports=(*self.reports, told))

    def acknowledging(
        self, stage: str = "DONE", *, saved_step: int | None = None, participant: str = "tolaria", **options: Any
    ) -> "Scene":
        """The trainer's answer to the last signal, or a sidecar's."""
        ack = EmergencyAck(
            version=1,
            signal_id=self.signal.signal_id if self.signal else "",
            run_uid=self.uid,
            participant=participant,
            stage=f"ACK_STAGE_{stage}",
            clear=self.signal.clear if self.signal else False,
        )
        if saved_step is not None:
            ack.saved_step = saved_step
        return self.reporting(options.pop("phase", "HALTING"), ack=ack, **options)

    @property
    def attempt(self) -> int:
        numbers = [int(job["metadata"]["labels"][labels.ATTEMPT]) for job in self.jobs]
        return max([int(self.status.get("attempt", 0)), *numbers])

    def _observed_seq(self) -> int:
        observed = self.status.get("observedReport") or {}
        return int(observed.get("seq", 0)) if observed.get("attempt") == self.attempt else 0

    # --- looking ---

    def raw(self) -> dict[str, Any]:
        """The EsperTrainingRun as the API server gives it."""
        metadata: dict[str, Any] = {
            "name": self.name,
            "namespace": self.namespace,
            "uid": self.uid,
            "generation": self.generation,
            "resourceVersion": "1",
            "creationTimestamp": stamp(START),
            "labels": dict(self.labels),
        }
        if self.deleting:
            metadata["deletionTimestamp"] = stamp(self.now)
        body = {"apiVersion": labels.API_VERSION, "kind": labels.KIND, "metadata": metadata}
        return {**body, "spec": dict(self.spec), "status": dict(self.status)}

    def seen(self) -> Observation:
        run = observe.run(self.raw(), self.settings)
        jobs = [job for raw in self.jobs if (job := observe.job(raw)) is not None]
        pods = [pod for raw in self.pods if (pod := observe.pod(raw)) is not None]
        own_jobs, own_pods = observe.children_of(run, jobs, pods)
        return Observation(
            run=run,
            now=self.now,
            settings=self.settings,
            jobs=own_jobs,
            pods=own_pods,
            claim=self.claim,
            secrets=self.secrets,
            reports=self.reports,
            report_age_s=self.report_age_s,
            report_cursor=self.report_cursor,
            broadcasts=self.broadcasts,
            signal=self.signal,
            claim_user=self.claim_user,
            resume=self.resume,
        )

    def plan(self) -> Plan:
        return decide(self.seen())

    def change(self, applied: Applied | None = None) -> StatusChange:
        """What one reconcile would write."""
        seen = self.seen()
        return next_status(seen, decide(seen), applied)

    def reconciled(self, applied: Applied | None = None) -> "Scene":
        """After one reconcile: its status written, its Job created, its signal sent, its deletions asked for."""
        seen = self.seen()
        plan = decide(seen)
        scene = self
        if plan.signal is not None and applied is None:
            order = plan.signal
            seq = (self.signal.seq if self.signal else 0) + 1
            scene = scene.signalled(order.mode, attempt=order.attempt, clear=order.clear, seq=seq)
            applied = Applied(signal=scene.signal)
        for deletion in plan.deletions:
            marked = [j for j in scene.jobs if j["metadata"]["uid"] == deletion.uid]
            for job in marked:
                attempt = int(job["metadata"]["labels"][labels.ATTEMPT])
                scene = scene.with_job(attempt, deleting=True)
        change = next_status(seen, plan, applied)
        if plan.job is not None and not (applied and applied.refused) and plan.attempt is not None:
            scene = scene.with_job(plan.attempt)
        return replace(scene, status=change.status.to_dict(), reports=())


# --- raw objects ---------------------------------------------------------------------------------------------


def _owner(kind: str, name: str, uid: str) -> list[dict[str, Any]]:
    return [{"kind": kind, "name": name, "uid": uid, "controller": True}]


def job_uid(scene: Scene, attempt: int) -> str:
    return f"job-{scene.uid[-4:]}-{attempt}"


def job_manifest(
    scene: Scene,
    attempt: int,
    *,
    deleting: bool = False,
    suspended: bool = False,
    complete: bool = False,
    failed: str = "",
) -> dict[str, Any]:
    name = labels.job_name(scene.name, attempt)
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": scene.namespace,
        "uid": job_uid(scene, attempt),
        "creationTimestamp": stamp(scene.now),
        "labels": {labels.RUN: scene.name, labels.RUN_UID: scene.uid, labels.ATTEMPT: str(attempt)},
        "ownerReferences": _owner(labels.KIND, scene.name, scene.uid),
    }
    if deleting:
        metadata["deletionTimestamp"] = stamp(scene.now)
    conditions = [{"type": "Complete", "status": "True"}] if complete else []
    conditions += [{"type": "Failed", "status": "True", "reason": failed}] if failed else []
    return {"metadata": metadata, "spec": {"suspend": suspended}, "status": {"conditions": conditions}}


def pod_manifest(
    scene: Scene,
    state: str,
    *,
    attempt: int | None = None,
    rank: int = 0,
    name: str = "",
    number: int = 0,
    terminated: Mapping[str, Any] | None = None,
    waiting: tuple[str, str] | None = None,
    unschedulable: str = "",
    deleting: bool = False,
    disrupted: bool = False,
    node_lost: bool = False,
    config_hash: str = "",
    sidecar_down: str = "",
) -> dict[str, Any]:
    """`waiting` is (container, reason). `number` tells pods of one rank apart."""
    at = scene.attempt if attempt is None else attempt
    job = labels.job_name(scene.name, at)
    named = name or f"{job}-{rank}-{'abcdefghij'[number % 10]}{number:04d}"
    training, placed = state == "training", state in ("training", "placed", "failed")
    conditions = [{"type": "Ready", "status": "True" if training and not node_lost else "False"}]
    conditions += [{"type": "ContainersReady", "status": "True" if training else "False"}]
    if unschedulable:
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unschedulable}
        conditions.append(scheduled)
    if disrupted:
        conditions.append({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"})
    metadata: dict[str, Any] = {
        "name": named,
        "namespace": scene.namespace,
        "uid": f"uid-{named}",
        "creationTimestamp": stamp(scene.now),
        "labels": {
            labels.RUN: scene.name,
            labels.RUN_UID: scene.uid,
            labels.ATTEMPT: str(at),
            labels.COMPLETION_INDEX: str(rank),
        },
        "annotations": {labels.CONFIG_HASH: config_hash} if config_hash else {},
        "ownerReferences": _owner("Job", job, job_uid(scene, at)),
    }
    if deleting:
        metadata["deletionTimestamp"] = stamp(scene.now)
    status: dict[str, Any] = {
        "phase": {"training": "Running", "failed": "Failed"}.get(state, "Pending"),
        "conditions": conditions,
        **_containers(state, terminated, waiting, sidecar_down),
    }
    if terminated is not None and terminated.get("exitCode") == 0:
        status["phase"] = "Succeeded"
    if placed:
        status["startTime"] = stamp(scene.now)
    return {"metadata": metadata, "spec": {"nodeName": "node-1"} if placed else {}, "status": status}


def _containers(
    state: str, terminated: Mapping[str, Any] | None, waiting: tuple[str, str] | None, sidecar_down: str
) -> dict[str, Any]:
    if state == "pending":
        return {}

    def one(name: str) -> dict[str, Any]:
        if waiting is not None and waiting[0] == name:
            return {"name": name, "ready": False, "state": {"waiting": {"reason": waiting[1], "message": "no"}}}
        if name == sidecar_down:
            return {"name": name, "ready": False, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
        if name == labels.TOLARIA and terminated is not None:
            return {"name": name, "ready": False, "state": {"terminated": dict(terminated)}}
        if state == "training":
            return {"name": name, "ready": True, "started": True, "state": {"running": {"startedAt": stamp(START)}}}
        return {"name": name, "ready": False, "state": {"waiting": {"reason": "PodInitializing"}}}

    sidecars = [one(name) for name in labels.SIDECARS]
    return {"initContainerStatuses": sidecars, "containerStatuses": [one(labels.TOLARIA)]}


def report(
    scene: Scene,
    phase: str,
    *,
    seq: int,
    attempt: int,
    pod: str,
    step: int,
    total: int,
    moved: tuple[str, str] | None = None,
    reason: str = "",
    counters: Mapping[str, int] | None = None,
    checkpoint: int | None = None,
    **event: Any,
) -> RunReport:
    """`moved` is a transition (from, to); `checkpoint` the newest verified step; `event` any field of RunReport."""
    told = RunReport(
        version=1,
        run_uid=scene.uid,
        run=f"{scene.namespace}/{scene.name}",
        attempt=attempt,
        seq=seq,
        pod_name=pod,
        phase=runtime_phase(phase),
        progress=Progress(epoch=step // 100, step=step, total_steps=total, loss=1 / (1 + step)),
        counters=Counters(**(counters or {})),
        **event,
    )
    told.time.FromDatetime(scene.now)
    if checkpoint is not None:
        state = CheckpointState(latest_step=checkpoint, latest_verified_step=checkpoint, count=1)
        told.checkpoint.CopyFrom(state)
    if moved is not None:
        transition = Transition(
            from_phase=runtime_phase(moved[0]), to_phase=runtime_phase(moved[1]), reason=reason, step=step
        )
        transition.time.FromDatetime(scene.now)
        told.transition.CopyFrom(transition)
    return told
