"""A real API server for tests: etcd and kube-apiserver as processes on free loopback ports, in about four seconds.

The binaries come from the directory in the environment variable KUBE_ASSETS. RBAC is on, the administrator has a
token, and every request leaves a line in the audit log. Nothing schedules or runs pods; with `controllers` the
kube-controller-manager makes pods of Jobs, collects garbage and deletes namespaces.
"""

import base64
import json
import os
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ASSETS = "KUBE_ASSETS"
NEEDED = ("etcd", "kube-apiserver", "kube-controller-manager")
USERS = ("alice", "bob")
START_DEADLINE_S = 45.0
STOP_DEADLINE_S = 2.0
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"


class ControlPlaneError(Exception):
    """A process did not start; the message holds the end of its log."""


@dataclass(frozen=True)
class Reply:
    """What the API server answered: the HTTP status and the decoded object (a Status when it refused)."""

    status: int
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.status < 300

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


@dataclass
class ControlPlane:
    """A running API server. `request` speaks to it as the administrator unless another token is given."""

    directory: Path
    url: str
    token: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    def kubeconfig_of(self, user: str) -> Path:
        """For one of USERS, who may do everything too; the audit log tells them apart."""
        path = self.directory / f"kubeconfig-{user}"
        _write_kubeconfig(self, path, user, f"{user}-{self.token}")
        return path

    @property
    def ca_file(self) -> Path:
        return self.directory / "pki/apiserver.crt"

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made once: reading certificates costs more than the request."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        token: str | None = None,
    ) -> Reply:
        """One call, such as request("GET", "/api/v1/namespaces"). Refusals are replies, not exceptions."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": content_type}
        call = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(call, context=self._tls, timeout=15) as answer:
                return Reply(answer.status, _decoded(answer.read()))
        except urllib.error.HTTPError as refusal:
            with refusal:
                return Reply(refusal.code, _decoded(refusal.read()))

    def create(self, path: str, manifest: Any, *, query: str = "fieldValidation=Strict") -> Reply:
        return self.request("POST", f"{path}?{query}", manifest)

    def apply(self, path: str, manifest: Any, *, manager: str = "tests") -> Reply:
        """Server-side apply of an object at its own path, taking over fields of others."""
        return self.request("PATCH", f"{path}?fieldManager={manager}&force=true", manifest, content_type=APPLY)

    def merge(self, path: str, patch: Any) -> Reply:
        return self.request("PATCH", path, patch, content_type=MERGE)

    def namespace(self, prefix: str = "test", labels: dict[str, str] | None = None) -> str:
        """A new namespace with a unique name."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        reply = self.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels or {}}})
        assert reply.ok, reply.message
        return name

    def install_crd(self, manifest: dict[str, Any]) -> None:
        """Applies a CustomResourceDefinition and waits until its resource is served."""
        name = manifest["metadata"]["name"]
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        reply = self.apply(path, manifest)
        assert reply.ok, reply.message
        spec = manifest["spec"]
        served = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"

        def established() -> bool:
            conditions = self.request("GET", path).body.get("status", {}).get("conditions") or ()
            return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

        wait_until(lambda: established() and self.request("GET", served).ok, f"{name} to be served")

    @contextmanager
    def away(self) -> Iterator[None]:
        """The API server is dead meanwhile: connections are reset, then refused. etcd keeps everything.

        Controllers are started anew with it, so that their own patience is not what a test measures.
        """
        names = [name for name in ("kube-apiserver", "kube-controller-manager") if name in self.processes]
        for name in names:
            process = self.processes.pop(name)
            process.kill()
            process.wait()
        try:
            yield
        finally:
            for name in names:
                _start(self, name)
                _await(self, name, lambda: _answers(self, "/readyz"))

    def audit(self) -> list[dict[str, Any]]:
        """Every request so far: verb, objectRef, user, userAgent, responseStatus, ..."""
        lines = self.audit_log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Polls until `condition` holds; fails the test when it does not in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline_s:.0f} s for {what}")
        time.sleep(0.02)


def assets() -> Path:
    """The directory of the binaries; skips the test, saying why, when they are not there."""
    where = os.environ.get(ASSETS)
    if not where:
        pytest.skip(f"{ASSETS} is not set: name a directory with {', '.join(NEEDED)}")
    missing = [name for name in NEEDED if not os.access(Path(where) / name, os.X_OK)]
    if missing:
        pytest.skip(f"{ASSETS}={where} lacks {', '.join(missing)}")
    return Path(where)


