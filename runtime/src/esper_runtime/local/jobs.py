"""The part of the Job controller that a run needs: one pod at a time, replaced or judged when it ends."""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from esper_runtime.local.errors import LocalError
from esper_runtime.local.pod import LocalPod, Place
from esper_runtime.local.state import now_text

Manifest = dict[str, Any]

QUICK_END_S = 10.0
"""A pod that ended younger than this is replaced after a pause, from the second time on."""
MAX_PAUSE_S = 30.0


def failure_action(policy: Mapping[str, Any] | None, exit_codes: Mapping[str, int]) -> str:
    """Ignore, FailJob or Count, by the first rule of a podFailurePolicy that matches these exit codes."""
    for rule in (policy or {}).get("rules", ()):
        wanted = rule.get("onExitCodes")
        if wanted is None:
            continue
        only = wanted.get("containerName")
        for container, code in exit_codes.items():
            listed = code in wanted["values"]
            applies = only in (None, container) and code != 0
            if applies and listed == (wanted["operator"] == "In"):
                return str(rule["action"])
    return "Count"


class LocalJob:
    """A Job of one attempt. `on_pod` hears of every pod that begins or ends."""

    def __init__(
        self, manifest: Manifest, *, place: Place, changed: Callable[[], None], on_pod: Callable[[LocalPod, bool], None]
    ) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.uid = str(uuid.uuid4())
        self.deleting = False
        self.pod: LocalPod | None = None
        """The pod as it is, or as it ended."""
        self._manifest = manifest
        self._place = place
        self._changed = changed
        self._on_pod = on_pod
        self._created = now_text()
        self._conditions: list[Manifest] = []
        self._deleted = asyncio.Event()
        self._quick_ends = 0
        self._task = asyncio.create_task(self._run())

    def manifest(self) -> Manifest:
        """The Job as an object of the API."""
        metadata = {**self._manifest["metadata"], "uid": self.uid, "creationTimestamp": self._created}
        if self.deleting:
            metadata["deletionTimestamp"] = now_text()
        # There is no queue manager here, so nothing holds the Job back.
        spec = {**self._manifest["spec"], "suspend": False}
        return {**self._manifest, "metadata": metadata, "spec": spec, "status": {"conditions": list(self._conditions)}}

    def delete(self, *, grace_s: float | None) -> None:
        """Ends the pod and then the Job; done() tells when."""
        self.deleting = True
        self._deleted.set()
        if self.pod is not None:
            self.pod.delete(grace_s=grace_s)

    def done(self) -> bool:
        """Nothing runs any more."""
        return self._task.done()

    def raise_error(self) -> None:
        """LocalError when a pod could not be set up. Only once done()."""
        self._task.result()

    async def wait(self) -> None:
        """Until done(); raises LocalError when a pod could not be set up."""
        await self._task

    async def _run(self) -> None:
        template: Manifest = self._manifest["spec"]["template"]
        while not self.deleting and not self._conditions:
            pod = LocalPod(
                name=f"{self.name}-0-{uuid.uuid4().hex[:5]}",
                template=template,
                owner=self._owner(),
                place=self._place,
                changed=self._changed,
            )
            self.pod = pod
            began = asyncio.get_running_loop().time()
            self._on_pod(pod, True)
            try:
                await pod.run()
            finally:
                self._on_pod(pod, False)
            if not pod.deleting:
                self._judge(pod)
            self._changed()
            await self._pause(asyncio.get_running_loop().time() - began)

    async def _pause(self, lived_s: float) -> None:
        """Keeps a pod that ends at once from being replaced in a tight loop."""
        self._quick_ends = self._quick_ends + 1 if lived_s < QUICK_END_S else 0
        if self._quick_ends > 1 and not self._conditions:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._deleted.wait(), min(2.0**self._quick_ends, MAX_PAUSE_S))

    def _judge(self, pod: LocalPod) -> None:
        codes = pod.exit_codes()
        if codes and not any(codes.values()):
            self._conditions = [_condition("Complete", "CompletionsReached", "")]
            return
        action = failure_action(self._manifest["spec"].get("podFailurePolicy"), codes)
        if action == "Ignore":
            return
        shown = ", ".join(f"container {name} exited with {code}" for name, code in codes.items())
        reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
        self._conditions = [_condition("Failed", reason, f"pod {pod.name}: {shown}")]

    def _owner(self) -> Manifest:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def _condition(kind: str, reason: str, message: str) -> Manifest:
    return {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastTransitionTime": now_text(),
    }


class Jobs:
    """All Jobs of the run, by name."""

    def __init__(self, place: Place, *, changed: Callable[[], None], on_pod: Callable[[LocalPod, bool], None]) -> None:
        self._place = place
        self._changed = changed
        self._on_pod = on_pod
        self._jobs: dict[str, LocalJob] = {}

    def create(self, manifest: Manifest) -> None:
        """Starts a Job; one of the same name is left alone."""
        name = manifest["metadata"]["name"]
        if name in self._jobs:
            return
        unfinished = [job.name for job in self._jobs.values() if not job.done()]
        if unfinished:
            raise LocalError(f"job {name} would run beside {', '.join(unfinished)}: this is a bug, please report it")
        self._jobs[name] = LocalJob(manifest, place=self._place, changed=self._changed, on_pod=self._on_pod)

    def delete(self, uid: str, *, grace_s: float | None) -> None:
        for job in self._jobs.values():
            if job.uid == uid:
                job.delete(grace_s=grace_s)

    def collect(self) -> None:
        """Forgets deleted Jobs whose pods are gone. Raises what a Job's pod could not be set up for."""
        for name, job in list(self._jobs.items()):
            if job.done():
                job.raise_error()
                if job.deleting:
                    del self._jobs[name]

    def busy(self) -> bool:
        """A pod of some Job still lives."""
        return any(not job.done() for job in self._jobs.values())

    def manifests(self) -> list[Manifest]:
        return [job.manifest() for job in self._jobs.values()]

    def pods(self) -> list[LocalPod]:
        return [job.pod for job in self._jobs.values() if job.pod is not None]

    async def stop(self, *, grace_s: float | None = None) -> None:
        """Ends everything and waits for it."""
        for job in self._jobs.values():
            job.delete(grace_s=grace_s)
        for job in self._jobs.values():
            with contextlib.suppress(LocalError):
                await job.wait()
