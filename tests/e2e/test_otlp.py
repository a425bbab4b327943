"""The chart's export of run events to an OpenTelemetry receiver, which is a pod of ours."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import cluster as kit

Start = Callable[..., kit.RunHandle]
RECEIVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

def texts(attributes):
    return {a.key: a.value.string_value for a in attributes}

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = ExportLogsServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for one in asked.resource_logs:
            for scope in one.scope_logs:
                for record in scope.log_records:
                    said = {**texts(one.resource.attributes), **texts(record.attributes)}
                    print(json.dumps({**said, "token": self.headers.get("Authorization")}), flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("", 4318), Handler).serve_forever()
"""
TOKEN = "Bearer of-the-receiver"
HEADERS = "otlp-headers"


@pytest.fixture
def receiver(release: kit.Cluster, namespace: str) -> Iterator[str]:
    """Namespace of a receiver, to which the release exports."""
    release.kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(_receiver(f"esper/sidecar:{release.tag}")))
    release.kubectl("-n", namespace, "wait", "pod/receiver", "--for=condition=Ready", "--timeout=120s", timeout_s=150)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": HEADERS},
        "stringData": {"headers": f"Authorization: {TOKEN}\n"},
    }
    release.kubectl("-n", kit.SYSTEM, "apply", "-f", "-", stdin=json.dumps(secret))
    release.install(
        *("--set", "nissa.enabled=true", "--set", f"nissa.otlp.url=http://receiver.{namespace}.svc:4318/v1/logs"),
        *("--set", f"nissa.otlp.headersSecretName={HEADERS}"),
    )
    yield namespace
    release.install()
    release.kubectl("-n", kit.SYSTEM, "delete", "secret", HEADERS)


def _receiver(image: str) -> dict[str, Any]:
    container = {
        "name": "receiver",
        "image": image,
        "command": ["python", "-c", RECEIVER],
        "readinessProbe": {"tcpSocket": {"port": 4318}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    secure = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "receiver", "labels": {"app": "receiver"}},
        "spec": {"containers": [container], "securityContext": secure, "terminationGracePeriodSeconds": 1},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "receiver"},
        "spec": {"selector": {"app": "receiver"}, "ports": [{"port": 4318}]},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [pod, service]}


@pytest.mark.timeout(600)
def test_a_receiver_gets_the_events_of_a_run_once_and_with_the_incident(start: Start, receiver: str) -> None:
    run = start("examples/digits.yaml", name="exported", runtime={"config": {"epochs": 5000}})
    run.wait_phase("Running", timeout_s=120)
    run.wait_step(20)
    run.kill_trainer()
    status = run.wait("the restart", lambda s: s.get("lastRecovery") and s["phase"] == "Running", 120)
    incident, uid = status["lastRecovery"]["incident"], run.get()["metadata"]["uid"]

    def told() -> list[dict[str, str]]:
        said = [json.loads(line) for line in run.kubectl("logs", "receiver").splitlines()]
        mine = [one for one in said if one.get("esper.run.uid") == uid]
        return mine if any(one.get("esper.incident") == incident for one in mine) else []

    events = kit.until("the receiver to be told of the incident", told, timeout_s=60)
    assert {one["token"] for one in events} == {TOKEN}
    ids = [(one["esper.nonce"], one["esper.event.id"]) for one in events]
    assert len(ids) == len(set(ids)), "an event came twice"