@contextmanager
def running(directory: Path, *, controllers: bool = False) -> Iterator[ControlPlane]:
    """A fresh control plane whose files live in `directory`; stopped on leaving."""
    binaries = assets()
    ports = _free_ports(4)
    plane = ControlPlane(directory, f"https://127.0.0.1:{ports[2]}", secrets.token_hex(16))
    _write_files(plane)
    try:
        _spawn(plane, binaries / "etcd", _etcd_options(directory, *ports[:2]))
        _spawn(plane, binaries / "kube-apiserver", _api_options(plane, ports[0], ports[2], controllers))
        _await(plane, "kube-apiserver", lambda: plane.ca_file.is_file() and plane.ca_file.stat().st_size > 0)
        _write_kubeconfig(plane, plane.kubeconfig, "admin", plane.token)
        _await(plane, "kube-apiserver", lambda: _answers(plane, "/readyz"))
        if controllers:
            _spawn(plane, binaries / "kube-controller-manager", _manager_options(plane, ports[3]))
            _await(
                plane,
                "kube-controller-manager",
                lambda: _answers(plane, "/api/v1/namespaces/default/serviceaccounts/default"),
            )
        yield plane
    finally:
        _stop(plane)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _write_files(plane: ControlPlane) -> None:
    pki = plane.directory / "pki"
    pki.mkdir(parents=True, exist_ok=True)
    tokens = pki / "tokens.csv"
    tokens.touch(mode=0o600)
    lines = [f"{plane.token},admin,admin,system:masters"]
    lines += [f"{user}-{plane.token},{user},{user},system:masters" for user in USERS]
    tokens.write_text("\n".join(lines) + "\n")
    (pki / "audit-policy.yaml").write_text(yaml.safe_dump(AUDIT_POLICY))
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (pki / "service-accounts.key").write_bytes(encoded)


def _write_kubeconfig(plane: ControlPlane, path: Path, user: str, token: str) -> None:
    authority = base64.b64encode(plane.ca_file.read_bytes()).decode()
    name = "control-plane"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
        "clusters": [{"name": name, "cluster": {"server": plane.url, "certificate-authority-data": authority}}],
        "users": [{"name": user, "user": {"token": token}}],
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document))


def _etcd_options(directory: Path, client_port: int, peer_port: int) -> list[str]:
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        f"--data-dir={directory / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
    ]  # fmt: skip


def _api_options(plane: ControlPlane, etcd_port: int, port: int, controllers: bool) -> list[str]:
    pki = plane.directory / "pki"
    key = pki / "service-accounts.key"
    options = [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}", f"--cert-dir={pki}",
        "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}",
        "--authorization-mode=RBAC", f"--token-auth-file={pki / 'tokens.csv'}",
        "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged", "--endpoint-reconciler-type=none",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
        f"--audit-policy-file={pki / 'audit-policy.yaml'}", f"--audit-log-path={plane.audit_log}",
        "--audit-log-maxsize=10000",
    ]  # fmt: skip
    if not controllers:
        # Nobody would make the service accounts that this plugin wants every pod to have.
        options.append("--disable-admission-plugins=ServiceAccount")
    return options


def _manager_options(plane: ControlPlane, port: int) -> list[str]:
    pki = plane.directory / "pki"
    return [
        f"--kubeconfig={plane.kubeconfig}", "--bind-address=127.0.0.1", f"--secure-port={port}",
        f"--cert-dir={pki / 'manager'}", "--leader-elect=false", "--use-service-account-credentials",
        "--kube-api-qps=500", "--kube-api-burst=500",  # else it makes a pod or two a second
        f"--service-account-private-key-file={pki / 'service-accounts.key'}", f"--root-ca-file={plane.ca_file}",
    ]  # fmt: skip


def _spawn(plane: ControlPlane, program: Path, options: list[str]) -> None:
    plane.commands[program.name] = [str(program), *options]
    _start(plane, program.name)


def _start(plane: ControlPlane, name: str) -> None:
    with (plane.directory / f"{name}.log").open("ab") as log:
        plane.processes[name] = subprocess.Popen(
            plane.commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def _await(plane: ControlPlane, name: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_DEADLINE_S
    while not condition():
        dead = [n for n, process in plane.processes.items() if process.poll() is not None]
        if dead or time.monotonic() > end:
            culprit = dead[0] if dead else name
            tail = (plane.directory / f"{culprit}.log").read_text(errors="replace")[-2000:]
            raise ControlPlaneError(f"{culprit} {'ended' if dead else 'is not ready'}:\n{tail}")
        time.sleep(0.05)


def _answers(plane: ControlPlane, path: str) -> bool:
    try:
        return plane.request("GET", path).ok
    except (urllib.error.URLError, ConnectionError, ssl.SSLError, TimeoutError):
        return False


def _decoded(raw: bytes) -> dict[str, Any]:
    """Nearly every answer is an object; those of /readyz and the like are plain text."""
    with suppress(ValueError):
        decoded = json.loads(raw)
        if isinstance(decoded, dict):
            return decoded
    return {"message": raw.decode(errors="replace")}


def _stop(plane: ControlPlane) -> None:
    """In reverse order; the API server would otherwise wait a minute for watches that nobody ends."""
    for process in reversed(plane.processes.values()):
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
