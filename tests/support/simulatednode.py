"""A node for a real API server without kubelets: pods run, their trainers report, signals arrive, containers end.

    async with SimulatedNode(plane, namespace, seed, redis_url) as node:
        node.plan("digits", steps=20, nan_at=5)

Reports go by Redis when there is one and are kept in a log that each pod serves at its own loopback address, as
weatherlight does. Signals arrive by Redis, and by ConfigMap once the pod's annotation was touched, as with a kubelet;
weatherlight's own gate judges them.
"""

import asyncio
import base64
import itertools
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from aiohttp import web
from esper_leyline import labels
from esper_leyline.oona import Oona, OonaConfig
from esper_leyline.ports import REPORTS_PATH, WEATHERLIGHT_HTTP
from esper_leyline.reasons import SignalRejection
from esper_leyline.signing import Role, SigningKey, Verifier
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.emergency_pb2 import EmergencySignal
from esper_leyline.v1.report_pb2 import ReportBatch, RunReport
from esper_operator.kube.api import CONFIG_MAPS, PODS, Object, Resource
from esper_operator.kube.client import RestApi
from esper_operator.kube.errors import KubeError, NotFound
from esper_operator.kube.informer import Informer
from esper_operator.model import RunKey
from esper_operator.queue import WorkQueue
from esper_runtime.weatherlight.signals import Accepted, Rejected, SignalGate

from tests.support.simulatedtrainer import Trainer, Training

NODE = "simulated"
HANDS = 16
"""Pods that are seen to at a time, as by the kubelets of many nodes."""
_addresses = (f"127.{os.getpid() % 250 + 2}.{n // 250 % 250}.{n % 250 + 2}" for n in itertools.count())
"""Each pod listens at an address of its own, other test processes at others."""


@dataclass
class _Pod:
    raw: Object
    ip: str
    trainer: Trainer
    gate: SignalGate
    task: asyncio.Task[None] | None = None
    log: list[tuple[int, bytes]] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: list[EmergencySignal] = field(default_factory=list)
    touched: str = ""
    ending: bool = False


