"""The operator's parts, put together: everything but Kopf, the Lease, HTTP and the process.

`main` gives it real clients; tests give it `testing.fakeapi.FakeApi`.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from esper_leyline.labels import EMERGENCY_CONFIG_MAP, FIELD_MANAGER
from esper_leyline.phases import EmergencyStop
from esper_leyline.reasons import RunReason

from esper_operator import observe
from esper_operator.alarm import Alarm
from esper_operator.apply import Applier
from esper_operator.bususers import BusUsers
from esper_operator.kube.api import CONFIG_MAPS, JOBS, PODS, FencedApi, KubeApi, Object, Resource
from esper_operator.kube.events import EventPoster, Subject
from esper_operator.kube.informer import Informer
from esper_operator.metrics import Metrics
from esper_operator.model import EventRecord, Job, Pod, RunKey, Settings
from esper_operator.queue import WorkQueue
from esper_operator.reports import Intake
from esper_operator.runs import FINISHED, RunCache
from esper_operator.signals import Publish, Signals
from esper_operator.worker import Clock, ProgressPace, Reconciler, Workers

T = TypeVar("T")

RESYNC_S = 600.0
RESYNC_SPREAD_S = 60.0
EVENT_PATIENCE_S = 2.0
"""Each Event lets urgent runs go first for so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leadership:
    """What the rest needs to know of the Lease."""

    held: Callable[[], bool] = lambda: True
    term: Callable[[], int] = lambda: 1


@dataclass(kw_only=True, slots=True)
class Operator:
    """One operator. Its caches are filled on a standby too; `lead` and `resync` belong to the leader."""

    reconciler: Reconciler
    workers: Workers
    alarm: Alarm
    reads: KubeApi
    """Not fenced: a standby reads."""
    namespaces: tuple[str, ...]
    bus_users: BusUsers | None = None
    """None: runs share a user, or there is no Redis."""
    loaded: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> RunCache:
        return self.reconciler.runs

    @property
    def queue(self) -> WorkQueue[RunKey]:
        return self.reconciler.queue

    @property
    def intake(self) -> Intake:
        return self.reconciler.intake

    @property
    def events(self) -> EventPoster:
        return self.reconciler.events

    @property
    def informers(self) -> tuple[Informer[Job], Informer[Pod], Informer[Object]]:
        return self.reconciler.jobs, self.reconciler.pods, self.reconciler.broadcasts

    @property
    def warm(self) -> bool:
        """All caches are filled: decisions may be made."""
        return self.loaded.is_set() and all(informer.synced for informer in self.informers)

    async def lead(self) -> None:
        """All that decides and acts; endless."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.alarm.run(), name="alarm")
            group.create_task(self.workers.run(), name="workers")

    async def fill(self) -> None:
        """Fills the cache of runs; the informers fill themselves once they run."""
        await self.runs.load(self.reads, self.namespaces)
        self.loaded.set()

    async def wait_warm(self) -> None:
        await self.loaded.wait()
        for informer in self.informers:
            await informer.wait_synced()

    async def resync(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Looks at everything again now and then: insurance against whatever was missed."""
        while True:
            await sleep(RESYNC_S * random.uniform(0.8, 1.2))
            await self.runs.resync(self.reads, self.namespaces)
            for key in self.runs:
                uid = self.runs.uid_of(key)
                if uid is not None:
                    self.reconciler.applier.doubt(uid)
                self.queue.add_after(key, random.uniform(0, RESYNC_SPREAD_S))

    def live_pods(self) -> Iterator[Pod]:
        return (entry.value for entry in self.reconciler.pods.entries())


def assemble(
    api: KubeApi,
    *,
    settings: Settings,
    namespaces: tuple[str, ...] = (),
    own_namespace: str = "default",
    emergency_config_map: str = EMERGENCY_CONFIG_MAP,
    instance: str = FIELD_MANAGER,
    leadership: Leadership | None = None,
    publish: Publish | None = None,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    workers: int = 16,
) -> Operator:
    """The parts of one operator, wired. Nothing runs yet."""
    leadership, clock, metrics = leadership or Leadership(), clock or Clock(), metrics or Metrics()
    fenced = FencedApi(api, leadership.held)
    queue: WorkQueue[RunKey] = WorkQueue()
    pace = ProgressPace(clock.monotonic)
    events = EventPoster(
        fenced,
        instance=instance,
        now=clock.now,
        monotonic=clock.monotonic,
        on_outcome=lambda outcome: metrics.count("esper_events_total", outcome),
        turn=lambda: queue.wait_calm(EVENT_PATIENCE_S),
    )

    def on_forged(key: RunKey, reason: str) -> None:
        run = runs.get(key)
        if run is not None and leadership.held():
            events.post(Subject.of(run), _forged(reason), moment="")

    def on_denied(key: RunKey, why: str) -> None:
        run = runs.get(key)
        if run is not None:
            events.post(Subject.of(run), _denied(why), moment="")

    intake = _intake(settings, clock, metrics, queue, pace, on_forged)
    signals = _signals(fenced, settings, clock, metrics, leadership, publish, intake)
    jobs = _owned(api, JOBS, observe.job, namespaces, queue, metrics)
    pods = _owned(api, PODS, observe.pod, namespaces, queue, metrics)
    applier = Applier(fenced, signals, on_job=jobs.learn)
    users = _users(settings, clock, metrics, leadership, on_denied) if settings.bus_per_run_users else None
    runs = _runs(settings, queue, pace, intake, signals, applier, users, clock)
    broadcasts = _broadcasts(api, own_namespace, emergency_config_map, lambda: alarm.ring(runs), metrics)
    reconciler = Reconciler(
        api=fenced,
        settings=settings,
        clock=clock,
        queue=queue,
        runs=runs,
        jobs=jobs,
        pods=pods,
        broadcasts=broadcasts,
        intake=intake,
        signals=signals,
        applier=applier,
        events=events,
        pace=pace,
        metrics=metrics,
    )
    alarm = Alarm(reconciler)
    return Operator(
        reconciler=reconciler,
        workers=Workers(reconciler, count=workers),
        alarm=alarm,
        reads=api,
        namespaces=namespaces,
        bus_users=users,
    )


