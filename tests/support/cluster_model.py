"""A model of cluster and runtime, small enough to be driven by Hypothesis and honest enough to fool the pure core.

API server, Job controller, kubelet, runtime and report bus, each with only what the operator can notice. The operator
works on caches that lag behind, may be killed between any two effects, and writes with optimistic concurrency.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from esper_leyline import labels
from esper_leyline.exitcodes import ExitCode
from esper_leyline.phases import EmergencyStop
from esper_leyline.v1.emergency_pb2 import AckStage, EmergencyAck
from esper_leyline.v1.report_pb2 import Counters, Failure, Progress, Recovery, RunReport, Transition
from esper_operator import observe
from esper_operator.decide import decide
from esper_operator.model import Applied, Observation, Plan, SignalOrder, SignalRecord
from esper_operator.status import next_status
from esper_operator.testing.builders import SETTINGS, SPEC, UID, a_run, job_manifest, pod_manifest, runtime_phase, stamp
from esper_operator.testing.clock import START

TOTAL = 40
"""Steps of the whole training."""


class OperatorKilled(Exception):
    """At a point that the test chose."""


@dataclass
class SimPod:
    name: str
    attempt: int
    number: int
    state: str = "pending"
    incarnation: int = 0
    phase: str = "STARTING"
    """Of the runtime, by its own word."""
    deleting: bool = False
    disrupted: bool = False
    exit_code: int | None = None
    created: datetime = START
    seq: int = 0
    event_seq: int = 0
    """Of its newest report with an event."""

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    @property
    def trains(self) -> bool:
        return self.state == "training" and self.alive


@dataclass
class SimJob:
    attempt: int
    deleting: bool = False
    failed: bool = False
    complete: bool = False
    created: datetime = START


@dataclass
class Cache:
    """What the operator last heard of the API server."""

    run: dict[str, Any]
    jobs: tuple[dict[str, Any], ...]
    pods: tuple[dict[str, Any], ...]
    signal: SignalRecord | None


@dataclass
class Cluster:
    spec: dict[str, Any] = field(default_factory=lambda: dict(SPEC))
    status: dict[str, Any] = field(default_factory=dict)
    generation: int = 1
    version: int = 1
    now: datetime = START
    jobs: dict[int, SimJob] = field(default_factory=dict)
    pods: list[SimPod] = field(default_factory=list)
    signal: SignalRecord | None = None
    bus: list[RunReport] = field(default_factory=list)
    """Reports that the operator has been given and has not acknowledged by observedReport."""
    cursor: tuple[int, int] | None = None
    step: int = 0
    saved: int = 0
    boots: dict[int, int] = field(default_factory=dict)
    rollbacks: int = 0
    in_place: int = 0
    lost_reports: int = 0
    events: list[str] = field(default_factory=list)
    writes: int = 0
    attempts_made: list[int] = field(default_factory=list)
    heard: datetime | None = None

    # --- API server ---

    def raw_run(self) -> dict[str, Any]:
        raw = replace(a_run(), spec=self.spec, status=self.status, generation=self.generation).raw()
        raw["metadata"]["resourceVersion"] = str(self.version)
        return raw

    def cache(self) -> Cache:
        scene = replace(a_run(), now=self.now)
        jobs = []
        for job in self.jobs.values():
            failed = "PodFailurePolicy" if job.failed else ""
            at = replace(scene, now=job.created)
            raw = job_manifest(at, job.attempt, deleting=job.deleting, complete=job.complete, failed=failed)
            jobs.append(raw)
        pods = tuple(self._raw_pod(pod) for pod in self.pods)
        return Cache(self.raw_run(), tuple(jobs), pods, self.signal)

    def _raw_pod(self, pod: SimPod) -> dict[str, Any]:
        scene = replace(a_run(), now=pod.created)
        ended = None
        if pod.exit_code is not None:
            ended = {"exitCode": pod.exit_code, "reason": "Error", "finishedAt": stamp(self.now)}
        return pod_manifest(
            scene,
            "failed" if ended else pod.state,
            attempt=pod.attempt,
            name=pod.name,
            terminated=ended,
            deleting=pod.deleting,
            disrupted=pod.disrupted,
        )

    def edit(self, **spec: Any) -> None:
        self.spec = {**self.spec, **spec}
        self.generation += 1
        self.version += 1

    def write_status(self, status: dict[str, Any], version: str) -> bool:
        """False is a 409."""
        if version != str(self.version):
            return False
        if status != self.status:
            self.status = status
            self.version += 1
            self.writes += 1
        return True

    # --- Job controller and garbage collector ---

    def controllers(self) -> None:
        for job in list(self.jobs.values()):
            own = [pod for pod in self.pods if pod.attempt == job.attempt]
            living = [pod for pod in own if pod.alive]
            if job.deleting:
                for pod in own:
                    pod.deleting = True
                self.pods = [p for p in self.pods if p.attempt != job.attempt or (p.alive and p.state != "pending")]
                if not any(pod.attempt == job.attempt for pod in self.pods):
                    del self.jobs[job.attempt]
            elif not job.failed and not job.complete and not living:
                self._after_pods(job, own)
        self.pods = [p for p in self.pods if not (p.deleting and (not p.alive or p.state == "pending"))]

    def _after_pods(self, job: SimJob, own: list[SimPod]) -> None:
        last = own[-1] if own else None
        replaceable = last is None or last.exit_code == ExitCode.DRAINED or last.disrupted
        if last is not None and last.exit_code == 0:
            job.complete = True
        elif replaceable:
            number = len([1 for p in self.pods if p.attempt == job.attempt]) + self.boots.get(job.attempt, 0)
            name = f"digits-a{job.attempt}-0-p{number:04d}"
            self.pods.append(SimPod(name=name, attempt=job.attempt, number=number, created=self.now))
        else:
            job.failed = True

    # --- kubelet and runtime ---

    def kubelet(self) -> None:
        for pod in self.pods:
            if pod.deleting and pod.alive and pod.state == "training":
                self.end(pod, ExitCode.DRAINED)
            elif pod.deleting and pod.alive:
                pod.exit_code = ExitCode.DRAINED
            elif pod.state == "pending" and pod.alive:
                pod.state = "placed"
            elif pod.state == "placed" and pod.alive:
                self._boot(pod)

    def _boot(self, pod: SimPod) -> None:
        pod.state = "training"
        self.boots[pod.attempt] = pod.incarnation = self.boots.get(pod.attempt, 0) + 1
        self.step = self.saved
        self.obey(pod)

    def train(self, steps: int = 5) -> None:
        """Every living trainer makes progress, or obeys what it has been told."""
        for pod in [p for p in self.pods if p.trains]:
            self.obey(pod)
            if not pod.trains or pod.phase in ("FROZEN", "HALTING"):
                continue
            if pod.phase in ("STARTING", "RESTARTING"):
                self.move(pod, "RUNNING", "Training")
            for _ in range(steps):
                self.step += 1
                self.report(pod)
                if self.step % 10 == 0:
                    self.saved = self.step
                if self.step >= TOTAL:
                    self.report(pod)
                    self.end(pod, ExitCode.COMPLETE)
                    return

    def obey(self, pod: SimPod) -> None:
        signal = self.signal
        if signal is None or signal.attempt != pod.attempt:
            return
        if signal.clear:
            if pod.phase == "FROZEN":
                self.move(pod, "RUNNING", "Resumed")
        elif signal.mode is EmergencyStop.FREEZE:
            if pod.phase != "FROZEN":
                self.move(pod, "FROZEN", "EmergencyStop")
                self._ack(pod, signal)
        else:
            if signal.mode is EmergencyStop.CHECKPOINT:
                self.saved = self.step
            self.move(pod, "HALTED", "EmergencyStop")
            self._ack(pod, signal)
            self.end(pod, ExitCode.HALTED)

    def _ack(self, pod: SimPod, signal: SignalRecord) -> None:
        stage = AckStage.ACK_STAGE_DONE
        ack = EmergencyAck(version=1, signal_id=signal.signal_id, participant="tolaria", stage=stage)
        ack.saved_step = self.saved
        self.report(pod, ack=ack)

    def rollback(self, pod: SimPod) -> None:
        self.move(pod, "ROLLING_BACK", "NonFiniteLoss")
        self.rollbacks += 1
        self.report(pod, recovery=Recovery(kind="RECOVERY_KIND_IN_PROCESS", cause="NonFiniteLoss"))
        self.move(pod, "RUNNING", "NonFiniteLoss")

    def kill_trainer(self, pod: SimPod) -> None:
        """L1: the supervisor brings it back in the same pod."""
        self.report(pod, failure=Failure(reason="TrainerKilled", exit_code=137, container="tolaria"))
        self.move(pod, "RESTARTING", "TrainerKilled")
        self.in_place += 1
        self.report(pod, recovery=Recovery(kind="RECOVERY_KIND_IN_PLACE", cause="TrainerKilled"))
        self.move(pod, "RUNNING", "TrainerKilled")

    def end(self, pod: SimPod, exit_code: int) -> None:
        pod.exit_code = int(exit_code)

    def move(self, pod: SimPod, to: str, reason: str) -> None:
        moved = Transition(from_phase=runtime_phase(pod.phase), to_phase=runtime_phase(to), reason=reason)
        moved.time.FromDatetime(self.now)
        pod.phase = to
        self.report(pod, transition=moved)

    def report(self, pod: SimPod, **event: Any) -> None:
        pod.seq += 1
        told = RunReport(
            version=1,
            run_uid=UID,
            attempt=pod.attempt,
            seq=(pod.incarnation << 32) + pod.seq,
            pod_name=pod.name,
            phase=runtime_phase(pod.phase),
            progress=Progress(epoch=self.step // 10, step=self.step, total_steps=TOTAL),
            counters=Counters(rollbacks=self.rollbacks, in_place_restarts=self.in_place),
            previous_event_seq=pod.event_seq,
            **event,
        )
        if event:
            pod.event_seq = told.seq
        told.time.FromDatetime(self.now)
        if self.saved:
            told.checkpoint.latest_step = told.checkpoint.latest_verified_step = self.saved
        self.heard = self.now
        if self.lost_reports > 0:
            self.lost_reports -= 1
        else:
            self.bus.append(told)


class SimOperator:
    """observe, decide, apply, status: the worker's order of effects, with a kill switch after each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.cached = cluster.cache()
        self.plans: list[Plan] = []

    def hear(self) -> None:
        """The watches catch up."""
        self.cached = self.cluster.cache()

    def look(self) -> Observation:
        cluster, cached = self.cluster, self.cached
        run = observe.run(cached.run, SETTINGS)
        jobs = [job for raw in cached.jobs if (job := observe.job(raw)) is not None]
        pods = [pod for raw in cached.pods if (pod := observe.pod(raw)) is not None]
        own_jobs, own_pods = observe.children_of(run, jobs, pods)
        observed = run.status.observed_report
        done = max((observed.attempt, observed.seq) if observed else (0, 0), cluster.cursor or (0, 0))
        reports = sorted((r for r in cluster.bus if (r.attempt, r.seq) > done), key=lambda r: (r.attempt, r.seq))
        age = (cluster.now - cluster.heard).total_seconds() if cluster.heard else None
        return Observation(
            run=run,
            now=cluster.now,
            settings=SETTINGS,
            jobs=own_jobs,
            pods=own_pods,
            reports=tuple(reports),
            report_age_s=age,
            report_cursor=cluster.cursor,
            signal=cached.signal,
        )

    def reconcile(self, *, killed_after: str = "") -> Plan:
        """Raises OperatorKilled after the effect of that name: signal, deletions, job."""
        seen = self.look()
        plan = decide(seen)
        self.plans.append(plan)
        record = self._send(plan.signal) if plan.signal is not None else None
        self._killed("signal", killed_after)
        for deletion in plan.deletions:
            self._delete(deletion.uid)
        self._killed("deletions", killed_after)
        if plan.job is not None and plan.attempt is not None:
            self._create(plan.attempt)
        self._killed("job", killed_after)
        change = next_status(seen, plan, Applied(signal=record))
        if not change.changed:
            if change.folded is not None:
                self.cluster.cursor = max(change.folded, self.cluster.cursor or (0, 0))
        elif self.cluster.write_status(change.status.to_dict(), self.cached.run["metadata"]["resourceVersion"]):
            self.cluster.events += [str(event.reason) for event in change.events]
            self.cached.run = self.cluster.raw_run()  # the answer to the write
        return plan

    def _killed(self, at: str, chosen: str) -> None:
        if at == chosen:
            raise OperatorKilled

    def _send(self, order: SignalOrder) -> SignalRecord:
        """Written with the resourceVersion of what was read, so seq is that of the object itself."""
        last = self.cluster.signal
        seq = (last.seq if last else 0) + 1
        sent = SignalRecord(
            term=1,
            seq=seq,
            signal_id=order.signal_id or f"{seq:032x}",
            mode=order.mode,
            source=order.source,
            attempt=order.attempt,
            clear=order.clear,
        )
        self.cluster.signal = self.cached.signal = sent
        return sent

    def _delete(self, uid: str) -> None:
        for job in self.cluster.jobs.values():
            if uid == f"job-{UID[-4:]}-{job.attempt}":
                job.deleting = True

    def _create(self, attempt: int) -> None:
        if attempt not in self.cluster.jobs:  # else AlreadyExists
            self.cluster.jobs[attempt] = SimJob(attempt, created=self.cluster.now)
            self.cluster.attempts_made.append(attempt)

    def settle(self, limit: int = 60) -> int:
        """Reconciles until nothing changes any more at this moment."""
        for count in range(limit):
            self.hear()
            before = (self.cluster.version, self.cluster.signal, len(self.cluster.jobs))
            marked = [job.deleting for job in self.cluster.jobs.values()]
            self.reconcile()
            self.hear()
            after = (self.cluster.version, self.cluster.signal, len(self.cluster.jobs))
            if before == after and marked == [job.deleting for job in self.cluster.jobs.values()]:
                return count
        raise AssertionError(f"still changing after {limit} reconciles: {self.plans[-3:]}")


def live_attempts(cluster: Cluster) -> set[int]:
    """Attempts that have a pod which is not dead."""
    return {pod.attempt for pod in cluster.pods if pod.alive}


def later(cluster: Cluster, seconds: float) -> None:
    cluster.now += timedelta(seconds=seconds)


__all__ = ["TOTAL", "Cluster", "OperatorKilled", "SimOperator", "SimPod", "labels", "later", "live_attempts"]
