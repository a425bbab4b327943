"""The loop: one consistent look at the run, the operator's decision, its execution, one status write.

The operator's worker does the same against an API server. Everything that decides is the operator's own code
(`observe`, `decide`, `next_status`, `Intake`, `Signals`); here are only the hands.
"""

import asyncio
import contextlib
import errno
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from esper_leyline import labels
from esper_leyline.exitcodes import CliExit
from esper_leyline.incidents import FIELD
from esper_leyline.phases import EmergencyStop, Phase
from esper_operator import observe
from esper_operator.decide import decide
from esper_operator.kube.errors import KubeError
from esper_operator.model import Applied, Child, Claim, Observation, Plan, ResumeSource, Run, Settings, StatusChange
from esper_operator.reports import Intake
from esper_operator.signals import Signals
from esper_operator.status import next_status

from esper_runtime.local.api import merge
from esper_runtime.local.jobs import Jobs
from esper_runtime.local.objects import Objects
from esper_runtime.local.state import Resource, StateDir

LOOK_EVERY_S = 0.1
"""How soon a changed resource.json is noticed."""
MIN_PAUSE_S = 0.01
MAX_PAUSE_S = 30.0
RETRY_S = 1.0
"""Pause before something is written again that could not be."""
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM})
"""Errors of a write that may go away again: a full disk does not end training."""
SAVING = "stopping: the trainer saves a checkpoint first; Ctrl-C once more stops at once, without saving"

