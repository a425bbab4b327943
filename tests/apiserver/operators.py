"""The operator as a process on a real API server, with a simulated node and a real Redis."""

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from esper_leyline import labels
from esper_leyline.oona import REPORTS, Entry, Oona
from esper_operator.kube.client import Credentials, RestApi
from prometheus_client.parser import text_string_to_metric_families

from tests.support.controlplane import ControlPlane
from tests.support.redis_server import RedisServer
from tests.support.simulatednode import SimulatedNode, heartbeat
from tests.support.waiting import until

USER_AGENT = "esper-operator"
DEADLINE_S = 90.0
"""For what takes seconds by itself, on a machine that does much else. Passing tests never wait so long."""
BEAT_S = 10.0
VERBS = {"create", "update", "patch", "delete", "deletecollection"}


class OperatorProcess:
    def __init__(self, kubeconfig: Path, log: Path, *, name: str, **settings: str) -> None:
        """`name` is that of its pod; `settings` are variables without their prefix, in small letters."""
        self.log = log
        self.name = name
        self.port = free_port()
        own = {f"ESPER_OPERATOR_{key.upper()}": value for key, value in settings.items()}
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("ESPER_", "KUBE"))} | {
            "KUBECONFIG": str(kubeconfig),
            "POD_NAME": name,
            "ESPER_OPERATOR_RUNTIME_IMAGE": "esper/runtime:test",
            "ESPER_OPERATOR_SIDECAR_IMAGE": "esper/sidecar:test",
            "ESPER_OPERATOR_HTTP_PORT": str(self.port),
            "ESPER_OPERATOR_LOG_LEVEL": "DEBUG",
            "ESPER_OPERATOR_LOG_FORMAT": "text",
            **own,
        }
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "esper_operator"], env=environ, stdout=stream, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(20)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self, text: str) -> bool:
        """Whether its log has that."""
        return text in self.log.read_text()

    def get(self, path: str) -> str:
        """Body of its /livez, /readyz or /metrics; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as refusal:
            with refusal:
                return str(refusal.read().decode())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return ""

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels; 0 when there is none."""
        samples = (s for family in text_string_to_metric_families(self.get("/metrics")) for s in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """One namespace with an operator, a node and Redis; torn down as a whole."""

    plane: ControlPlane
    namespace: str
    api: RestApi
    directory: Path
    redis: RedisServer | None
    node: SimulatedNode
    seed: bytes
    """Of all run keys."""
    operators: list[OperatorProcess] = field(default_factory=list)

    @property
    def operator(self) -> OperatorProcess:
        """The youngest."""
        return self.operators[-1]

    async def replace_operator(self) -> None:
        """SIGKILL, and a new container of the same pod."""
        self.operator.kill()
        await self.leading_operator(self.operator.name)

    def start_operator(self, name: str = "one", *, user: str = "", **settings: str) -> OperatorProcess:
        """The same name again is the same pod, whose container is started anew. `user`: who it is to the API server."""
        log = self.directory / f"operator-{name}-{len(self.operators)}.log"
        chosen = {
            "namespace": self.namespace,
            "watch_namespaces": self.namespace,
            "bus_url": self.redis.url if self.redis else "",
            **settings,
        }
        kubeconfig = self.plane.kubeconfig_of(user) if user else self.plane.kubeconfig
        operator = OperatorProcess(kubeconfig, log, name=name, **chosen)
        self.operators.append(operator)
        return operator

    async def leading_operator(self, name: str = "one", *, user: str = "", **settings: str) -> OperatorProcess:
        operator = self.start_operator(name, user=user, **settings)
        await self.until(lambda: operator.said("reconciling"), f"operator {name} leads")
        return operator

    async def standby(self, name: str, *, user: str = "") -> OperatorProcess:
        """Another one that is ready and waits for the Lease."""
        operator = self.start_operator(name, user=user)
        await self.until(lambda: "caches: ok" in operator.get("/readyz"), f"operator {name} is ready")
        return operator

    def path(self, run: str = "", subresource: str = "") -> str:
        tail = "".join(f"/{part}" for part in (run, subresource) if part)
        return f"/apis/{labels.API_VERSION}/namespaces/{self.namespace}/{labels.PLURAL}{tail}"

    def create_run(self, name: str, *, steps: int = 20, nan_at: int | None = None, **spec: Any) -> None:
        self.node.plan(name, total_steps=steps, nan_at=nan_at)
        reply = self.plane.create(self.path(), run_manifest(name, **spec))
        assert reply.ok, reply.message

    def set_spec(self, name: str, **fields: Any) -> None:
        reply = self.plane.merge(self.path(name), {"spec": fields})
        assert reply.ok, reply.message

    def delete_run(self, name: str) -> None:
        assert self.plane.request("DELETE", self.path(name)).ok

    def uid(self, name: str) -> str:
        return str(self.plane.request("GET", self.path(name)).body["metadata"]["uid"])

    def status(self, name: str) -> dict[str, Any]:
        reply = self.plane.request("GET", self.path(name))
        return reply.body.get("status", {}) if reply.ok else {}

    def items(self, path: str) -> list[dict[str, Any]]:
        return self.plane.request("GET", path.format(self.namespace)).body.get("items", [])

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object of the core group."""
        return self.plane.request("GET", f"/api/v1/namespaces/{self.namespace}/{kind}/{name}").body

    def children(self, kind: str, run: str) -> list[dict[str, Any]]:
        """Objects of that plural (jobs, pods, configmaps, ...) with the run's label."""
        group = "apis/batch/v1" if kind == "jobs" else "api/v1"
        return self.items(f"/{group}/namespaces/{{}}/{kind}?labelSelector={labels.RUN}%3D{run}")

    def transitions(self, name: str) -> list[str]:
        return [entry["to"] for entry in self.status(name).get("history", [])]

    async def reports_in_redis(self, oona: Oona) -> list[Entry]:
        """All that are there now."""
        newest = await oona.last(REPORTS)
        found: list[Entry] = []
        if newest is not None:
            async with aclosing(oona.reports()) as entries:
                async for entry in entries:
                    found.append(entry)
                    if entry.order >= newest.order:
                        break
        return found

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def events(self, name: str, reason: str = "") -> list[dict[str, Any]]:
        """Kubernetes Events about the run, or about whatever has that name."""
        found = self.items("/apis/events.k8s.io/v1/namespaces/{}/events")
        return [e for e in found if e["regarding"]["name"] == name and reason in ("", e["reason"])]

    async def stepped(self, run: str, least: int) -> None:
        """Waits for a step by the trainer's own count: the status shows progress only every 10 s."""
        await self.until(
            lambda: self.node.pod_names(run) and self.node.training(run).step >= least, f"step {least} of {run}"
        )

    async def trains(self, run: str, attempt: int) -> None:
        """Waits for a step of that attempt's own."""
        await self.until(lambda: self.node.steps_of(run, attempt), f"a step of attempt {attempt} of {run}")

    async def until(self, check: Callable[[], Any], what: str) -> None:
        """Polls; at the deadline the operators' logs are in the error."""

        def look() -> Any:
            self.node.assert_well()
            return check()

        try:
            await until(look, DEADLINE_S, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._logs()}") from None

    def _logs(self) -> str:
        return "\n".join(f"--- {o.log.name}\n{o.log.read_text()[-3000:]}" for o in self.operators)

    def created(self, resource: str, run: str) -> Counter[str]:
        """How often the operator has created each object of the run, by the audit log."""
        return Counter(
            event["objectRef"]["name"]
            for event in self._written()
            if event["verb"] == "create" and event["responseStatus"]["code"] == 201
            and event["objectRef"]["resource"] == resource and event["objectRef"]["name"].startswith(run)
        )  # fmt: skip

    def assert_nothing_doubled(self, run: str) -> None:
        """Jobs, history entries, Events: each once."""
        jobs = self.created("jobs", run)
        assert set(jobs.values()) == {1}, jobs
        history = [tuple(sorted(entry.items())) for entry in self.status(run)["history"]]
        assert len(set(history)) == len(history), history
        ours = (e for e in self.events(run) if e["reportingController"] == labels.MANAGED_BY)
        said = Counter((e["reason"], e["note"], e["eventTime"]) for e in ours)
        assert not [event for event, times in said.items() if times > 1], said

    async def phase(self, name: str, phase: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        return await self.sees(name, lambda status: status.get("phase") == phase, f"{name} is {phase}", timeout_s)

    async def sees(
        self, name: str, check: Callable[[dict[str, Any]], Any], what: str, timeout_s: float = DEADLINE_S
    ) -> dict[str, Any]:
        """Polls the status until `check` holds for it; the status."""
        last: dict[str, Any] = {}

        async def look() -> bool:
            nonlocal last
            self.node.assert_well()
            last = await asyncio.to_thread(self.status, name)
            return bool(check(last))

        try:
            await until(look, timeout_s, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {last}\n{self._logs()}") from None
        return last

    def first_status_write_s(self, since: int) -> float:
        """From the first request that the API server took after that mark to the operator's first status write."""
        first = moment(self.plane.audit()[since]["requestReceivedTimestamp"])
        write = next(e for e in self._written(since) if e["objectRef"].get("subresource") == "status")
        return (moment(write["stageTimestamp"]) - first).total_seconds()

    def writes(self, since: int = 0) -> list[tuple[str, str, int]]:
        """(verb, resource/subresource, code) of every write of the operator in this namespace but the Lease's."""
        return [
            (
                event["verb"],
                "/".join(filter(None, (ref["resource"], ref.get("subresource")))),
                event["responseStatus"]["code"],
            )
            for event in self._written(since)
            if (ref := event["objectRef"])["resource"] != "leases"
        ]

    def written_by(self, user: str, since: int) -> list[str]:
        """Requests that would have changed something, of the operator that was started for that user."""
        return [event["requestURI"] for event in self._written(since) if event["user"]["username"] == user]

    def _written(self, since: int = 0) -> list[dict[str, Any]]:
        """Audit lines of the operators' writes in this namespace."""
        return [
            event
            for event in self.plane.audit()[since:]
            if event.get("objectRef", {}).get("namespace") == self.namespace
            and event.get("userAgent", "").startswith(USER_AGENT)
            and event["verb"] in VERBS
        ]

    def write_counts(self, since: int = 0) -> Counter[str]:
        return Counter(f"{verb} {resource}" for verb, resource, _ in self.writes(since))

    def audit_mark(self) -> int:
        return len(self.plane.audit())


def run_manifest(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": labels.API_VERSION,
        "kind": labels.KIND,
        "metadata": {"name": name},
        "spec": {
            "runtime": {"entrypoint": "esper_runtime.workloads.digits:build"},
            "checkpoint": {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 5},
            **spec,
        },
    }


@asynccontextmanager
async def cluster(
    plane: ControlPlane, directory: Path, *, with_redis: bool = True, step_s: float = 0.1, **node_options: Any
) -> AsyncIterator[Cluster]:
    """A namespace with everything but an operator. `node_options` are those of the SimulatedNode."""
    namespace = plane.namespace("operator")
    seed = os.urandom(32)
    heartbeat(plane.request)
    credentials = await Credentials.load({"KUBECONFIG": str(plane.kubeconfig)})
    api = RestApi(credentials, user_agent="test-node")
    redis = RedisServer() if with_redis else None
    if redis:
        redis.start()
    secret = {
        "metadata": {"name": "esper-operator-seed"},
        "data": {"seed": base64.b64encode(seed).decode()},
    }
    assert plane.create(f"/api/v1/namespaces/{namespace}/secrets", secret).ok
    url = redis.url if redis else ""
    node = SimulatedNode(api, namespace, seed=seed, redis_url=url, step_s=step_s, **node_options)
    made = Cluster(plane, namespace, api, directory, redis, node, seed)
    beating = asyncio.create_task(_beat(plane))
    try:
        async with node:
            yield made
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        for operator in made.operators:
            if operator.process.poll() is None:
                operator.go_on()
                operator.kill()
        await api.close()
        if redis:
            redis.stop()


async def _beat(plane: ControlPlane) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        await asyncio.to_thread(heartbeat, plane.request)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
