"""The operator's process: settings, clients, threads, root tasks, signals, exit codes.

0: stopped by SIGTERM or SIGINT. 1: a part of it ended that never should, or the Lease is lost. 2: the settings or the
cluster cannot be used.
"""

import asyncio
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
from esper_leyline.oona import REPORTS, Oona, OonaUnavailable
from kubernetes.aio.config import ConfigException
from prometheus_client import disable_created_metrics

from esper_operator.assembly import Leadership, Operator, assemble
from esper_operator.bususers import BusUsers
from esper_operator.fabric import Fabric
from esper_operator.http import Check, application, at_most, serve
from esper_operator.keys import GenerationError, SeedError, load_or_make
from esper_operator.kube.client import Credentials, RestApi
from esper_operator.kube.errors import KubeError, NotFound, Throttled, Transient
from esper_operator.kube.lease import Elector, LeaseThread, identity_in
from esper_operator.logs import configure
from esper_operator.metrics import Metrics
from esper_operator.pull import HttpFetch, Puller, connections
from esper_operator.settings import OperatorSettings, SettingsError
from esper_operator.watch import KopfThread, RunFeed

logger = logging.getLogger("esper_operator")

OK, FAILED, UNUSABLE = 0, 1, 2
GRACE_S = 5.0
"""For reconciles that are under way when the process is asked to stop."""
MAX_SILENCE_S, MAX_QUEUE_AGE_S, MAX_WORK_S, MAX_LAG_S = 180.0, 120.0, 300.0, 5.0
MONITOR_S = 0.5
PHASES_EVERY = 10
SEED_RETRY_S = FILL_RETRY_S = 0.5
CATCH_UP_S = 10.0
"""For the reports in Redis: the stream is full with 10,000, which take about 2 s."""
MAX_REFUSALS = 60
"""Of the seed Secret at the start, in a row: rights may come a little later than the process, but not much."""


@dataclass(slots=True)
class Lag:
    """How late the event loop was lately."""

    seconds: float = 0.0


