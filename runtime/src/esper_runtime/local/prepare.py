"""From a manifest, or from what is stored, to a resource that may run: checks first, changes after."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper_leyline import labels
from esper_leyline.exitcodes import CliExit
from esper_leyline.phases import ConditionType, Phase
from esper_operator import observe
from esper_operator.model import Run, Settings

from esper_runtime.local.errors import LocalError, ManifestError, StateError
from esper_runtime.local.manifest import Documents
from esper_runtime.local.objects import Objects, missing_sources
from esper_runtime.local.state import Resource, StateDir, now_text

FINISHED = {Phase.SUCCEEDED: CliExit.SUCCEEDED, Phase.FAILED: CliExit.FAILED}


def check_settings() -> Settings:
    """What validation on this machine depends on: fault injection is allowed, images have no meaning."""
    return Settings(runtime_image="local", sidecar_image="local", fault_injection=True)


def checked(resource: Resource) -> Run:
    """The run with its defaults. ManifestError lists everything that is wrong with it."""
    run = observe.run(resource, check_settings())
    problems = [str(problem) for problem in run.problems]
    if run.spec.managed_by not in (None, labels.MANAGED_BY):
        problems.append(f"spec.managedBy: is {run.spec.managed_by!r}, another controller: remove it to run here")
    if problems:
        raise ManifestError(*problems)
    return run


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A stored resource, ready to be driven; or a finished one, with its exit code."""

    resource: Resource
    objects: Objects
    resumed: bool
    """The run was there before."""
    finished: CliExit | None = None


def prepare(state: StateDir, documents: Documents, mounts: Mapping[str, Path], *, fresh: bool = False) -> Prepared:
    """Stores the manifest's run, new or over an earlier one. The caller holds the runner lock.

    ManifestError or StateError leave the state as it was.
    """
    checked(documents.run)
    missing_directories = [
        f"--mount {name}: {path} is no directory" for name, path in mounts.items() if not path.is_dir()
    ]
    if missing_directories:
        raise ManifestError(*missing_directories)
    if fresh:
        state.clear()
    if not state.exists():
        resource = new_resource(documents.run)
        objects = _with_sources(state, documents, mounts, resource)
        state.write_new(resource)
        return Prepared(resource=resource, objects=objects, resumed=False)
    stored = _same_run(state, documents.run)
    objects = _with_sources(state, documents, mounts, stored)
    if (code := finished_code(stored)) is not None:
        return Prepared(resource=stored, objects=objects, resumed=True, finished=code)
    resource = _over(stored, documents.run)
    checked(resource)
    state.write_new(resource)
    return Prepared(resource=resource, objects=objects, resumed=True)


def prepare_stored(state: StateDir) -> Prepared:
    """The run as it is stored, for `esper resume`. The caller holds the runner lock."""
    stored = state.read()
    objects = Objects(state)
    if (code := finished_code(stored)) is not None:
        return Prepared(resource=stored, objects=objects, resumed=True, finished=code)
    resource = _left_behind(stored)
    checked(resource)
    state.write_new(resource)
    return Prepared(resource=resource, objects=objects, resumed=True)


def finished_code(resource: Resource) -> CliExit | None:
    """The exit code of a run that has reached its end."""
    phase = (resource.get("status") or {}).get("phase")
    return FINISHED.get(Phase(phase)) if phase in {str(p) for p in FINISHED} else None


def new_resource(run: Resource) -> Resource:
    """The resource as an API server would make it of the manifest: UID, generation, defaults."""
    given = run["metadata"]
    metadata: dict[str, Any] = {"name": given["name"], "namespace": given["namespace"]}
    for key in ("labels", "annotations"):
        if given.get(key):
            metadata[key] = given[key]
    metadata |= {
        "uid": str(uuid.uuid4()),
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": now_text(),
    }
    return {
        "apiVersion": labels.API_VERSION,
        "kind": labels.KIND,
        "metadata": metadata,
        "spec": checked(run).spec.to_dict(),
    }


def _with_sources(state: StateDir, documents: Documents, mounts: Mapping[str, Path], resource: Resource) -> Objects:
    name = resource["metadata"]["name"]
    own = (labels.config_map_name, labels.emergency_config_map_name, labels.keys_secret_name, labels.bus_secret_name)
    objects = Objects(state)
    objects.take(documents, mounts, reserved=[naming(name) for naming in own])
    missing = missing_sources(checked(documents.run).spec.to_dict(), objects)
    if missing:
        raise ManifestError(*missing)
    return objects


def _same_run(state: StateDir, run: Resource) -> Resource:
    stored = state.read()
    for key in ("namespace", "name"):
        if stored["metadata"].get(key) != run["metadata"][key]:
            raise StateError(
                f"{state.root}: holds run {stored['metadata'].get('namespace')}/{stored['metadata'].get('name')}: "
                "choose another directory with --state"
            )
    return stored


def _over(stored: Resource, run: Resource) -> Resource:
    """The stored run with the manifest's spec; the generation rises when that differs."""
    resource = _left_behind(stored)
    spec = checked(run).spec.to_dict()
    if spec != resource["spec"]:
        metadata = dict(resource["metadata"])
        metadata["generation"] = int(metadata.get("generation", 1)) + 1
        resource = {**resource, "metadata": metadata, "spec": spec}
    return resource


def _left_behind(stored: Resource) -> Resource:
    """Marks the attempt of a runner that was killed as over: its pod is gone with it, and the next one gets a number
    of its own. A run that was stopped in order says so itself."""
    status = dict(stored.get("status") or {})
    at_rest = any(
        condition.get("status") == "True"
        for condition in status.get("conditions", ())
        if condition.get("type") in (ConditionType.SUSPENDED, ConditionType.HALTED)
    )
    if not status.get("attempt") or at_rest or status.get("nextAttemptTime"):
        return stored
    return {**stored, "status": {**status, "nextAttemptTime": now_text()}}


def resume_uid(resource: Resource, state: StateDir) -> str | None:
    """UID behind checkpoint.resumeFrom.runName: a run of that name beside this one, or the owner of the same claim.

    Its directory is linked into this run's checkpoint volume, where the trainer looks for it.
    """
    source = resource["spec"]["checkpoint"].get("resumeFrom")
    if source is None:
        return None
    other = StateDir(state.root.parent / source["runName"])
    if not other.exists():
        raise LocalError(
            f"spec.checkpoint.resumeFrom.runName: no run {source['runName']!r} below {state.root.parent}: "
            "run it first, or remove resumeFrom"
        )
    uid = str(other.read()["metadata"]["uid"])
    link = state.checkpoints / uid
    if not link.exists():
        link.symlink_to(other.checkpoints / uid, target_is_directory=True)
    return uid
