"""reconcile(key): observe, decide, apply, one status write, Events. The only place with side effects.

Facts are read from the caches at the start; a reconcile may run at any moment, twice, with stale reads. Errors decide
only when to look again. Progress is written at most every 10 s per run, and 20 times a second in all.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from esper_leyline.incidents import FIELD
from esper_leyline.labels import claim_name
from esper_leyline.reasons import RunReason

from esper_operator import observe
from esper_operator.apply import Applier
from esper_operator.decide import decide
from esper_operator.kube.api import CLAIMS, CONFIG_MAPS, RUNS, SECRETS, KubeApi, Object, Resource
from esper_operator.kube.errors import (
    Conflict,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    NotLeader,
    Throttled,
)
from esper_operator.kube.events import EventPoster, Subject
from esper_operator.kube.informer import Informer
from esper_operator.logs import run_context
from esper_operator.metrics import Metrics
from esper_operator.model import (
    Applied,
    Broadcast,
    Claim,
    EventRecord,
    Job,
    Observation,
    Plan,
    Pod,
    ResumeSource,
    Run,
    RunKey,
    Secret,
    Settings,
    SignalRecord,
    StatusChange,
)
from esper_operator.queue import WorkQueue
from esper_operator.reports import Intake
from esper_operator.runs import RunCache
from esper_operator.signals import Signals
from esper_operator.status import next_status

logger = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 10.0
PROGRESS_SPACING_S = 0.05
"""Of all progress writes together: 20 a second."""
REFUSED_RETRY_S = 60.0
OCCUPIED_RETRY_S = 1.0
"""While objects of an earlier run of the same name go; nothing wakes the run when they are gone."""
STANDBY_RETRY_S = 1.0
MAX_QUICK_CONFLICTS = 3


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as it is told to this process; tests tell their own."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    monotonic: Callable[[], float] = time.monotonic


class ProgressPace:
    """When a run may write progress: 10 s after its last write, and in a slot of its own among all runs."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._wrote: dict[RunKey, float] = {}
        self._slots: dict[RunKey, float] = {}
        self._next_slot = float("-inf")

    def due_in_s(self, key: RunKey) -> float:
        """Without taking a slot."""
        due = max(self._slots.get(key, float("-inf")), self._wrote.get(key, float("-inf")) + PROGRESS_PERIOD_S)
        return max(0.0, due - self._monotonic())

    def reserve(self, key: RunKey) -> float:
        """0: write now. Otherwise the seconds until this run's slot, which is kept for it."""
        now = self._monotonic()
        slot = self._slots.get(key)
        if slot is None:
            slot = max(now, self._wrote.get(key, float("-inf")) + PROGRESS_PERIOD_S, self._next_slot)
            self._next_slot = slot + PROGRESS_SPACING_S
            self._slots[key] = slot
        return max(0.0, slot - now)

    def wrote(self, key: RunKey) -> None:
        self._wrote[key] = self._monotonic()
        self._slots.pop(key, None)

    def forget(self, key: RunKey) -> None:
        self._wrote.pop(key, None)
        self._slots.pop(key, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciler:
    """All that a reconcile reads and writes."""

    api: KubeApi
    settings: Settings
    clock: Clock
    queue: WorkQueue[RunKey]
    runs: RunCache
    jobs: Informer[Job]
    pods: Informer[Pod]
    broadcasts: Informer[Object]
    intake: Intake
    signals: Signals
    applier: Applier
    events: EventPoster
    pace: ProgressPace
    metrics: Metrics

    async def reconcile(self, key: RunKey) -> str:
        """Looks at one run and does what is to be done; the result is a word for metrics. KubeError: look again."""
        run = self.runs.get(key)
        if run is None:
            self.queue.forget(key)
            self.pace.forget(key)
            return "gone"
        run_context.set({"run": str(key), "uid": run.uid, "generation": run.generation})
        if self.signals.recording(run.uid):
            return "ok"  # the status speaks of a signal when it is on record; whoever records it wakes the run then
        seen = await self.look(run)
        plan = decide(seen)
        applied = await self.applier.apply(seen, plan)
        change = next_status(seen, plan, applied)
        self.note(plan, applied.signal)
        await self._say(run, change)
        self._look_again(key, plan, applied)
        return "refused" if applied.refused else "ok"

    def note(self, plan: Plan, signal: SignalRecord | None) -> None:
        """For people: that something was decided, and what was sent for it."""
        if plan.job is not None or plan.signal is not None or plan.deletions:
            told = {FIELD: signal.signal_id} if signal is not None else {}
            logger.info("%s: %s", plan.verdict.reason, plan.verdict.message, extra=told)
            self.metrics.count("esper_decisions_total", str(plan.verdict.reason))

    async def look(self, run: Run) -> Observation:
        """One consistent look at the run: caches, and what is not worth a cache."""
        seen = self.glance(run)
        return replace(
            seen,
            claim=await self._claim(run, seen.pods),
            secrets=await self._secrets(run, seen.jobs),
            signal=await self.signals.last(run) if seen.jobs or run.status.attempt else None,
        )

    def glance(self, run: Run) -> Observation:
        """What the caches say, at once: without the claim, the Secrets and the last signal."""
        key = run.key
        jobs, pods = observe.children_of(
            run, (entry.value for entry in self.jobs.of(key)), (entry.value for entry in self.pods.of(key))
        )
        resume = run.spec.checkpoint.resume_from
        return Observation(
            run=run,
            now=self.clock.now(),
            settings=self.settings,
            jobs=jobs,
            pods=pods,
            reports=self.intake.of(run.uid),
            report_age_s=self.intake.age_s(run.uid, run.status.attempt),
            report_cursor=self.intake.cursor(run.uid),
            broadcasts=self._broadcasts(run),
            claim_user=self.runs.senior_on_claim(key),
            resume=_source(self.runs.get(RunKey(key.namespace, resume.run_name))) if resume else None,
        )

    async def _claim(self, run: Run, pods: tuple[Pod, ...]) -> Claim | None:
        """Asked for only while a pod waits for a place: then it may be the reason."""
        if all(pod.node or pod.phase != "Pending" for pod in pods):
            return None
        name = run.spec.checkpoint.storage.claim_name or claim_name(run.key.name)
        return observe.claim(name, await self._found(CLAIMS, run, name))

    async def _secrets(self, run: Run, jobs: tuple[Job, ...]) -> tuple[Secret, ...]:
        """Asked for only before a Job is created: what a pod mounts cannot change after that."""
        names = {} if jobs else dict.fromkeys(name for _, name in observe.secrets_named(run.spec))
        return tuple([observe.secret(name, await self._found(SECRETS, run, name)) for name in names])

    async def _found(self, resource: Resource, run: Run, name: str) -> Object:
        """{} when it does not exist."""
        try:
            return await self.api.get(resource, name, namespace=run.key.namespace)
        except NotFound:
            return {}

    def _broadcasts(self, run: Run) -> tuple[Broadcast, ...]:
        found: list[Broadcast] = []
        invalid = 0
        for entry in self.broadcasts.entries():
            matching, problems = observe.broadcasts(entry.value, run)
            found += matching
            invalid += len(problems)
            subject = Subject(CONFIG_MAPS.api_version, CONFIG_MAPS.kind, entry.namespace, entry.name, entry.uid)
            for problem in problems:
                record = EventRecord(reason=RunReason.INVALID_SPEC, message=str(problem), warning=True)
                self.events.post(subject, record, moment=entry.version)
        self.metrics.gauge("esper_broadcasts_invalid", invalid)
        return tuple(found)

    async def _say(self, run: Run, change: StatusChange) -> None:
        """Writes the status when it says something new, and then, only then, the Events of it."""
        if not change.changed:
            if change.folded is not None:
                self.intake.fold(run.uid, change.folded)
        elif not change.urgent and (wait_s := self.pace.reserve(run.key)) > 0:
            self.queue.add_after(run.key, wait_s)
            return
        else:
            await self._write_status(run, change)
        moment = _moment(change)
        for record in change.events:
            if record.incident:
                logger.info("%s: %s", record.reason, record.message, extra={FIELD: record.incident})
            self.events.post(Subject.of(run), record, moment=moment)

    async def _write_status(self, run: Run, change: StatusChange) -> None:
        stored = await self.api.apply_status(
            RUNS,
            {
                "apiVersion": RUNS.api_version,
                "kind": RUNS.kind,
                "metadata": {
                    "namespace": run.key.namespace,
                    "name": run.key.name,
                    "uid": run.uid,
                    "resourceVersion": run.resource_version,
                },
                "status": change.status.to_dict(),
            },
        )
        self.pace.wrote(run.key)
        self.metrics.count("esper_status_writes_total", "transition" if change.urgent else "progress")
        self.runs.put(stored)

    def _look_again(self, key: RunKey, plan: Plan, applied: Applied) -> None:
        if applied.waiting:
            self.queue.add_after(key, OCCUPIED_RETRY_S)
        if applied.refused and plan.job is None:
            self.queue.add_after(key, REFUSED_RETRY_S)
        if plan.requeue_after_s is not None:
            self.queue.add_after(key, plan.requeue_after_s)


def _moment(change: StatusChange) -> str:
    """Where in the run's life an Event belongs: the same thing may be said again only later."""
    status = change.status
    seq = status.observed_report.seq if status.observed_report else 0
    last = status.history[-1].time.isoformat() if status.history else ""
    return f"{status.attempt}/{seq}/{last}"


class Workers:
    """Takes keys from the queue and sees to it that every error leads to another look, sooner or later."""

    def __init__(self, reconciler: Reconciler, *, count: int = 16, jitter: Callable[[], float] = random.random) -> None:
        self._reconciler = reconciler
        self._queue = reconciler.queue
        self._count = count
        self._jitter = jitter
        self._conflicts: dict[RunKey, int] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._work(), name=f"worker {number}")

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self.one(key)
            finally:
                self._queue.done(key)

    async def one(self, key: RunKey) -> str:
        """One reconcile with its consequences; returns the result's name."""
        metrics, started = self._reconciler.metrics, self._reconciler.clock.monotonic()
        try:
            result = await self._reconciler.reconcile(key)
            self._queue.succeeded(key)
            self._conflicts.pop(key, None)
        except Conflict as error:
            result = await self._conflict(key, error)
        except KubeError as error:
            result = self._later(key, error)
        except Exception:  # broad: a bug in one run must not stop the others; logged, counted, tried again later
            logger.exception("a bug: the reconcile of %s failed", key)
            self._queue.retry(key)
            result = "bug"
        metrics.count("esper_reconcile_total", result)
        metrics.observe("esper_reconcile_seconds", self._reconciler.clock.monotonic() - started)
        return result

    async def _conflict(self, key: RunKey, error: Conflict) -> str:
        """Somebody wrote in between: read the run again and decide again at once, but not for ever."""
        count = self._conflicts[key] = self._conflicts.get(key, 0) + 1
        logger.info("%s was changed meanwhile: %s", key, error)
        try:
            await self._reconciler.runs.refresh(self._reconciler.api, key)
        except KubeError as failure:
            return self._later(key, failure)
        if count <= MAX_QUICK_CONFLICTS:
            self._queue.add(key)
        else:
            self._queue.retry(key)
        return "conflict"

    def _later(self, key: RunKey, error: KubeError) -> str:
        if isinstance(error, Throttled):
            self._queue.add_after(key, error.retry_after_s * (1 + 0.2 * self._jitter()))
            return "throttled"
        if isinstance(error, NotLeader):
            self._queue.add_after(key, STANDBY_RETRY_S)
            return "not_leader"
        if isinstance(error, Forbidden | Invalid):
            logger.error("%s: the API server refused: %s", key, error)
            self._queue.add_after(key, REFUSED_RETRY_S)
            return "invalid"
        delay = self._queue.retry(key)
        logger.warning("%s: %s; again in %.1f s", key, error, delay)
        return "transient"


def _source(run: Run | None) -> ResumeSource | None:
    """Where the checkpoints of the run to resume from lie."""
    if run is None:
        return None
    storage = run.spec.checkpoint.storage
    return ResumeSource(uid=run.uid, claim=storage.claim_name or claim_name(run.key.name), sub_path=storage.sub_path)