class Process:
    """All that lives as long as the process. `run` returns the exit code."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._lag = Lag()
        self._stop = asyncio.Event()
        self._pod = os.environ.get("POD_NAME", "")
        self._identity = identity_in(self._pod or socket.gethostname())
        self._live_checks: dict[str, Check] = {"loop": at_most(lambda: self._lag.seconds, MAX_LAG_S, "lag")}
        self._ready_checks: dict[str, Check] = {"caches": lambda: "not filled yet"}

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with AsyncExitStack() as stack:
            api = RestApi(await Credentials.load(), on_request=self._metrics.request)
            stack.push_async_callback(api.close)
            await self._serve(stack)
            oona = await self._oona(stack)
            lease = LeaseThread(self._elector)
            operator = await self._operator(api, oona, lease)
            if operator is None:
                return OK if self._stop.is_set() else UNUSABLE
            self._check(operator, lease)
            self._gauges(operator, lease, oona)
            return await self._live(stack, operator, lease, oona)

    # --- putting it together ---

    async def _oona(self, stack: AsyncExitStack) -> Oona | None:
        config = self._settings.bus()
        return await stack.enter_async_context(Oona(config)) if config else None

    async def _elector(self, on_acquired: Any) -> tuple[Elector, Any]:
        """Runs in the Lease's own loop, with a client of its own."""
        api = RestApi(await Credentials.load(), user_agent="esper-operator-lease")
        elector = Elector(
            api,
            namespace=self._settings.namespace,
            name=self._settings.lease_name,
            identity=self._identity,
            pod=self._pod,
            on_acquired=on_acquired,
        )
        return elector, api.close

    async def _operator(self, api: RestApi, oona: Oona | None, lease: LeaseThread) -> Operator | None:
        """None when the process was asked to stop, or the API server could not be used."""
        keys = await self._keys(api)
        if keys is None:
            return None
        self._metrics.gauge("esper_key_generation", keys[1])
        return assemble(
            api,
            settings=self._settings.core(*keys),
            namespaces=self._settings.watch_namespaces,
            own_namespace=self._settings.namespace,
            emergency_config_map=self._settings.emergency_config_map,
            instance=self._identity,
            leadership=Leadership(held=lambda: lease.held, term=lambda: lease.term),
            publish=oona.publish_signals if oona else None,
            metrics=self._metrics,
        )

    async def _keys(self, api: RestApi) -> tuple[bytes, int] | None:
        """The seed and the generation in force.

        Waits for an API server that is away however long: a process that ends would be started ever later.
        """
        refusals = 0
        while refusals < MAX_REFUSALS:
            try:
                return await load_or_make(
                    api,
                    namespace=self._settings.namespace,
                    name=self._settings.seed_secret,
                    generation=self._settings.key_generation,
                )
            except KubeError as error:
                logger.warning("the seed Secret cannot be read yet: %s", error)
                refusals = 0 if isinstance(error, Transient | Throttled) else refusals + 1
            try:
                async with asyncio.timeout(SEED_RETRY_S):
                    await self._stop.wait()
                return None
            except TimeoutError:
                continue
        logger.error("the API server does not let this process read its seed Secret; giving up")
        return None

    # --- what others ask ---

    async def _serve(self, stack: AsyncExitStack) -> None:
        """From the start, so that waiting for the API server does not look like being dead."""
        if self._settings.http_port:
            app = application(live=self._live_checks, ready=self._ready_checks, registry=self._metrics.registry)
            runner = await serve(app, self._settings.http_port)
            stack.push_async_callback(runner.cleanup)

    def _check(self, operator: Operator, lease: LeaseThread) -> None:
        queue = operator.queue
        self._live_checks |= {
            f"{informer.kind} informer": at_most(lambda i=informer: i.silent_s, MAX_SILENCE_S, "silent for")  # type: ignore[misc]
            for informer in operator.informers
        }
        self._live_checks |= {
            "queue": at_most(lambda: queue.oldest_s() if lease.held else 0.0, MAX_QUEUE_AGE_S, "oldest key waits"),
            "workers": at_most(queue.longest_work_s, MAX_WORK_S, "longest reconcile"),
        }
        self._ready_checks["caches"] = lambda: "" if operator.warm else "not filled yet"

    def _gauges(self, operator: Operator, lease: LeaseThread, oona: Oona | None) -> None:
        follow, queue = self._metrics.follow, operator.queue
        follow("esper_workqueue_depth", lambda: len(queue))
        follow("esper_workqueue_oldest_seconds", queue.oldest_s)
        follow("esper_workqueue_unfinished_work_seconds", queue.longest_work_s)
        follow("esper_leader", lambda: float(lease.held))
        follow("esper_bus_connected", lambda: float(oona is not None and oona.connected))
        follow("esper_loop_lag_seconds", lambda: self._lag.seconds)
        for informer in operator.informers:
            follow("esper_informer_objects", informer.__len__, informer.kind)
            follow("esper_informer_silent_seconds", lambda i=informer: i.silent_s, informer.kind)  # type: ignore[misc]
        queue.on_add = lambda: self._metrics.count("esper_workqueue_adds_total")
        queue.on_retry = lambda: self._metrics.count("esper_workqueue_retries_total")

    # --- living ---

    async def _live(self, stack: AsyncExitStack, operator: Operator, lease: LeaseThread, oona: Oona | None) -> int:
        loop = asyncio.get_running_loop()
        kopf = KopfThread(RunFeed(loop, operator.runs.put, operator.runs.drop), self._settings.watch_namespaces)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connections()))
        workers = asyncio.create_task(self._lead(operator, lease, oona), name="workers")
        roots = [workers, *self._roots(operator, lease, oona, session)]
        roots.append(asyncio.create_task(self._start_kopf(operator, kopf), name="start of kopf"))
        lease.start()
        code = await self._wait(roots, kopf, lease)
        await self._wind_down(operator, workers)
        await lease.stop()
        for task in roots:
            task.cancel()
        await asyncio.gather(*roots, return_exceptions=True)
        await kopf.stop()
        return code

    def _roots(
        self, operator: Operator, lease: LeaseThread, oona: Oona | None, session: aiohttp.ClientSession
    ) -> list[asyncio.Task[None]]:
        """Tasks that never end by themselves; when one does, so does the process."""
        puller = Puller(
            intake=operator.intake,
            pods=lambda: operator.live_pods() if lease.held else (),
            bus_connected=lambda: oona is not None and oona.connected,
            fetch=HttpFetch(session),
            on_polls=lambda count: self._metrics.gauge("esper_report_polls", count),
        )
        coroutines: dict[str, Coroutine[Any, Any, None]] = {
            f"{informer.kind} informer": informer.run() for informer in operator.informers
        }
        coroutines |= {
            "runs": self._fill(operator),
            "monitor": self._monitor(operator),
            "events": operator.events.run(),
            "pull": puller.run(),
            "resync": self._resync(operator),
        }
        if oona is not None:
            coroutines["reports"] = self._read_reports(operator, oona)
            coroutines["fabric"] = self._keep_fabric(lease, oona)
            if operator.bus_users is not None:
                coroutines["bus users"] = self._keep_users(operator, operator.bus_users, lease, oona)
        return [asyncio.create_task(coroutine, name=name) for name, coroutine in coroutines.items()]

    async def _wait(self, roots: list[asyncio.Task[None]], kopf: KopfThread, lease: LeaseThread) -> int:
        """Until somebody asks for the end, or a part of the whole has ended."""
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        ends: list[asyncio.Future[Any]] = [stop, kopf.ended, lease.failed, *roots]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            logger.info("stopping")
            return OK
        stop.cancel()
        for end in ends:
            if end.done() and end is not stop:
                name = end.get_name() if isinstance(end, asyncio.Task) else "kopf or lease"
                logger.critical("%s has ended; so must the process", name, exc_info=end.exception())
        return FAILED

    async def _lead(self, operator: Operator, lease: LeaseThread, oona: Oona | None) -> None:
        await operator.wait_warm()
        await lease.acquired.wait()
        if oona is not None:
            await self._catch_up(operator, oona)
        logger.info("reconciling %d runs", len(operator.runs))
        await operator.lead()

    async def _catch_up(self, operator: Operator, oona: Oona) -> None:
        """Reads what Redis already holds: a pod that has ended meanwhile must not be judged before its reports."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                newest = await oona.last(REPORTS)
                if newest is not None:
                    await operator.intake.wait_read(newest)
        except (OonaUnavailable, TimeoutError) as error:
            logger.warning("the reports in Redis are not read yet: %s", str(error) or "it takes too long")

    async def _wind_down(self, operator: Operator, workers: asyncio.Task[None]) -> None:
        """Lets reconciles under way end, and Events go out."""
        operator.queue.close()
        try:
            async with asyncio.timeout(GRACE_S):
                await operator.queue.wait_idle()
        except TimeoutError:
            logger.warning("reconciles did not end in time")
        workers.cancel()
        await operator.events.flush(1.0)

    async def _fill(self, operator: Operator) -> None:
        while not operator.loaded.is_set():
            try:
                await operator.fill()
            except KubeError as error:
                why = "their CRD is not installed" if isinstance(error, NotFound) else str(error)
                logger.warning("the runs cannot be listed: %s", why)
                wait_s = error.retry_after_s if isinstance(error, Throttled) else FILL_RETRY_S
                await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
        await asyncio.Event().wait()

    async def _start_kopf(self, operator: Operator, kopf: KopfThread) -> None:
        """Once runs can be listed: Kopf would never look again for a CRD that comes later."""
        await operator.loaded.wait()
        kopf.start()
        await asyncio.Event().wait()

    async def _resync(self, operator: Operator) -> None:
        while True:
            try:
                await operator.resync()
            except KubeError as error:
                logger.warning("the resync failed: %s", error)

    async def _read_reports(self, operator: Operator, oona: Oona) -> None:
        await operator.loaded.wait()  # reports of runs that are not known yet would be kept in vain
        await operator.intake.read(oona.reports())

    async def _keep_fabric(self, lease: LeaseThread, oona: Oona) -> None:
        await lease.acquired.wait()
        await Fabric(oona, self._metrics).run()

    async def _keep_users(self, operator: Operator, users: BusUsers, lease: LeaseThread, oona: Oona) -> None:
        await operator.loaded.wait()  # else users of runs that are not known yet would be taken for leftovers
        await lease.acquired.wait()
        await users.run(oona)

    async def _monitor(self, operator: Operator) -> None:
        loop = asyncio.get_running_loop()
        ticks = 0
        while True:
            before = loop.time()
            await asyncio.sleep(MONITOR_S)
            self._lag.seconds = max(0.0, loop.time() - before - MONITOR_S)
            if ticks % PHASES_EVERY == 0:
                for phase, count in operator.runs.phases().items():
                    self._metrics.gauge("esper_runs", count, phase)
            ticks += 1


def main() -> None:
    """Entry point of `esper-operator` and `python -m esper_operator`."""
    try:
        settings = OperatorSettings.from_environ(os.environ)
        configure(log_format=settings.log_format, level=settings.log_level)
        # Else every counter and histogram has a second series, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        code = asyncio.run(_run(settings))
    except (SettingsError, ConfigException, GenerationError, SeedError) as error:
        print(f"esper-operator: {error}", file=sys.stderr)
        code = UNUSABLE
    sys.exit(code)


async def _run(settings: OperatorSettings) -> int:
    return await Process(settings).run()
