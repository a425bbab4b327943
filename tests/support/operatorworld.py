"""A cluster in memory around the operator: Job controller, kubelet, trainer and weatherlight, all in virtual time.

    world = World()
    world.create_run("digits", nan_at=5)
    async with world.operator() as operator: ...
    await world.until(lambda: world.phase("digits") == "Succeeded")

The trainer makes a step a second; its life does not depend on any operator. Reports are sealed like weatherlight's and
kept like Redis keeps them, so that an operator which starts reads them from the beginning.
"""

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from esper_leyline import labels
from esper_leyline.oona import Entry, Outcome, Status
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1 import emergency_pb2, report_pb2
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.emergency_pb2 import AckStage, EmergencyAck, EmergencyMode, EmergencySignal
from esper_leyline.v1.report_pb2 import RunReport, RuntimePhase
from esper_operator.assembly import Leadership, Operator, assemble
from esper_operator.kube.api import CONFIG_MAPS, JOBS, PODS, RUNS, Object
from esper_operator.model import RunKey, Settings
from esper_operator.testing.fakeapi import FakeApi
from esper_operator.worker import Clock

SEED = bytes(range(32))
NAMESPACE = "default"
TICK_S = 0.1
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING, ROLLING, RESTARTING = (
    RuntimePhase.RUNTIME_PHASE_RUNNING,
    RuntimePhase.RUNTIME_PHASE_ROLLING_BACK,
    RuntimePhase.RUNTIME_PHASE_RESTARTING,
)


def run_manifest(name: str, **spec: Any) -> Object:
    return {
        "apiVersion": labels.API_VERSION,
        "kind": labels.KIND,
        "metadata": {"namespace": NAMESPACE, "name": name, "labels": {"team": "a"}},
        "spec": {
            "runtime": {"entrypoint": "esper_runtime.workloads.digits:build"},
            "checkpoint": {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 5},
            **spec,
        },
    }


@dataclass
class Training:
    """What survives on the volume: the run's steps and its counters."""

    total_steps: int = 20
    nan_at: int | None = None
    saved_step: int = 0
    rollbacks: int = 0
    incarnations: dict[int, int] = field(default_factory=dict)
    fired: bool = False


