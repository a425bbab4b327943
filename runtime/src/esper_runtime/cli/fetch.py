"""`esper fetch` from a cluster: a pod that only reads the run's checkpoint volume, its files as a tar stream.

The pod mounts the volume read-only, gets no service account token and runs as the trainer's user under the
'restricted' Pod Security Standard. It is deleted in every case, and ends by itself should this process be killed.
"""

import io
import json
import secrets
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper_leyline import labels, paths

from esper_runtime.cli.backend import BackendError, Resource
from esper_runtime.cli.export import DESCRIPTION, install, staged
from esper_runtime.cli.output import find, say

if TYPE_CHECKING:
    from esper_runtime.cli.cluster_backend import ClusterBackend

START_PATIENCE_S = 180.0
LIFETIME_S = 3600
"""activeDeadlineSeconds of the pod: it ends without us too."""
IDLE_S = 60.0
ROOT = "/checkpoints"
CONTAINER = "reader"
_MAX_MEMBERS = 4096
"""Files of a model of four terabytes."""

_SEND = (
    "import os, sys, tarfile\n"
    "with tarfile.open(fileobj=sys.stdout.buffer, mode='w|') as tar:\n"
    "    for name in sorted(os.listdir(sys.argv[1])):\n"
    "        path = os.path.join(sys.argv[1], name)\n"
    "        if os.path.isfile(path):\n"
    "            tar.add(path, arcname=name)\n"
)


def fetch_from_cluster(
    backend: "ClusterBackend", resource: Resource, destination: Path, *, image: str | None
) -> list[Path]:
    """Brings the export of the run home; the files written."""
    name, uid = resource["metadata"]["name"], resource["metadata"]["uid"]
    if find(resource, "status", "checkpoint", "exportPath") is None:
        phase = find(resource, "status", "phase")
        raise BackendError(f"{name}: has exported no model yet (phase {phase}): wait until it has Succeeded")
    with staged(destination) as draft:
        pod = reader_pod(resource, image or _image(backend, resource))
        backend.call(
            backend.core.create_namespaced_pod, namespace=backend.namespace, body=pod, what=pod["metadata"]["name"]
        )
        try:
            _wait_running(backend, pod["metadata"]["name"])
            _receive(backend, pod["metadata"]["name"], f"{ROOT}/{uid}/{paths.EXPORT_DIR}", draft)
        finally:
            _delete(backend, pod["metadata"]["name"])
        if not (draft / DESCRIPTION).is_file():
            raise BackendError(f"{name}: the volume holds no export: wait until the run has Succeeded")
        return install(draft, destination)


def reader_pod(resource: Resource, image: str) -> dict[str, Any]:
    """A pod of the 'restricted' standard that mounts the run's checkpoints read-only and waits."""
    name = resource["metadata"]["name"]
    storage = find(resource, "spec", "checkpoint", "storage") or {}
    mount = {"name": "checkpoints", "mountPath": ROOT, "readOnly": True}
    if storage.get("subPath"):
        mount["subPath"] = storage["subPath"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{name[:40]}-fetch-{secrets.token_hex(3)}",
            "labels": {labels.NAME: "esper", labels.COMPONENT: CONTAINER, labels.MANAGED: "esper-cli"},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": LIFETIME_S,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "fsGroup": paths.GID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(image, mount)],
            "volumes": [
                {
                    "name": "checkpoints",
                    "persistentVolumeClaim": {
                        "claimName": storage.get("claimName") or labels.claim_name(name),
                    },
                }
            ],
        },
    }


