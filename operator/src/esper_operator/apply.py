"""Carries a Plan out, in a fixed order: children, signal, deletions, Job. Every step may be repeated.

A child is written only when it is not already what it should be. What we wrote is remembered by a digest, in memory
and in an annotation of the object; so neither a reconcile nor a restarted operator writes anything when nothing
changed. Nothing that belongs to somebody else is ever touched.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from esper_leyline.labels import APPLIED_HASH, CONFIG_HASH, KEY_GENERATION, KIND

from esper_operator.kube.api import JOBS, PODS, RUNS, KubeApi, Object, Resource, controller_uid, resource_of
from esper_operator.kube.errors import AlreadyExists, Conflict, Forbidden, Invalid, KubeError, NotFound
from esper_operator.model import Applied, Child, Deletion, Observation, Plan, Pod, Run, SignalRecord
from esper_operator.signals import Signals

logger = logging.getLogger(__name__)

MAX_REFUSAL = 1_024

ChildKey = tuple[str, str]
"""(kind, name)"""


class Refused(Exception):
    """The API server will not take an object of this run as things are; `str()` is for the user."""


class Occupied(Exception):
    """An object of an earlier run of this name is on its way out; `str()` is for the user."""


class Applier:
    def __init__(self, api: KubeApi, signals: Signals, *, on_job: Callable[[Object], None]) -> None:
        """`on_job` learns each Job as the server has stored it."""
        self._api = api
        self._on_job = on_job
        self._signals = signals
        self._written: dict[str, dict[ChildKey, str]] = {}
        """Digest of each child as last written or found, by run UID."""

        self._pods: dict[str, frozenset[str]] = {}
        """UIDs of the pods last seen of the newest Job, by run UID; nothing until its first pod is there."""

    def forget(self, uid: str) -> None:
        self._written.pop(uid, None)
        self._pods.pop(uid, None)

    def doubt(self, uid: str) -> None:
        """Looks at the children again at the next chance: somebody may have changed or deleted them."""
        self._written.pop(uid, None)

    async def apply(self, seen: Observation, plan: Plan) -> Applied:
        """KubeError when something should be tried again. What the server refused for good is in the result."""
        if self._needed(seen, plan):
            self.doubt(seen.run.uid)
        refused = waiting = ""
        failure: KubeError | None = None
        try:
            await _together(self._child(seen.run, child) for child in plan.children)
        except Refused as error:
            refused = str(error)
        except Occupied as error:
            waiting = str(error)
        except KubeError as error:
            failure = error
        record: SignalRecord | None = None
        try:
            record = await self._signal(seen, plan)  # whatever became of the children: somebody wants to stop
        except (Forbidden, Invalid) as error:  # the status goes on, so that a stop can fall back on a deletion
            logger.error("%s: the emergency signal could not be put on record: %s", seen.run.key, error)
            refused = refused or f"the emergency signal could not be put on record: {error}"
        except KubeError as error:
            failure = failure or error  # a deletion stops too
        await _together(self._delete(seen, deletion) for deletion in plan.deletions)
        if failure is not None:
            raise failure
        if plan.touch_pods is not None:
            await self._touch(seen.pods, plan.touch_pods)
        if plan.job is not None and not refused and not waiting:
            try:
                await self._job(seen.run, plan.job)
            except Refused as error:
                refused = str(error)
            except Occupied as error:
                waiting = str(error)
        return Applied(signal=record, refused=refused[:MAX_REFUSAL], waiting=waiting)

    # --- children ---

    def _needed(self, seen: Observation, plan: Plan) -> bool:
        """A pod is about to mount the children: that of a new Job, or one that replaces another."""
        uid = seen.run.uid
        before, pods = self._pods.get(uid), frozenset(pod.uid for pod in seen.pods)
        if plan.job is not None:
            self._pods.pop(uid, None)
            return True
        if pods:
            self._pods[uid] = pods
        return before is not None and not pods <= before

    async def _child(self, run: Run, child: Child) -> None:
        resource, manifest = resource_of(child.manifest), child.manifest
        key: ChildKey = (resource.kind, manifest["metadata"]["name"])
        digest = _digest(manifest)
        written = self._written.setdefault(run.uid, {})
        known = written.get(key)
        if known == digest or (known is not None and child.create_only):
            return
        try:
            if known is not None or not await self._found(run, resource, child, digest):
                await self._write(run, resource, child, digest)
        except (Forbidden, Invalid) as error:
            raise Refused(f"{resource.kind} {key[1]}: {error}") from error
        written[key] = digest

    async def _found(self, run: Run, resource: Resource, child: Child, digest: str) -> bool:
        """Whether the server has it as it should be. Refused when it is somebody else's."""
        manifest = child.manifest
        metadata = manifest["metadata"]
        if child.create_only and run.status.observed_generation is None:
            return False  # a new run: creating it is the quickest way to find out
        try:
            live = await self._api.get(resource, metadata["name"], namespace=metadata["namespace"])
        except NotFound:
            return False
        _check_owner(run, resource, manifest, live)
        if child.create_only:
            return not _outdated(child, live)
        annotations = live["metadata"].get("annotations") or {}
        return annotations.get(APPLIED_HASH) == digest and _same_data(manifest, live)

    async def _write(self, run: Run, resource: Resource, child: Child, digest: str) -> None:
        if not child.create_only:
            await self._api.apply(resource, _marked(child.manifest, digest))
            return
        try:
            await self._api.create(resource, child.manifest)
        except AlreadyExists:
            metadata = child.manifest["metadata"]
            live = await self._api.get(resource, metadata["name"], namespace=metadata["namespace"])
            _check_owner(run, resource, child.manifest, live)
            if _outdated(child, live):
                logger.info("%s: %s gets keys of generation %d", run.key, metadata["name"], child.key_generation)
                await self._api.apply(resource, child.manifest)

    # --- the rest of the plan ---

    async def _signal(self, seen: Observation, plan: Plan) -> SignalRecord | None:
        if plan.signal is None:
            await self._signals.finish(seen.run, seen.pods)
            return None
        return await self._signals.send(seen.run, plan.signal, seen.pods)

    async def _delete(self, seen: Observation, deletion: Deletion) -> None:
        namespace = seen.run.key.namespace
        if deletion.kind == KIND:
            await self._remove(RUNS, deletion.name, namespace, deletion.uid)
            return
        # In the foreground, so that the Job is there for as long as a pod of it is.
        await self._remove(JOBS, deletion.name, namespace, deletion.uid, foreground=True)
        if deletion.grace_seconds is not None:
            own = [pod for pod in seen.pods if pod.job_uid == deletion.uid]
            await _together(self._remove(PODS, p.name, namespace, p.uid, deletion.grace_seconds) for p in own)

    async def _remove(
        self,
        resource: Resource,
        name: str,
        namespace: str,
        uid: str,
        grace_seconds: int | None = None,
        *,
        foreground: bool = False,
    ) -> None:
        try:
            lingering = await self._api.delete(
                resource, name, namespace=namespace, uid=uid, grace_seconds=grace_seconds, foreground=foreground
            )
        except (NotFound, Conflict):
            return  # that very object is gone
        if lingering is not None and resource is JOBS:
            self._on_job(lingering)

    async def _touch(self, pods: Iterable[Pod], value: str) -> None:
        """Lets the kubelet refresh the mounts of pods that run with an older configuration."""
        stale = [p for p in pods if p.config_hash not in ("", value) and p.phase == "Running" and not p.deleting]
        body = {"metadata": {"annotations": {CONFIG_HASH: value}}}
        await _together(self._patch_pod(pod, body) for pod in stale)

    async def _patch_pod(self, pod: Pod, body: Object) -> None:
        try:
            await self._api.patch(PODS, pod.name, namespace=pod.namespace, body=body)
        except NotFound:
            return

    async def _job(self, run: Run, manifest: Object) -> None:
        """Creates the attempt's Job."""
        name = manifest["metadata"]["name"]
        try:
            self._on_job(await self._api.create(JOBS, manifest))
        except AlreadyExists:
            live = await self._api.get(JOBS, name, namespace=manifest["metadata"]["namespace"])
            _check_owner(run, JOBS, manifest, live)
            self._on_job(live)
        except (Forbidden, Invalid) as error:
            raise Refused(f"Job {name}: {error}") from error


