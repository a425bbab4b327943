"""The operator as a process on a real API server, with a simulated node and a real Redis."""

import asyncio
import base64
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from esper_leyline import labels
from esper_operator.kube.client import Credentials, RestApi

from tests.support.controlplane import ControlPlane
from tests.support.redis_server import RedisServer
from tests.support.simulatednode import SimulatedNode, heartbeat
from tests.support.waiting import until

USER_AGENT = "esper-operator"
VERBS = {"create", "update", "patch", "delete", "deletecollection"}


class OperatorProcess:
    def __init__(
        self, plane: ControlPlane, namespace: str, log: Path, *, redis_url: str = "", name: str = "one"
    ) -> None:
        self.log = log
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("ESPER_", "KUBE"))} | {
            "KUBECONFIG": str(plane.kubeconfig),
            "POD_NAME": name,
            "ESPER_OPERATOR_NAMESPACE": namespace,
            "ESPER_OPERATOR_WATCH_NAMESPACES": namespace,
            "ESPER_OPERATOR_RUNTIME_IMAGE": "esper/runtime:test",
            "ESPER_OPERATOR_SIDECAR_IMAGE": "esper/sidecar:test",
            "ESPER_OPERATOR_HTTP_PORT": "0",
            "ESPER_OPERATOR_BUS_URL": redis_url,
            "ESPER_OPERATOR_LOG_LEVEL": "DEBUG",
            "ESPER_OPERATOR_LOG_FORMAT": "text",
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


@dataclass
class Cluster:
    """One namespace with an operator, a node and Redis; torn down as a whole."""

    plane: ControlPlane
    namespace: str
    api: RestApi
    directory: Path
    redis: RedisServer | None
    node: SimulatedNode
    operators: list[OperatorProcess] = field(default_factory=list)

    def start_operator(self, name: str = "one") -> OperatorProcess:
        url = self.redis.url if self.redis else ""
        log = self.directory / f"operator-{name}-{len(self.operators)}.log"
        operator = OperatorProcess(self.plane, self.namespace, log, redis_url=url, name=name)
        self.operators.append(operator)
        return operator

    def path(self, run: str = "", subresource: str = "") -> str:
        tail = "".join(f"/{part}" for part in (run, subresource) if part)
        return f"/apis/{labels.API_VERSION}/namespaces/{self.namespace}/{labels.PLURAL}{tail}"

    def create_run(self, name: str, *, steps: int = 20, nan_at: int | None = None, **spec: Any) -> None:
        self.node.plan(name, total_steps=steps, nan_at=nan_at)
        manifest = {
            "apiVersion": labels.API_VERSION,
            "kind": labels.KIND,
            "metadata": {"name": name},
            "spec": {
                "runtime": {"entrypoint": "esper_runtime.workloads.digits:build"},
                "checkpoint": {"storage": {"claimTemplate": {"size": "1Gi"}}, "everySteps": 5},
                **spec,
            },
        }
        reply = self.plane.create(self.path(), manifest)
        assert reply.ok, reply.message

    def set_spec(self, name: str, **fields: Any) -> None:
        reply = self.plane.merge(self.path(name), {"spec": fields})
        assert reply.ok, reply.message

    def delete_run(self, name: str) -> None:
        assert self.plane.request("DELETE", self.path(name)).ok

    def status(self, name: str) -> dict[str, Any]:
        return self.plane.request("GET", self.path(name)).body.get("status", {})

    def items(self, path: str) -> list[dict[str, Any]]:
        return self.plane.request("GET", path.format(self.namespace)).body.get("items", [])

    def transitions(self, name: str) -> list[str]:
        return [entry["to"] for entry in self.status(name).get("history", [])]

    async def phase(self, name: str, phase: str, timeout_s: float = 30.0) -> dict[str, Any]:
        return await self.sees(name, lambda status: status.get("phase") == phase, f"{name} is {phase}", timeout_s)

    async def sees(
        self, name: str, check: Callable[[dict[str, Any]], Any], what: str, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """Polls the status until `check` holds for it; the status."""
        last: dict[str, Any] = {}

        async def look() -> bool:
            nonlocal last
            last = (await asyncio.to_thread(self.plane.request, "GET", self.path(name))).body.get("status", {})
            return bool(check(last))

        try:
            await until(look, timeout_s, what)
        except AssertionError as error:
            logs = "\n".join(f"--- {o.log.name}\n{o.log.read_text()[-3000:]}" for o in self.operators)
            raise AssertionError(f"{error}; status: {last}\n{logs}") from None
        return last

    def writes(self, since: int = 0) -> list[tuple[str, str, int]]:
        """(verb, resource/subresource, code) of every write of the operator in this namespace but the Lease's."""
        found = []
        for event in self.plane.audit()[since:]:
            ref = event.get("objectRef", {})
            agent = event.get("userAgent", "")
            if ref.get("namespace") != self.namespace or not agent.startswith(USER_AGENT) or event["verb"] not in VERBS:
                continue
            if ref["resource"] == "leases":
                continue
            resource = "/".join(part for part in (ref["resource"], ref.get("subresource", "")) if part)
            found.append((event["verb"], resource, event["responseStatus"]["code"]))
        return found

    def write_counts(self, since: int = 0) -> Counter[str]:
        return Counter(f"{verb} {resource}" for verb, resource, _ in self.writes(since))

    def audit_mark(self) -> int:
        return len(self.plane.audit())


@asynccontextmanager
async def cluster(
    plane: ControlPlane, directory: Path, *, with_redis: bool = True, step_s: float = 0.1
) -> AsyncIterator[Cluster]:
    """A namespace with everything but an operator."""
    namespace = plane.namespace("operator")
    heartbeat(plane.request)
    credentials = await Credentials.load({"KUBECONFIG": str(plane.kubeconfig)})
    api = RestApi(credentials, user_agent="test-node")
    redis = RedisServer() if with_redis else None
    if redis:
        redis.start()
    seed = os.urandom(32)
    secret = {
        "metadata": {"name": "esper-operator-seed"},
        "data": {"seed": base64.b64encode(seed).decode()},
    }
    assert plane.create(f"/api/v1/namespaces/{namespace}/secrets", secret).ok
    node = SimulatedNode(api, namespace, seed=seed, redis_url=redis.url if redis else "", step_s=step_s)
    made = Cluster(plane, namespace, api, directory, redis, node)
    try:
        async with node:
            yield made
    finally:
        for operator in made.operators:
            if operator.process.poll() is None:
                operator.go_on()
                operator.kill()
        await api.close()
        if redis:
            redis.stop()


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