class World:
    """Owns the FakeApi and everything that is not the operator."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._zero = loop.time()
        self.api = FakeApi(now=self.now, graceful_pods=True)
        self.settings = Settings(
            runtime_image="runtime", sidecar_image="sidecar", key_seed=SEED, bus_url="redis://bus:6379"
        )
        self.log: list[bytes] = []
        self.published: list[tuple[str, BusEnvelope]] = []
        self.bus_up = True
        self._grown = asyncio.Event()
        self._trainings: dict[str, Training] = {}
        self._trainers: dict[str, asyncio.Task[None]] = {}
        self._pod_numbers = itertools.count(1)
        self._controllers = asyncio.create_task(self._act(), name="world")

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=asyncio.get_running_loop().time() - self._zero)

    async def close(self) -> None:
        tasks = [self._controllers, *self._trainers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what tests do and see ---

    def create_run(self, name: str, *, steps: int = 20, nan_at: int | None = None, **spec: Any) -> None:
        raw = self.api.add(run_manifest(name, **spec))
        self._trainings[raw["metadata"]["uid"]] = Training(total_steps=steps, nan_at=nan_at)

    def set_spec(self, name: str, **fields: Any) -> None:
        self.api.edit(RUNS, NAMESPACE, name, lambda raw: raw["spec"].update(fields))

    def status(self, name: str) -> Object:
        found = self.api.find(RUNS, NAMESPACE, name)
        return (found or {}).get("status", {})

    def phase(self, name: str) -> str:
        return str(self.status(name).get("phase", ""))

    def condition(self, name: str, kind: str) -> str:
        conditions = self.status(name).get("conditions", [])
        return next((f"{c['status']}/{c['reason']}" for c in conditions if c["type"] == kind), "")

    def pods(self, name: str) -> list[Object]:
        return [pod for pod in self.api.all(PODS) if pod["metadata"]["labels"][labels.RUN] == name]

    async def until(self, check: Callable[[], Any], limit_s: float = 120.0, what: str = "") -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while not check():
            if loop.time() > end:
                states = {raw["metadata"]["name"]: raw.get("status", {}) for raw in self.api.all(RUNS)}
                raise AssertionError(f"not within {limit_s} s: {what}\n{json.dumps(states, indent=1)}")
            await asyncio.sleep(0.05)

    # --- the operator ---

    @asynccontextmanager
    async def operator(self, api: Any = None, *, leadership: Leadership | None = None) -> AsyncIterator[Operator]:
        """An operator over this world, running; cancelled without a word at the end."""
        running = Running(self, api or self.api, leadership)
        try:
            yield running.operator
        finally:
            await running.cancel()

    async def publish(self, uid: str, envelope: BusEnvelope) -> Outcome:
        if not self.bus_up:
            return Outcome(status=Status.UNAVAILABLE, detail="down")
        self.published.append((uid, envelope))
        return Outcome(status=Status.PUBLISHED)

    async def entries(self) -> AsyncIterator[Entry]:
        position = 0
        while True:
            while position < len(self.log):
                position += 1
                yield Entry(f"{position}-0", self.log[position - 1])
            grown = self._grown
            await grown.wait()

    # --- controllers ---

    async def _act(self) -> None:
        while True:
            for job in self.api.all(JOBS):
                self._run_job(job)
            for pod in self.api.all(PODS):
                self._run_pod(pod)
            await asyncio.sleep(TICK_S)

    def _run_job(self, job: Object) -> None:
        metadata, status = job["metadata"], job.get("status", {})
        if "deletionTimestamp" in metadata or status.get("conditions"):
            return
        own = [p for p in self.api.all(PODS) if p["metadata"]["ownerReferences"][0]["uid"] == metadata["uid"]]
        ended = [p for p in own if p["status"]["phase"] in ("Succeeded", "Failed")]
        for pod in ended:
            code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            if code != 143:
                kind = "Complete" if code == 0 else "Failed"
                self._edit(JOBS, metadata["name"], lambda raw, k=kind: raw.setdefault("status", {}).update(
                    conditions=[{"type": k, "status": "True"}]))  # fmt: skip
                return
        if len(own) == len(ended):
            self._start_pod(job)

    def _start_pod(self, job: Object) -> None:
        metadata, template = job["metadata"], job["spec"]["template"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": metadata["namespace"],
                "name": f"{metadata['name']}-0-{next(self._pod_numbers):04d}",
                "labels": {**template["metadata"]["labels"], labels.COMPLETION_INDEX: "0"},
                "annotations": dict(template["metadata"].get("annotations", {})),
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                        "controller": True,
                        "blockOwnerDeletion": True,
                    }
                ],
            },
            "spec": {"nodeName": ""},
            "status": {"phase": "Pending"},
        }
        self.api.add(pod)

    def _run_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        trainer = self._trainers.get(metadata["uid"])
        if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in metadata:
            self._edit(PODS, metadata["name"], _running)
            self._trainers[metadata["uid"]] = asyncio.create_task(Trainer(self, pod).run(), name=metadata["name"])
        elif "deletionTimestamp" in metadata:
            if trainer is not None and not trainer.done():
                trainer.cancel()
            self.api.remove(PODS, metadata["namespace"], metadata["name"])
        elif trainer is not None and trainer.done():
            trainer.result()

    def _edit(self, resource: Any, name: str, change: Callable[[Object], Any]) -> None:
        self.api.edit(resource, NAMESPACE, name, change)

    def kill_container(self, pod_name: str, code: int, message: str = "") -> None:
        """The kubelet's word that the trainer's container has ended."""

        def change(raw: Object) -> None:
            raw["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
            state = {"exitCode": code, "finishedAt": self.now().strftime("%Y-%m-%dT%H:%M:%SZ"), "message": message}
            raw["status"]["containerStatuses"][0].update(ready=False, state={"terminated": state})
            raw["status"]["conditions"] = [{"type": "Ready", "status": "False"}]

        self._edit(PODS, pod_name, change)

    def send(self, envelope: BusEnvelope) -> None:
        self.log.append(envelope.SerializeToString())
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    def training_of(self, uid: str) -> Training:
        return self._trainings.setdefault(uid, Training())


class Trainer:
    """One pod's life: a step a second, reports, and obedience to `<run>-emergency`."""

    def __init__(self, world: World, pod: Object) -> None:
        marks = pod["metadata"]["labels"]
        self.world = world
        self.pod = pod["metadata"]["name"]
        self.run_name = marks[labels.RUN]
        self.uid = marks[labels.RUN_UID]
        self.attempt = int(marks[labels.ATTEMPT])
        self.key = SigningKey.derive(SEED, self.uid, Role.REPORT)
        self.training = world.training_of(self.uid)
        self.incarnation = self.training.incarnations.get(self.attempt, 0) + 1
        self.training.incarnations[self.attempt] = self.incarnation
        self.seq = self.incarnation << 32
        self.event_seq = 0
        self.step = self.training.saved_step
        self.phase = RuntimePhase.RUNTIME_PHASE_STARTING
        self.frozen = False
        self.last_signal = (0, 0)

    async def run(self) -> None:
        await asyncio.sleep(1)
        self.move(RUNNING, "Training")
        while self.step < self.training.total_steps:
            await asyncio.sleep(0.5)
            code = self.obey()
            if code is not None:
                self.world.kill_container(self.pod, code, self.last_word(code))
                return
            await asyncio.sleep(0.5)
            if not self.frozen:
                self.step += 1
                self.one_step()
            self.report()
        completion = report_pb2.Completion(export_path=f"{self.uid}/export", best_step=self.step)
        self.phase = RuntimePhase.RUNTIME_PHASE_SUCCEEDED
        self.report(completion=completion)
        self.world.kill_container(self.pod, 0)

    def one_step(self) -> None:
        training = self.training
        if training.nan_at == self.step and not training.fired:
            training.fired = True
            self.move(ROLLING, "NonFiniteLoss")
            training.rollbacks += 1
            recovery = report_pb2.Recovery(
                kind=report_pb2.RECOVERY_KIND_IN_PROCESS, cause="NonFiniteLoss", from_step=self.step,
                to_step=self.step - 1, detect_ms=1.0, recover_ms=20.0, verified=True,
            )  # fmt: skip
            self.step -= 1
            self.report(recovery=recovery)
            self.move(RUNNING, "RolledBack")
        elif self.step % 5 == 0:
            training.saved_step = self.step
            self.report(saved=report_pb2.CheckpointState(latest_step=self.step, latest_verified_step=self.step))

    def obey(self) -> int | None:
        """Follows a new signal; the exit code when it ends the trainer."""
        signal = self.signal()
        if signal is None or (signal.term, signal.seq) <= self.last_signal or signal.attempt != self.attempt:
            return None
        self.last_signal = (signal.term, signal.seq)
        if signal.clear:
            self.frozen = False
            self.move(RUNNING, "Resumed")
            self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
            return None
        self.acknowledge(signal, AckStage.ACK_STAGE_SEEN)
        if signal.mode == EmergencyMode.EMERGENCY_MODE_FREEZE:
            self.frozen = True
            self.move(RuntimePhase.RUNTIME_PHASE_FROZEN, "Frozen")
            self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
            return None
        self.move(RuntimePhase.RUNTIME_PHASE_HALTING, "EmergencyStop")
        if signal.mode == EmergencyMode.EMERGENCY_MODE_CHECKPOINT:
            self.training.saved_step = self.step
        self.acknowledge(signal, AckStage.ACK_STAGE_DONE)
        self.move(RuntimePhase.RUNTIME_PHASE_HALTED, "Halted")
        return 75

    def signal(self) -> EmergencySignal | None:
        """As weatherlight would have it: from the ConfigMap."""
        found = self.world.api.find(CONFIG_MAPS, NAMESPACE, labels.emergency_config_map_name(self.run_name))
        text = ((found or {}).get("data") or {}).get("signal")
        if not text:
            return None
        envelope = BusEnvelope.FromString(base64.b64decode(text))
        return EmergencySignal.FromString(envelope.payload)

    def last_word(self, code: int) -> str:
        return json.dumps({"reason": "Halted", "message": "", "exitCode": code, "savedStep": self.training.saved_step})

    def acknowledge(self, signal: EmergencySignal, stage: "emergency_pb2.AckStage") -> None:
        ack = EmergencyAck(
            version=1, signal_id=signal.signal_id, run_uid=self.uid, attempt=self.attempt, rank=0,
            participant="tolaria", stage=stage, step=self.step, clear=signal.clear,
        )  # fmt: skip
        if stage == AckStage.ACK_STAGE_DONE and signal.mode == EmergencyMode.EMERGENCY_MODE_CHECKPOINT:
            ack.saved_step = self.training.saved_step
        self.report(ack=ack)

    def move(self, to: RuntimePhase, reason: str) -> None:
        transition = report_pb2.Transition(from_phase=self.phase, to_phase=to, reason=reason, step=self.step)
        transition.time.FromDatetime(self.world.now())
        self.phase = to
        self.report(transition=transition)

    def report(self, **event: Any) -> None:
        self.seq += 1
        report = RunReport(
            version=1, run_uid=self.uid, run=f"{NAMESPACE}/{self.run_name}", attempt=self.attempt, rank=0,
            seq=self.seq, pod_name=self.pod, node_name="node-1", phase=self.phase,
            previous_event_seq=self.event_seq, **event,
        )  # fmt: skip
        report.time.FromDatetime(self.world.now())
        report.progress.MergeFrom(
            report_pb2.Progress(step=self.step, total_steps=self.training.total_steps, loss=1.0 / (1 + self.step))
        )
        report.counters.rollbacks = self.training.rollbacks
        report.checkpoint.latest_step = self.training.saved_step
        report.checkpoint.latest_verified_step = self.training.saved_step
        if event:
            self.event_seq = self.seq
        kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
        self.world.send(seal(report.SerializeToString(), kind, run_uid=self.uid, key=self.key))


