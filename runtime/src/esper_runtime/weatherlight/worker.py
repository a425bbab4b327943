"""Weatherlight's worker process: assembly, start and orderly end."""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

from aiohttp import web
from esper_leyline import paths, signing
from esper_leyline.events import RunEvent
from esper_leyline.labels import WEATHERLIGHT
from esper_leyline.oona import Publisher
from esper_leyline.pages import EmergencyPage, EmergencyRecord
from esper_leyline.ports import REPORTS_PATH
from esper_leyline.reasons import RunReason
from esper_leyline.v1.emergency_pb2 import EmergencyMode
from prometheus_client import CollectorRegistry

from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.keyfile import Keyring, private_key
from esper_runtime.sidecar.narrator import Narrator
from esper_runtime.sidecar.supervision import Beat, Worker, Workers
from esper_runtime.sidecar.worker import run_worker
from esper_runtime.weatherlight.bus import EXAMINE_S, RETRY_S, Bus
from esper_runtime.weatherlight.clock import Clock, system_clock
from esper_runtime.weatherlight.emergency import FILE_EVERY_S, EmergencyDesk, follow_directory, follow_redis
from esper_runtime.weatherlight.link import SupervisorLink
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.mode import SystemMode
from esper_runtime.weatherlight.outlet import Outlet
from esper_runtime.weatherlight.preflight import preflight
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.reportlog import ReportLog
from esper_runtime.weatherlight.settings import Settings
from esper_runtime.weatherlight.tail import JournalTail
from esper_runtime.weatherlight.telemetry import Telemetry
from esper_runtime.weatherlight.watch import Lookout

FLUSH_S: Final = 5.0
"""After SIGTERM the last reports have this long to reach somebody."""
SECOND_S: Final = 1.0
"""What looks several times a second beats within this time."""
SUPERVISOR: Final = "supervisor"

log = logging.getLogger(__name__)


