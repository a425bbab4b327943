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
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from esper_leyline import labels
from esper_leyline.oona import Entry, Outcome, Status
from esper_leyline.v1 import emergency_pb2
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.emergency_pb2 import EmergencySignal
from esper_leyline.v1.report_pb2 import RunReport
from esper_operator.assembly import Leadership, Operator, assemble
from esper_operator.kube.api import CONFIG_MAPS, JOBS, PODS, RUNS, Object, WatchEvent
from esper_operator.kube.errors import KubeError
from esper_operator.model import RunKey, Settings
from esper_operator.testing.fakeapi import FakeApi
from esper_operator.worker import Clock

from tests.support.simulatedtrainer import Trainer, Training

SEED = bytes(range(32))
NAMESPACE = "default"
TICK_S = 0.1
WATCH_RETRY_S = 1.0
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


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
        self.sent: list[EmergencySignal] = []
        """By Redis."""
        self.bus_up = True
        self.start_pods = True
        """False: no node takes them."""
        self.saved_by_halt: int | None = None
        """By the trainer's own last word."""
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

    def trainings(self) -> list[Training]:
        return list(self._trainings.values())

    def signals_sent(self, name: str) -> list[tuple[str, int, bool]]:
        """Different signals by Redis and ConfigMap together: (mode, attempt, clear) in order, each id once."""
        seen: dict[tuple[str, bool], tuple[str, int, bool]] = {}
        for signal in self.sent:
            mode = emergency_pb2.EmergencyMode.Name(signal.mode).removeprefix("EMERGENCY_MODE_")
            seen.setdefault((signal.signal_id, signal.clear), (mode, signal.attempt, signal.clear))
        return list(seen.values())

    def crash(self, pod_name: str, code: int) -> None:
        """The trainer dies; the kubelet says so a little later."""
        uid = self.api.find(PODS, NAMESPACE, pod_name)["metadata"]["uid"]
        self._trainers[uid].cancel()
        self.kill_container(pod_name, code)

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

    async def publish(self, envelopes: Mapping[str, BusEnvelope]) -> dict[str, Outcome]:
        if not self.bus_up:
            return dict.fromkeys(envelopes, Outcome(status=Status.UNAVAILABLE, detail="down"))
        self.sent += [EmergencySignal.FromString(envelope.payload) for envelope in envelopes.values()]
        return dict.fromkeys(envelopes, Outcome(status=Status.PUBLISHED))

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
        if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in metadata and self.start_pods:
            self._edit(PODS, metadata["name"], _running)
            life = Trainer(self, pod, key_seed=SEED).run()
            self._trainers[metadata["uid"]] = asyncio.create_task(life, name=metadata["name"])
        elif "deletionTimestamp" in metadata:
            if trainer is not None and not trainer.done():
                trainer.cancel()
            self.api.remove(PODS, metadata["namespace"], metadata["name"])
        elif trainer is not None and trainer.done() and not trainer.cancelled():
            trainer.result()

    def _edit(self, resource: Any, name: str, change: Callable[[Object], Any]) -> None:
        self.api.edit(resource, NAMESPACE, name, change)

    async def end_container(self, pod: str, code: int, message: str) -> None:
        if code == 75:
            self.saved_by_halt = json.loads(message)["savedStep"]
        self.kill_container(pod, code, message)

    def kill_container(self, pod_name: str, code: int, message: str = "") -> None:
        """The kubelet's word that the trainer's container has ended."""

        def change(raw: Object) -> None:
            raw["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
            state = {"exitCode": code, "finishedAt": self.now().strftime("%Y-%m-%dT%H:%M:%SZ"), "message": message}
            raw["status"]["containerStatuses"][0].update(ready=False, state={"terminated": state})
            raw["status"]["conditions"] = [{"type": "Ready", "status": "False"}]

        self._edit(PODS, pod_name, change)

    def signal(self, pod: str) -> EmergencySignal | None:
        """The newest, by Redis or as the kubelet mounts it, at once."""
        found = self.api.find(CONFIG_MAPS, NAMESPACE, labels.emergency_config_map_name(pod.rsplit("-a", 1)[0]))
        text = ((found or {}).get("data") or {}).get("signal")
        uid = self.api.find(PODS, NAMESPACE, pod)["metadata"]["labels"][labels.RUN_UID]
        arrived = [signal for signal in self.sent if signal.run_uid == uid]
        if text:
            arrived.append(EmergencySignal.FromString(BusEnvelope.FromString(base64.b64decode(text)).payload))
        return max(arrived, key=lambda signal: (signal.term, signal.seq), default=None)

    def send(self, _pod: str, _report: RunReport, envelope: BusEnvelope) -> None:
        self.log.append(envelope.SerializeToString())
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    def training_of(self, uid: str) -> Training:
        return self._trainings.setdefault(uid, Training())


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
        """Kopf's part: every event of every run; it lists anew when a stream ends, and never tells of what vanished."""
        while not self.operator.loaded.is_set():
            try:
                await self.operator.fill()
            except KubeError:
                await asyncio.sleep(WATCH_RETRY_S)
        while True:
            try:
                page = await api.list(RUNS, namespace=None)
                for item in page.items:
                    self.operator.runs.put(item)
                async for event in api.watch(RUNS, namespace=None, resource_version=page.resource_version):
                    self._take(event)
            except KubeError:
                pass
            await asyncio.sleep(WATCH_RETRY_S)

    def _take(self, event: WatchEvent) -> None:
        metadata = event.object["metadata"]
        if event.type == "DELETED":
            self.operator.runs.drop(RunKey(metadata["namespace"], metadata["name"]), metadata["uid"])
        else:
            self.operator.runs.put(event.object)

    async def _work(self) -> None:
        await self.operator.wait_warm()
        await self.operator.lead()

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