async def _together(calls: Iterable[Awaitable[Any]]) -> None:
    """All of them at once; then the first error, what the user should know before anything else."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    errors.sort(key=lambda error: (not isinstance(error, Refused), not isinstance(error, Occupied)))
    if errors:
        raise errors[0]


def _check_owner(run: Run, resource: Resource, wanted: Object, live: Object) -> None:
    """An object that we would own must be ours already; one that outlives its run (a kept claim) may be anybody's."""
    if not controller_uid(wanted) or controller_uid(live) == run.uid:
        return
    name = live["metadata"]["name"]
    owners = live["metadata"].get("ownerReferences") or ()
    if any(owner.get("kind") == KIND and owner.get("name") == run.key.name for owner in owners):
        raise Occupied(f"waiting until {resource.kind} {name} of the earlier run of this name is gone")
    raise Refused(f"{resource.kind} {name}: it exists and does not belong to this run: delete it, or rename the run")


def _outdated(child: Child, live: Object) -> bool:
    """Keys that are newer than ours stay: another operator has gone ahead."""
    found = (live["metadata"].get("annotations") or {}).get(KEY_GENERATION, "1")
    return child.key_generation > (int(found) if found.isdecimal() else 0)


def _same_data(wanted: Object, live: Object) -> bool:
    """Plain string maps must still be what they were; all else is covered by the digest."""
    return all(live.get(part) == wanted[part] for part in ("data", "stringData") if part in wanted and part in live)


def _digest(manifest: Object) -> str:
    return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _marked(manifest: Object, digest: str) -> Object:
    metadata = manifest["metadata"]
    annotations = {**(metadata.get("annotations") or {}), APPLIED_HASH: digest}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