def _intake(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    queue: WorkQueue[RunKey],
    pace: ProgressPace,
    on_forged: Callable[[RunKey, str], None],
) -> Intake:
    def on_report(key: RunKey, urgent: bool) -> None:
        if urgent:
            queue.add(key, urgent=True)
        else:
            queue.add_after(key, pace.due_in_s(key))

    return Intake(
        seed=settings.key_seed,
        generation=settings.key_generation,
        monotonic=clock.monotonic,
        on_report=on_report,
        on_outcome=lambda way, outcome: metrics.count("esper_reports_total", way, outcome),
        on_forged=on_forged,
    )


def _forged(reason: str) -> EventRecord:
    """Always the same words: one Event however often it happens."""
    message = f"a report in the name of this run was ignored: {reason}; find out who else can write to Redis"
    return EventRecord(reason=RunReason.REPORT_REJECTED, message=message, warning=True)


def _denied(why: str) -> EventRecord:
    message = (
        f"Redis does not let the operator make this run's user, so its pods do without Redis: {why}; give the "
        "operator's user ACL rights, or share one user with redis.perRunUsers=false"
    )
    return EventRecord(reason=RunReason.BUS_UNAVAILABLE, message=message, warning=True)


def _users(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    leadership: Leadership,
    on_denied: Callable[[RunKey, str], None],
) -> BusUsers:
    return BusUsers(
        seed=settings.key_seed,
        generation=settings.key_generation,
        held=leadership.held,
        monotonic=clock.monotonic,
        metrics=metrics,
        on_denied=on_denied,
    )


def _signals(
    api: KubeApi,
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    leadership: Leadership,
    publish: Publish | None,
    intake: Intake,
) -> Signals:
    return Signals(
        api,
        seed=settings.key_seed,
        generation=settings.key_generation,
        term=leadership.term,
        now=clock.now,
        monotonic=clock.monotonic,
        publish=publish,
        answered=intake.answered,
        on_leg=metrics.leg,
    )


def _owned(
    api: KubeApi,
    resource: Resource,
    project: Callable[[Object], T | None],
    namespaces: tuple[str, ...],
    queue: WorkQueue[RunKey],
    metrics: Metrics,
) -> Informer[T]:
    """Of a kind whose objects belong to runs; each change wakes the run."""

    def on_change(key: RunKey | None) -> None:
        if key is not None:
            queue.add(key)

    return Informer(
        api,
        resource,
        project=project,
        on_change=on_change,
        namespaces=namespaces,
        on_event=lambda kind, event: metrics.count("esper_informer_events_total", kind, event),
    )


def _broadcasts(
    api: KubeApi, namespace: str, name: str, on_change: Callable[[], None], metrics: Metrics
) -> Informer[Object]:
    """Of the one ConfigMap with broadcasts; each change may concern every run."""
    return Informer(
        api,
        CONFIG_MAPS,
        project=_data,
        on_change=lambda _: on_change(),
        namespaces=(namespace,),
        selector="",
        field_selector=f"metadata.name={name}",
        on_event=lambda kind, event: metrics.count("esper_informer_events_total", kind, event),
    )


def _runs(
    settings: Settings,
    queue: WorkQueue[RunKey],
    pace: ProgressPace,
    intake: Intake,
    signals: Signals,
    applier: Applier,
    users: BusUsers | None,
    clock: Clock,
) -> RunCache:
    def on_change(key: RunKey) -> None:
        run = runs.get(key)
        if run is not None:
            observed = run.status.observed_report
            intake.observe(run.uid, key, (observed.attempt, observed.seq) if observed else (0, 0))
            if users is not None and run.status.phase in FINISHED:
                users.over(run.uid)
            elif users is not None:
                users.want(run.uid, key)
        queue.add(key, urgent=run is not None and run.spec.emergency_stop is not EmergencyStop.NONE)

    def on_gone(key: RunKey, uid: str) -> None:
        intake.forget(uid)
        signals.forget(uid)
        applier.forget(uid)
        if users is not None:
            users.forget(uid)
        pace.forget(key)
        queue.add(key)  # its worker finds it gone and drops what the queue still has of it

    runs = RunCache(
        observe=lambda raw: observe.run(raw, settings),
        on_change=on_change,
        on_gone=on_gone,
        monotonic=clock.monotonic,
    )
    return runs


def _data(raw: Object) -> Object:
    return {"data": raw.get("data") or {}}