class SimulatedNode:
    """Runs every pod of one namespace. `api` speaks to the server as its administrator."""

    def __init__(
        self,
        api: RestApi,
        namespace: str,
        *,
        seed: bytes,
        redis_url: str = "",
        step_s: float = 0.1,
        redis_timeout_s: float = 0.3,
        redis_block_s: float = 1.0,
        serve: bool = True,
    ) -> None:
        self.api = api
        self.namespace = namespace
        self.step_s = step_s
        self.redis_timeout_s, self.redis_block_s = redis_timeout_s, redis_block_s
        self.signals_seen: list[EmergencySignal] = []
        self.arrivals: dict[tuple[str, str], float] = {}
        """When a run's pods first had a signal by each leg, by the monotonic clock; for who measures to clear."""
        self._seed = seed
        self._redis_url = redis_url
        self._serve = serve
        self._oona: Oona | None = None
        self._plans: dict[str, dict[str, Any]] = {}
        self._trainings: dict[str, Training] = {}
        self._pods: dict[str, _Pod] = {}
        self._outbox: asyncio.Queue[BusEnvelope] = asyncio.Queue()
        self._of_run: dict[str, set[str]] = {}
        self._dirty: WorkQueue[tuple[RunKey, str]] = WorkQueue()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        if self._redis_url:
            config = OonaConfig(url=self._redis_url, timeout_s=self.redis_timeout_s, block_s=self.redis_block_s)
            self._oona = await self._stack.enter_async_context(Oona(config))
            self._spawn(self._publish())
        self.informer: Informer[Object] = Informer(
            self.api, PODS, project=lambda raw: raw, on_change=self._look, namespaces=(self.namespace,)
        )
        self._spawn(self.informer.run())
        for _ in range(HANDS):
            self._spawn(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self._stack.aclose()

    async def stop(self) -> None:
        """All that the node and its pods do."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- what tests do ---

    def plan(self, run: str, **training: Any) -> None:
        """How the run of that name will train: steps, nan_at."""
        self._plans[run] = training

    def pod_names(self, run: str) -> list[str]:
        return [n for n, p in self._pods.items() if p.trainer.run_name == run]

    def training(self, run: str) -> Training:
        return next(self._trainings[p.trainer.uid] for p in self._pods.values() if p.trainer.run_name == run)

    def steps_of(self, run: str, attempt: int) -> int:
        """Made by the newest pod of that attempt; 0 when there is none."""
        trainers = [p.trainer for p in self._pods.values() if (p.trainer.run_name, p.trainer.attempt) == (run, attempt)]
        return trainers[-1].steps if trainers else 0

    def signals_of(self, pod: str) -> list[EmergencySignal]:
        """Those that its weatherlight accepted, in order."""
        return self._pods[pod].accepted

    def assert_well(self) -> None:
        """Raises what has ended one of the node's own tasks: tests would otherwise wait in vain."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def crash(self, pod: str, code: int) -> None:
        """The trainer's container dies."""
        task = self._pods[pod].task
        assert task is not None
        task.cancel()
        await self.end_container(pod, code, "")

    # --- Host of the trainers ---

    def now(self) -> datetime:
        return datetime.now(UTC)

    def training_of(self, uid: str) -> Training:
        return self._trainings[uid]

    def send(self, pod: str, report: RunReport, envelope: BusEnvelope) -> None:
        known = self._pods[pod]
        known.log.append((report.seq, envelope.SerializeToString()))
        known.grown.set()
        known.grown = asyncio.Event()
        if self._oona is not None:
            self._outbox.put_nowait(envelope)

    def signal(self, pod: str) -> EmergencySignal | None:
        accepted = self._pods[pod].accepted
        return accepted[-1] if accepted else None

    async def end_container(self, pod: str, code: int, message: str) -> None:
        state = {
            "exitCode": code,
            "finishedAt": _stamp(self.now()),
            "message": message,
            "reason": "Error" if code else "Completed",
        }
        main = _container(labels.TOLARIA, {"terminated": state}, ready=False)
        body = {
            "status": {
                "phase": "Succeeded" if code == 0 else "Failed",
                "conditions": [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "False"}],
                "containerStatuses": [main],
            }
        }
        self._pods[pod].ending = True
        await self._patch_status(pod, body)

    # --- the kubelet ---

    def _look(self, run: RunKey | None) -> None:
        if run is not None:
            for name in {entry.name for entry in self.informer.of(run)} | self._of_run.get(run.name, set()):
                self._dirty.add((run, name))

    async def _work(self) -> None:
        while True:
            run, name = key = await self._dirty.get()
            raw = next((e.value for e in self.informer.of(run) if e.name == name), None)
            try:
                await self._sync(name, raw)
            except KubeError:
                self._dirty.retry(key)
            else:
                self._dirty.succeeded(key)
            finally:
                self._dirty.done(key)

    async def _sync(self, name: str, raw: Object | None) -> None:
        known = self._pods.get(name)
        if raw is None:
            self._vanish(known)
            return
        metadata = raw["metadata"]
        if "deletionTimestamp" in metadata:
            await self._terminate(name, metadata["uid"])
        elif known is None and raw["spec"].get("nodeName", NODE) == NODE:
            await self._take(name, raw)
        elif known is not None:
            touch = (metadata.get("annotations") or {}).get(labels.SIGNAL, "")
            if touch and touch != known.touched:
                mounted = await self._mounted(known.trainer.run_name)
                known.touched = touch
                if mounted is not None:
                    self._receive(known, mounted, "configmap")

    async def _take(self, name: str, raw: Object) -> None:
        """Begins anew after a request that failed, or whose answer was lost."""
        marks = raw["metadata"]["labels"]
        uid = marks[labels.RUN_UID]
        if "nodeName" not in raw["spec"]:
            await self._bind(name)
        mounted = await self._mounted(marks[labels.RUN])
        if uid not in self._trainings:
            self._trainings[uid] = Training(**self._plans.get(marks[labels.RUN], {}))
        trainer = Trainer(self, raw, key_seed=self._seed, step_s=self.step_s)
        operator = SigningKey.derive(self._seed, uid, Role.OPERATOR)
        verifier = Verifier.from_text(operator.public_text())
        gate = SignalGate(run_uid=uid, attempt=trainer.attempt, verifier=verifier)
        known = self._pods[name] = _Pod(raw, next(_addresses), trainer, gate)
        self._of_run.setdefault(trainer.run_name, set()).add(name)
        if mounted is not None:
            self._receive(known, mounted, "configmap")
        if self._serve:
            await self._serve_reports(known)
        if self._oona is not None:
            self._spawn(self._listen(known, uid))
        await self._patch_status(name, _running(known.ip, self.now()))
        known.task = self._spawn(trainer.run())

    async def _bind(self, name: str) -> None:
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"namespace": self.namespace, "name": name},
            "target": {"kind": "Node", "name": NODE},
        }
        await self.api.create(Resource("", "v1", f"pods/{name}/binding", "Binding"), binding)

    async def _terminate(self, name: str, uid: str) -> None:
        known = self._pods.get(name)
        if known is not None and not known.ending:
            if known.task is not None:
                known.task.cancel()
            known.trainer.drain()
            await self.end_container(name, 143, "")
        try:
            await self.api.delete(PODS, name, namespace=self.namespace, uid=uid, grace_seconds=0)
        except NotFound:
            return

    def _vanish(self, known: _Pod | None) -> None:
        """Deleted without grace: SIGKILL, and nobody is left to say so."""
        if known is not None and not known.ending:
            known.ending = True
            if known.task is not None:
                known.task.cancel()

    async def _mounted(self, run: str) -> BusEnvelope | None:
        found = await self.api.get(CONFIG_MAPS, labels.emergency_config_map_name(run), namespace=self.namespace)
        text = (found.get("data") or {}).get("signal")
        return BusEnvelope.FromString(base64.b64decode(text)) if text else None

    async def _patch_status(self, name: str, body: Object) -> None:
        """However long it takes: a kubelet does not forget what became of its containers."""
        path = Resource("", "v1", "pods", "Pod")
        while True:
            try:
                await self.api.patch(path, f"{name}/status", namespace=self.namespace, body=body)
            except NotFound:
                return
            except KubeError:
                await asyncio.sleep(0.2)
            else:
                return

    # --- weatherlight ---

    def _receive(self, known: _Pod, envelope: BusEnvelope, leg: str) -> None:
        self.arrivals.setdefault((known.trainer.run_name, leg), time.monotonic())
        match known.gate.judge(envelope.SerializeToString(), leg, time.monotonic_ns()):
            case Accepted():
                signal = EmergencySignal.FromString(envelope.payload)
                known.accepted.append(signal)
                known.trainer.nudged.set()
                self.signals_seen.append(signal)
            case Rejected(reason) if reason is not SignalRejection.WRONG_ATTEMPT and not known.ending:
                known.trainer.rejected(reason, leg)

    async def _listen(self, known: _Pod, uid: str) -> None:
        assert self._oona is not None
        async for entry in self._oona.signals(uid):
            envelope = entry.envelope()
            if envelope is not None:
                self._receive(known, envelope, "redis")

    async def _publish(self) -> None:
        assert self._oona is not None
        while True:
            await self._oona.publish_report(await self._outbox.get())

    async def _serve_reports(self, known: _Pod) -> None:
        async def reports(request: web.Request) -> web.Response:
            after, wait = int(request.query.get("after", 0)), float(request.query.get("wait", 0))
            if not any(seq > after for seq, _ in known.log):
                try:
                    async with asyncio.timeout(wait):
                        await known.grown.wait()
                except TimeoutError:
                    pass
            kept = [(seq, raw) for seq, raw in known.log if seq > after]
            batch = ReportBatch(envelopes=[raw for _, raw in kept], last_seq=kept[-1][0] if kept else after)
            return web.Response(body=batch.SerializeToString(), content_type="application/x-protobuf")

        app = web.Application()
        app.add_routes([web.get(REPORTS_PATH, reports)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, known.ip, WEATHERLIGHT_HTTP).start()

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.append(task)
        return task


def _running(ip: str, now: datetime) -> Object:
    state = {"running": {"startedAt": _stamp(now)}}
    return {
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "startTime": _stamp(now),
            "conditions": [
                {"type": kind, "status": "True"} for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
            ],
            "initContainerStatuses": [_container(name, state) for name in labels.SIDECARS],
            "containerStatuses": [_container(labels.TOLARIA, state)],
        }
    }


def _container(name: str, state: Object, *, ready: bool = True) -> Object:
    return {
        "name": name, "state": state, "ready": ready, "started": ready,
        "restartCount": 0, "image": "none", "imageID": "none",
    }  # fmt: skip


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def heartbeat(request: Callable[..., Any]) -> None:
    """Makes the node and says that it is well; to be repeated within its grace period of 50 s."""
    request("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
    now = _stamp(datetime.now(UTC))
    ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": now, "reason": "Simulated"}
    body = {"status": {"conditions": [ready]}}
    request("PATCH", f"/api/v1/nodes/{NODE}/status", body, content_type="application/merge-patch+json")