class Running:
    """One operator's tasks."""

    def __init__(self, world: World, api: Any, leadership: Leadership | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.operator = assemble(
            api,
            settings=world.settings,
            own_namespace="esper-system",
            leadership=leadership,
            publish=world.publish,
            clock=Clock(now=world.now, monotonic=loop.time),
            workers=4,
        )
        self.tasks = [
            asyncio.create_task(coroutine, name=f"operator {n}")
            for n, coroutine in enumerate(
                (
                    *(informer.run() for informer in self.operator.informers),
                    self._watch_runs(api),
                    self._work(),
                    self.operator.events.run(),
                    self._read(world),
                    self.operator.resync(),
                )
            )
        ]

    async def _watch_runs(self, api: Any) -> None:
        """Kopf's part: every event of every run."""
        await self.operator.fill()
        page = await api.list(RUNS, namespace=None)
        for item in page.items:
            self.operator.runs.put(item)
        async for event in api.watch(RUNS, namespace=None, resource_version=page.resource_version):
            metadata = event.object["metadata"]
            if event.type == "DELETED":
                self.operator.runs.drop(RunKey(metadata["namespace"], metadata["name"]), metadata["uid"])
            else:
                self.operator.runs.put(event.object)

    async def _work(self) -> None:
        await self.operator.wait_warm()
        await self.operator.workers.run()

    async def _read(self, world: World) -> None:
        await self.operator.loaded.wait()
        await self.operator.intake.read(world.entries())

    async def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def _running(raw: Object) -> None:
    raw["spec"]["nodeName"] = "node-1"
    names = [*labels.SIDECARS]
    state = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "ready": True, "restartCount": 0}
    raw["status"] = {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "startTime": raw["metadata"]["creationTimestamp"],
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"}],
        "initContainerStatuses": [{"name": name, **state} for name in names],
        "containerStatuses": [{"name": labels.TOLARIA, **state}],
    }