Translate = Callable[[Resource], Resource]
OnChange = Callable[[Resource], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hands:
    """What a decision is carried out with."""

    state: StateDir
    objects: Objects
    jobs: Jobs
    intake: Intake
    signals: Signals
    settle: Callable[[], Awaitable[None]]
    """Waits until the reports of a pod that has ended are here."""


class Runner:
    """Drives one run to an end that `esper run` can report."""

    def __init__(
        self,
        hands: Hands,
        settings: Settings,
        *,
        translate: Translate,
        on_change: OnChange,
        resume_uid: str | None = None,
        stay_halted: bool = False,
        say: Callable[[str], None] = lambda _: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`translate` gives the resource with this machine's paths in it; `on_change` hears of every new status, `say`
        of what a person should know besides."""
        self._hands = hands
        self._settings = settings
        self._translate = translate
        self._on_change = on_change
        self._resume_uid = resume_uid
        self._stay_halted = stay_halted
        self._say = say
        self._now = now
        self._trouble = ""
        self._dirty = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """Something changed: look again at once."""
        self._dirty.set()

    def stop(self) -> None:
        """Asks for a checkpoint and an end; the second call kills."""
        if self._stopping:
            self._say("stopping at once")
            for pod in self._hands.jobs.pods():
                pod.kill()
        elif self._hands.jobs.busy():
            self._say(SAVING)
        self._stopping = True
        self.wake()

    async def run(self) -> CliExit:
        """Until the run is finished, halted (unless it shall stay), or stopped and at rest."""
        watching = asyncio.create_task(self._watch_resource())
        try:
            while True:
                self._dirty.clear()
                self._hands.jobs.collect()
                try:
                    change, plan = await self._reconcile()
                except OSError as error:
                    if self._gives_up(error):
                        return CliExit.INTERRUPTED
                    await self._pause(RETRY_S)
                    continue
                self._trouble = ""
                end = self._end(change.status.phase)
                if end is not None and not change.changed and plan.requeue_after_s != 0:
                    return end
                await self._pause(0.0 if change.changed else plan.requeue_after_s)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    def _gives_up(self, error: OSError) -> bool:
        """After a write that failed. Says so once; raises what will not pass. True when only that write is left."""
        if error.errno not in _PASSING:
            raise error
        trouble = f"{error.filename or self._hands.state.root}: {error.strerror}"
        if trouble != self._trouble:
            self._say(f"the state of the run cannot be written: {trouble}; training goes on: free some space")
        self._trouble = trouble
        return self._stopping and not self._hands.jobs.busy()

    async def _reconcile(self) -> tuple[StatusChange, Plan]:
        seen = await self._observe()
        plan = decide(seen)
        applied = await self._apply(plan, seen)
        change = next_status(seen, plan, applied)
        self._store(seen.run, change)
        return change, plan

    async def _observe(self) -> Observation:
        hands = self._hands
        raw = self._effective(hands.state.read())
        run = observe.run(raw, self._settings)
        observed = run.status.observed_report
        hands.intake.observe(run.uid, run.key, (observed.attempt, observed.seq) if observed else (0, 0))
        jobs = [job for m in hands.jobs.manifests() if (job := observe.job(m)) is not None]
        pods = [pod for p in hands.jobs.pods() if (pod := observe.pod(p.manifest())) is not None]
        own_jobs, own_pods = observe.children_of(run, jobs, pods)
        if any(pod.phase in ("Succeeded", "Failed") for pod in own_pods):
            await hands.settle()
        return Observation(
            run=run,
            now=self._now(),
            settings=self._settings,
            jobs=own_jobs,
            pods=own_pods,
            claim=Claim(name=labels.claim_name(run.key.name), phase="Bound"),
            reports=hands.intake.of(run.uid),
            report_age_s=hands.intake.age_s(run.uid, max(run.status.attempt, own_jobs[-1].attempt if own_jobs else 0)),
            report_cursor=hands.intake.cursor(run.uid),
            signal=await hands.signals.last(run),
            resume=None if self._resume_uid is None else ResumeSource(uid=self._resume_uid),
        )

    def _effective(self, resource: Resource) -> Resource:
        """The resource as the operator's code is to see it: with this machine's paths, and suspended while the user
        wants an end. Neither is ever stored."""
        resource = self._translate(resource)
        if not self._stopping:
            return resource
        spec = {**resource["spec"], "suspend": True}
        if spec.get("emergencyStop") == EmergencyStop.FREEZE:
            spec["emergencyStop"] = EmergencyStop.NONE  # its pod is asked to save and to end
        return {**resource, "spec": spec}

    async def _apply(self, plan: Plan, seen: Observation) -> Applied:
        """Children, signal, deletions, job: the order that a Plan demands."""
        hands = self._hands
        for child in plan.children:
            self._put(child)
        record = None
        try:
            if plan.signal is not None:
                record = await hands.signals.send(seen.run, plan.signal, seen.pods)
            else:
                await hands.signals.finish(seen.run, seen.pods)
        except KubeError as error:
            return Applied(refused=str(error))
        for deletion in plan.deletions:
            if deletion.kind == "Job":
                grace = deletion.grace_seconds
                hands.jobs.delete(deletion.uid, grace_s=None if grace is None else float(grace))
        if plan.job is not None:
            hands.jobs.create(plan.job)
        if plan.touch_pods is not None:
            self.refresh_pods()
        return Applied(signal=record)

    def _put(self, child: Child) -> None:
        """ConfigMaps and Secrets are kept; what else a cluster needs (Service, claim) has no meaning here."""
        manifest = child.manifest
        if manifest["kind"] not in ("ConfigMap", "Secret"):
            return
        known = self._hands.objects.get(manifest["kind"], manifest["metadata"]["name"])
        if known is None:
            self._hands.objects.put(manifest)
        elif not child.create_only:
            merged = merge(known, manifest)
            if merged != known:
                self._hands.objects.put(merged)
                self.refresh_pods()

    def refresh_pods(self) -> None:
        """Shows changed ConfigMaps and Secrets in the volumes of living pods."""
        for pod in self._hands.jobs.pods():
            pod.refresh()

    def _store(self, run: Run, change: StatusChange) -> None:
        if not change.changed:
            if change.folded is not None:
                self._hands.intake.fold(run.uid, change.folded)
            return
        resource = self._hands.state.write_status(change.status.to_dict(), durable=change.urgent)
        self._on_change(resource)
        at = self._now().isoformat(timespec="milliseconds")
        self._hands.state.add_events(
            [
                json.dumps(
                    {
                        "time": at,
                        "type": "Warning" if event.warning else "Normal",
                        "reason": event.reason,
                        "message": event.message,
                        **({FIELD: event.incident} if event.incident else {}),
                    }
                )
                for event in change.events
            ]
        )

    def _end(self, phase: Phase | None) -> CliExit | None:
        """The exit code when nothing is left to do for this process."""
        if self._hands.jobs.busy():
            return None
        if phase is Phase.SUCCEEDED:
            return CliExit.SUCCEEDED
        if phase is Phase.FAILED:
            return CliExit.FAILED
        if phase is Phase.HALTED and (self._stopping or not self._stay_halted):
            return CliExit.HALTED
        if self._stopping:
            return CliExit.INTERRUPTED
        return None

    async def _pause(self, after_s: float | None) -> None:
        limit = MAX_PAUSE_S if after_s is None else min(after_s, MAX_PAUSE_S)
        await asyncio.sleep(MIN_PAUSE_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._dirty.wait(), limit)

    async def _watch_resource(self) -> None:
        """Other commands change the spec in the file."""
        seen = self._hands.state.modified_ns()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if (now := self._hands.state.modified_ns()) != seen:
                seen = now
                self.wake()