def _container(image: str, mount: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": image,
        "command": ["python", "-c", f"import time; time.sleep({LIFETIME_S})"],
        "volumeMounts": [mount],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": {
            "runAsUser": paths.UIDS[labels.TOLARIA],
            "runAsGroup": paths.GID,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _image(backend: "ClusterBackend", resource: Resource) -> str:
    """The sidecars' image, from the run's last Job: small, and present on the node that ran it."""
    name = resource["metadata"]["name"]
    found = backend.call(
        backend.batch.list_namespaced_job,
        namespace=backend.namespace,
        label_selector=f"{labels.RUN}={name}",
        _preload_content=False,
    )
    jobs = json.loads(found.data)["items"]
    for job in sorted(jobs, key=lambda j: j["metadata"]["creationTimestamp"], reverse=True):
        for container in find(job, "spec", "template", "spec", "initContainers") or ():
            if container["name"] == labels.WEATHERLIGHT:
                return str(container["image"])
    raise BackendError(f"{name}: its Jobs are gone, so the image is not known: give Esper's sidecar image with --image")


def _wait_running(backend: "ClusterBackend", pod: str) -> None:
    give_up = time.monotonic() + START_PATIENCE_S
    told = False
    while True:
        found = backend.call(
            backend.core.read_namespaced_pod, name=pod, namespace=backend.namespace, _preload_content=False, what=pod
        )
        status = json.loads(found.data).get("status", {})
        if status.get("phase") == "Running":
            return
        why = _waiting(status)
        if status.get("phase") in ("Failed", "Succeeded") or time.monotonic() > give_up:
            raise BackendError(
                f"the reader pod {pod} does not start ({why or status.get('phase')}): is the volume free?"
            )
        if not told:
            say(f"waiting for the reader pod {pod}")
            told = True
        time.sleep(0.3)


def _waiting(status: dict[str, Any]) -> str:
    for container in status.get("containerStatuses", ()):
        if waiting := find(container, "state", "waiting"):
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions", ()):
        if condition.get("status") == "False" and condition.get("message"):
            return str(condition["message"])
    return ""


def _receive(backend: "ClusterBackend", pod: str, directory: str, draft: Path) -> None:
    from kubernetes.stream import stream

    socket = backend.call(
        stream,
        api_method=backend.core.connect_get_namespaced_pod_exec,
        name=pod,
        namespace=backend.namespace,
        container=CONTAINER,
        command=["python", "-c", _SEND, directory],
        stdin=False,
        stdout=True,
        stderr=True,
        tty=False,
        binary=True,
        _preload_content=False,
        what=pod,
    )
    source = _Exec(socket)
    try:
        unpack(source, draft)
    except tarfile.TarError as error:
        raise BackendError(f"the transfer broke off: {source.errors() or error}: fetch again") from error
    finally:
        socket.close()


def unpack(source: Any, draft: Path) -> None:
    """Plain files of a tar stream, flat, into `draft`. `source` has read(size)."""
    with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 16) as archive:
        for number, member in enumerate(archive):
            if number >= _MAX_MEMBERS or not member.isfile() or "/" in member.name or member.name.startswith("."):
                raise BackendError(f"the export holds {member.name!r}, which is no part of a model: not taken")
            archive.extract(member, draft, filter="data")


class _Exec(io.RawIOBase):
    """Standard output of a command in a pod, as a file."""

    def __init__(self, socket: Any) -> None:
        super().__init__()
        self._chunks = self._read_chunks(socket)
        self._rest = b""
        self._errors = b""

    def errors(self) -> str:
        """What the command said on standard error, its last line."""
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def read(self, size: int = -1) -> bytes:
        while not self._rest or (size < 0 and self._rest):
            try:
                self._rest += next(self._chunks)
            except StopIteration:
                break
        size = len(self._rest) if size < 0 else size
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _read_chunks(self, socket: Any) -> Iterator[bytes]:
        heard_at = time.monotonic()
        while True:
            socket.update(timeout=1)
            if socket.peek_stderr():
                self._errors = (self._errors + socket.read_stderr())[-4096:]
            if socket.peek_stdout():
                heard_at = time.monotonic()
                yield socket.read_stdout()
            elif not socket.is_open():
                return
            elif time.monotonic() - heard_at > IDLE_S:
                raise BackendError(f"nothing came for {IDLE_S:.0f} s: fetch again")


def _delete(backend: "ClusterBackend", pod: str) -> None:
    try:
        backend.call(
            backend.core.delete_namespaced_pod,
            name=pod,
            namespace=backend.namespace,
            grace_period_seconds=0,
            what=pod,
        )
    except BackendError as error:
        say(f"warning: the reader pod {pod} could not be deleted ({error}); it ends by itself within {LIFETIME_S} s")