class Weatherlight:
    """All parts of one weatherlight, joined. Constructing it reads and writes files; nothing runs yet."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, clock: Clock = system_clock) -> None:
        self._settings = settings
        identity, run_dir, key = settings.identity, settings.run_dir, settings.report_key.current
        self._metrics = metrics = Metrics(registry)
        metrics.restarted(settings.restarts)
        self._narrator = Narrator(run_dir, WEATHERLIGHT)
        self._log = ReportLog(settings.state_dir)
        self._recorder = Recorder(identity, self._log, key, clock, metrics)
        self._page = EmergencyPage.create(run_dir / paths.EMERGENCY_PAGE)
        self._desk = EmergencyDesk(
            run_uid=identity.run_uid,
            attempt=identity.attempt,
            page=self._page,
            keys_dir=settings.keys_dir,
            state_dir=settings.state_dir,
            recorder=self._recorder,
            clock=clock,
            metrics=metrics,
        )
        self._tail = JournalTail(run_dir, self._recorder, metrics)
        self._link = SupervisorLink(
            run_dir / paths.WEATHERLIGHT_SOCKET, settings.state_dir, self._recorder, metrics, drain=self._tail.drain
        )
        self._desk.poke = self._link.poke
        self._desk.accepted = self._received
        self._lookout = Lookout(run_dir, self._recorder, self._link, metrics)
        self._telemetry = Telemetry(run_dir, settings.state_dir, identity=identity, key=key, metrics=metrics)
        self._bus = Bus(
            settings.bus_dir,
            identity.run_uid,
            lookout=self._lookout,
            recorder=self._recorder,
            narrator=self._narrator,
            metrics=metrics,
        )
        self._publisher: Publisher | None = None
        self.outlet = Outlet(self._recorder, settings.state_dir, metrics)
        self._mode = SystemMode(self._recorder, self._narrator, metrics, clock)
        self._lookout.looked = self._mode.look

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, then until the last reports are delivered, at most FLUSH_S longer. CrashLoop when some part
        fails again and again."""
        try:
            async with Workers(self.workers(), observer=self._mode) as workers:
                await workers.until(stop)
                await workers.stop(SUPERVISOR)  # who ends from now on did not die
                await self._flush()
        finally:
            await self._bus.close()
            self._close()

    def workers(self) -> tuple[Worker, ...]:
        """By the names of esper_leyline.metrics.weatherlight."""
        settings, desk, recorder = self._settings, self._desk, self._recorder

        def file(beat: Beat) -> Coroutine[Any, Any, None]:
            return follow_directory(settings.emergency_dir, desk, recorder, beat)

        async def signals(_: Beat) -> None:
            await follow_redis(await self._bus.client(), settings.identity.run_uid, desk)

        async def reports(_: Beat) -> None:
            await self.outlet.publish(await self._bus.client())

        return (
            Worker(name="journal", run=self._tail.run, cadence_s=SECOND_S),
            Worker(name="lookout", run=self._lookout.run, cadence_s=SECOND_S),
            Worker(name=SUPERVISOR, run=lambda _: self._link.run()),
            Worker(name="emergency-file", run=file, cadence_s=FILE_EVERY_S),
            Worker(name="emergency-redis", run=signals),
            Worker(name="reports", run=reports),
            Worker(name="telemetry", run=self._take_telemetry, cadence_s=SECOND_S),
            Worker(name="telemetry-urgent", run=self._sending(self._telemetry.send_urgent)),
            Worker(name="telemetry-ordinary", run=self._sending(self._telemetry.send_ordinary)),
            Worker(name="bus", run=self._bus.watch, cadence_s=RETRY_S),
            Worker(name="bus-examination", run=self._bus.inspect, cadence_s=EXAMINE_S),
        )

    async def _take_telemetry(self, beat: Beat) -> None:
        await self._bus.client(beat)  # without a bus nobody would hear it, and it would fill the spool
        await self._telemetry.read(beat)

    def _sending(
        self, send: Callable[[Publisher], Coroutine[Any, Any, None]]
    ) -> Callable[[Beat], Coroutine[Any, Any, None]]:
        async def run(_: Beat) -> None:
            oona = await self._bus.client()
            self._publisher = self._publisher or Publisher(oona)  # one, since its rates are those of this pod
            await send(self._publisher)

        return run

    def _received(self, record: EmergencyRecord, leg: str) -> None:
        order = "cleared" if record.clear else EmergencyMode.Name(record.mode).removeprefix("EMERGENCY_MODE_").lower()
        message = f"{order} by {leg} [{record.signal_id}]"
        self._narrator.say(RunEvent.SIGNAL_RECEIVED, RunReason.EMERGENCY_STOP, message, incident=record.signal_id)

    async def _flush(self) -> None:
        """The last reports by either way, the last telemetry if there is a Redis that answers."""
        await self._tail.drain()
        if self._bus.connected:
            self._telemetry.take_all()
        try:
            async with asyncio.timeout(FLUSH_S):
                while not self.outlet.delivered or (self._telemetry.waiting and self._bus.connected):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            waiting, _ = self._log.waiting(self.outlet.published_seq)
            left = {"reports": waiting, "packets": self._telemetry.waiting}
            log.warning("stopped with reports that reached nobody", extra=left)

    def _close(self) -> None:
        self._tail.close()
        self._telemetry.close()
        self._lookout.close()
        self._narrator.close()
        self._page.close()
        self._log.close()


def key_problem(settings: Settings) -> str:
    """Why a worker that started now would not; empty when it would."""
    try:
        private_key(settings.keys_dir / signing.REPORT_PRIVATE)
        Keyring(settings.keys_dir / signing.OPERATOR_PUBLIC)
    except SettingsError as error:
        return str(error)
    return ""


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    """Ready is who has its keys: without them the next worker cannot start, and no signal counts. Redis is no part of
    it, since it may vanish and everything still works, nor is a worker that waits to be started again: the condition
    Healthy has both. The emergency page is there, and this server up, before anybody can ask."""
    settings = preflight(environment)
    registry = CollectorRegistry()
    weatherlight = Weatherlight(settings, registry)
    async with ProbeServer(
        WEATHERLIGHT,
        environment,
        ready=lambda: key_problem(settings),
        registry=registry,
        routes=[web.get(REPORTS_PATH, weatherlight.outlet.serve)],
    ):
        await weatherlight.run(stop)


if __name__ == "__main__":
    sys.exit(run_worker(WEATHERLIGHT, serve))
