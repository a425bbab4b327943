"""One pod as local processes: volumes as directories, sidecars in order, the trainer, and everything down again.

What the kubelet guarantees is kept: sidecars start one after another and each must answer before the next, the main
container ends the pod, sidecars then end in reverse order, and the pod's memory volumes do not survive it.
"""

import asyncio
import contextlib
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from esper_leyline import env, labels
from esper_leyline.paths import PathLayout

from esper_runtime.local.container import Container, ContainerSpec
from esper_runtime.local.errors import LocalError
from esper_runtime.local.objects import Objects
from esper_runtime.local.probe import Probe, port_of
from esper_runtime.local.process import sweep
from esper_runtime.local.state import now_text
from esper_runtime.local.volumes import Mount, Mounts, container_mounts, expand, mount_directories, project, select

Manifest = dict[str, Any]

PASSED_ON = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
        "SSL_CERT_FILE", "OMP_NUM_THREADS",
    }
)  # fmt: skip
"""Variables of the user's own environment that containers see, besides LC_*, CUDA_* and NVIDIA_*."""
_PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")
DEFAULT_GRACE_S = 30.0
POD_IP = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where pods of a run live on this machine."""

    namespace: str
    layout: PathLayout
    scratch: Path
    """Directory of this `esper run`; short, because socket paths end at 108 bytes."""
    logs: Path
    working_directory: Path
    objects: Objects = field(repr=False)
    own_claim: str
    """Name of the claim that the run makes for itself."""


class LocalPod:
    """A pod of a Job. `run()` is its whole life; `manifest()` is what the API server would show."""

    def __init__(
        self, *, name: str, template: Mapping[str, Any], owner: Manifest, place: Place, changed: Callable[[], None]
    ) -> None:
        self.name = name
        self.uid = str(uuid.uuid4())
        self.deleting = False
        self._place = place
        self._changed = changed
        self._spec: Manifest = template["spec"]
        self._phase = "Pending"
        self._metadata: Manifest = {
            **template.get("metadata", {}),
            "name": name,
            "namespace": place.namespace,
            "uid": self.uid,
            "creationTimestamp": now_text(),
            "ownerReferences": [owner],
        }
        self._metadata.setdefault("annotations", {}).setdefault(labels.COMPLETION_INDEX, "0")
        self._directories = mount_directories(self._spec, _roots(place.layout), place.scratch / "volumes")
        self._directories |= _claims(self._spec, place)
        self._sidecars = [self._container(c, sidecar=True) for c in self._spec.get("initContainers", ())]
        self._main = [self._container(c, sidecar=False) for c in self._spec["containers"]]
        self._delete = asyncio.Event()
        self._grace_s = float(self._spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_S))

    @property
    def grace_s(self) -> float:
        return self._grace_s

    @property
    def leaders(self) -> list[int]:
        """First processes of the living containers, in the order in which they are to end."""
        return [c.pid for c in (*self._main, *reversed(self._sidecars)) if c.pid is not None]

    @property
    def run_directory(self) -> Path:
        return Path(self._place.layout.run)

    def exit_codes(self) -> dict[str, int]:
        """Of the main containers, once they have ended."""
        return {c.spec.name: c.exit_code for c in self._main if c.exit_code is not None}

    def manifest(self) -> Manifest:
        """The pod as an object of the API."""
        containers = [*self._sidecars, *self._main]
        ready = self._phase == "Running" and all(c.ready for c in containers)
        started = all(c.started.is_set() for c in self._sidecars)
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": dict(self._metadata),
            "spec": {**self._spec, "nodeName": platform.node()},
            "status": {
                "phase": self._phase,
                "podIP": POD_IP,
                "startTime": self._metadata["creationTimestamp"],
                "conditions": [
                    _condition("PodScheduled", True),
                    _condition("Initialized", started),
                    _condition("ContainersReady", ready),
                    _condition("Ready", ready),
                ],
                "initContainerStatuses": [c.status() for c in self._sidecars],
                "containerStatuses": [c.status() for c in self._main],
            },
        }

    def delete(self, *, grace_s: float | None = None) -> None:
        """Asks for its end: SIGTERM to the main containers, SIGKILL after the grace (the pod's own by default)."""
        self._metadata.setdefault("deletionTimestamp", now_text())
        grace_s = self._grace_s if grace_s is None else grace_s
        if self.deleting:
            # The first call's grace runs already; this one may only shorten it.
            asyncio.get_running_loop().call_later(grace_s, self._kill_main)
        else:
            self._grace_s = min(grace_s, self._grace_s)
            self.deleting = True
            self._delete.set()

    def _kill_main(self) -> None:
        for container in self._main:
            container.kill()

    def kill(self) -> None:
        """SIGKILL to everything, at once."""
        self.delete(grace_s=0.0)
        sweep(self.uid)

    def refresh(self) -> None:
        """Shows changed ConfigMaps and Secrets in the volumes."""
        for volume in self._spec.get("volumes", ()):
            self._show(volume)

    async def run(self) -> None:
        """From volumes to the last process. Raises LocalError when the pod cannot be set up."""
        sidecar_tasks: list[asyncio.Task[None]] = []
        try:
            self._prepare()
            for container in self._sidecars:
                sidecar_tasks.append(asyncio.create_task(container.run()))
                if not await self._or_deleted(container.started.wait()):
                    break
            if not self._delete.is_set():
                self._phase = "Running"
                self._changed()
                await self._run_main()
        finally:
            await self._stop_sidecars(sidecar_tasks)
            await asyncio.to_thread(sweep, self.uid)
            codes = self.exit_codes()
            complete = len(codes) == len(self._main) and not any(codes.values())
            self._phase = "Succeeded" if complete else "Failed"
            self._changed()

    async def _run_main(self) -> None:
        tasks = [asyncio.create_task(c.run()) for c in self._main]
        ended = asyncio.gather(*tasks)
        if not await self._or_deleted(asyncio.shield(ended)):
            await asyncio.gather(*(c.stop(self._grace_s) for c in self._main))
        await ended

    async def _or_deleted(self, awaitable: Any) -> bool:
        """Waits for it; False when the pod's end is asked for first."""
        work, deleted = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._delete.wait())
        try:
            await asyncio.wait((work, deleted), return_when=asyncio.FIRST_COMPLETED)
            return work.done() and not self._delete.is_set()
        finally:
            for task in (work, deleted):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

    async def _stop_sidecars(self, tasks: list[asyncio.Task[None]]) -> None:
        for container, task in reversed(list(zip(self._sidecars, tasks, strict=False))):
            await container.stop(self._grace_s)
            await task

    def _prepare(self) -> None:
        try:
            self._make_volumes()
        except OSError as error:
            raise LocalError(f"a pod cannot be set up: {error.filename}: {error.strerror}") from error

    def _make_volumes(self) -> None:
        for volume in self._spec.get("volumes", ()):
            directory = self._directories[volume["name"]]
            if "emptyDir" in volume:
                _empty(directory)
            elif "persistentVolumeClaim" in volume:
                directory.mkdir(parents=True, exist_ok=True)
            else:
                self._show(volume)
        for container in (*self._spec.get("initContainers", ()), *self._spec["containers"]):
            for mount in container_mounts(container, self._directories):
                mount.directory.mkdir(parents=True, exist_ok=True)

    def _show(self, volume: Manifest) -> None:
        """Fills the directory of a ConfigMap, Secret or projected volume."""
        directory = self._directories[volume["name"]]
        for kind, source, key in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
            if (found := volume.get(source)) is None:
                continue
            files = self._place.objects.files(kind, found[key])
            if files is None:
                if not found.get("optional"):
                    raise LocalError(f"volume {volume['name']}: {kind} {found[key]!r} does not exist")
                files = {}
            try:
                shown = select(files, found.get("items"))
            except KeyError as error:
                if not found.get("optional"):
                    raise LocalError(f"volume {volume['name']}: {kind} {found[key]!r} has no key {error}") from error
                shown = {}
            project(directory, shown, mode=0o600 if kind == "Secret" else 0o644)

    def _container(self, manifest: Manifest, *, sidecar: bool) -> Container:
        name = manifest["name"]
        mounts = self._mounts(manifest)
        environment = self._environment(manifest, mounts)
        command = [expand(word, environment) for word in (*manifest.get("command", ()), *manifest.get("args", ()))]
        command = [mounts.translate(word) for word in command]
        if not command:
            raise LocalError(f"container {name} has no command; its image cannot be asked on a laptop")
        if command[0] in ("python", "python3"):
            command[0] = sys.executable
        spec = ContainerSpec(
            name=name,
            command=command,
            environment=environment,
            log=self._place.logs / self.name / f"{name}.log",
            directory=self._place.working_directory,
            termination_log=self._termination_log(name),
            restart=sidecar and manifest.get("restartPolicy") == "Always",
            startup=Probe.of(manifest.get("startupProbe")),
            readiness=Probe.of(manifest.get("readinessProbe")),
            liveness=Probe.of(manifest.get("livenessProbe")),
        )
        return Container(spec, port=lambda: port_of(self.run_directory, name), changed=self._changed)

    def _mounts(self, manifest: Manifest) -> Mounts:
        found = container_mounts(manifest, self._directories)
        word = manifest.get("terminationMessagePath", self._place.layout.termination_log)
        found.append(Mount(word, self._termination_log(manifest["name"])))
        return Mounts(tuple(found))

    def _termination_log(self, container: str) -> Path:
        return self._place.scratch / "termination" / container

    def _environment(self, manifest: Manifest, mounts: Mounts) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
        }
        own: dict[str, str] = {}
        for variable in manifest.get("env", ()):
            value = self._value(variable)
            if value is not None:
                own[variable["name"]] = mounts.translate(expand(value, own))
        # The mark by which every process of the pod is found again.
        return environment | own | {env.POD_UID: self.uid}

    def _value(self, variable: Manifest) -> str | None:
        """The value of one variable; None for an optional reference to nothing."""
        source = variable.get("valueFrom")
        if source is None:
            return str(variable.get("value", ""))
        if reference := source.get("fieldRef"):
            return self._field(variable["name"], reference["fieldPath"])
        for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
            if reference := source.get(key):
                found = (self._place.objects.files(kind, reference["name"]) or {}).get(reference["key"])
                if found is not None:
                    return found.decode()
                if reference.get("optional"):
                    return None
                raise LocalError(
                    f"variable {variable['name']}: {kind} {reference['name']!r} has no key {reference['key']!r}"
                )
        raise LocalError(f"variable {variable['name']}: a laptop cannot resolve {', '.join(source)}")

    def _field(self, variable: str, path: str) -> str:
        """The downward API."""
        plain = {
            "metadata.name": self.name,
            "metadata.namespace": self._place.namespace,
            "metadata.uid": self.uid,
            "spec.nodeName": platform.node(),
            "status.podIP": POD_IP,
            "status.hostIP": POD_IP,
        }
        if path in plain:
            return plain[path]
        for section in ("labels", "annotations"):
            prefix = f"metadata.{section}['"
            if path.startswith(prefix) and path.endswith("']"):
                key = path[len(prefix) : -2]
                fallback = self._metadata["annotations"].get(key, "")
                return str(self._metadata.get(section, {}).get(key, fallback))
        raise LocalError(f"variable {variable}: a laptop cannot resolve the field {path}")


def _claims(spec: Manifest, place: Place) -> dict[str, Path]:
    """Volumes that outlive the pod, and their directories."""
    return {
        volume["name"]: place.objects.claim(volume["persistentVolumeClaim"]["claimName"], own=place.own_claim)
        for volume in spec.get("volumes", ())
        if "persistentVolumeClaim" in volume
    }


def _roots(layout: PathLayout) -> list[str]:
    return [getattr(layout, f.name) for f in fields(layout) if f.name != "termination_log"]


def _condition(kind: str, status: bool) -> Manifest:
    return {"type": kind, "status": "True" if status else "False", "lastTransitionTime": now_text()}


def _empty(directory: Path) -> None:
    """A new memory volume: nothing of the last pod's is left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
