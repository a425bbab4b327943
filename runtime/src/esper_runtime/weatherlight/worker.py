"""Weatherlight's worker process: assembly, start and orderly end."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Final

from aiohttp import web
from esper_leyline import paths
from esper_leyline.labels import WEATHERLIGHT
from esper_leyline.oona import Oona, OonaConfig, OonaConfigError
from esper_leyline.pages import Page
from esper_leyline.ports import REPORTS_PATH
from prometheus_client import CollectorRegistry

from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.worker import run_worker
from esper_runtime.weatherlight.clock import Clock, system_clock
from esper_runtime.weatherlight.emergency import EmergencyDesk, follow_directory, follow_redis
from esper_runtime.weatherlight.link import SupervisorLink
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.outlet import Outlet
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.reportlog import ReportLog
from esper_runtime.weatherlight.settings import Settings
from esper_runtime.weatherlight.tail import JournalTail
from esper_runtime.weatherlight.watch import LOOK_S, Lookout

FLUSH_S: Final = 5.0
"""After SIGTERM the last reports have this long to reach somebody."""
_BUS_RETRY_S: Final = 5.0
"""How often to look for the optional Secret <run>-bus while it is absent or unusable."""

log = logging.getLogger(__name__)


class Weatherlight:
    """All parts of one weatherlight, joined. Constructing it reads and writes files; nothing runs yet."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, clock: Clock = system_clock) -> None:
        self._settings = settings
        _make_directory(settings.state_dir)
        identity = settings.identity
        self._metrics = Metrics(registry)
        self._log = ReportLog(settings.state_dir)
        self._recorder = Recorder(identity, self._log, settings.report_key, clock, self._metrics)
        self._page = Page.create(settings.run_dir / paths.EMERGENCY_PAGE)
        self._desk = EmergencyDesk(
            run_uid=identity.run_uid,
            attempt=identity.attempt,
            page=self._page,
            keys_dir=settings.keys_dir,
            state_dir=settings.state_dir,
            recorder=self._recorder,
            clock=clock,
            metrics=self._metrics,
        )
        self._tail = JournalTail(settings.run_dir, self._recorder, self._metrics)
        self._link = SupervisorLink(
            settings.run_dir / paths.WEATHERLIGHT_SOCKET,
            settings.state_dir,
            self._recorder,
            self._metrics,
            drain=self._tail.drain,
        )
        self._desk.poke = self._link.poke
        self._lookout = Lookout(settings.run_dir, self._recorder, self._link, self._metrics)
        self.outlet = Outlet(self._recorder, settings.state_dir, self._metrics)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, then until the last reports are delivered, at most FLUSH_S longer."""
        await self._link.start()
        tasks = [
            asyncio.create_task(part)
            for part in (
                self._tail.run(),
                self._lookout.run(),
                follow_directory(self._settings.emergency_dir, self._desk, self._recorder),
                self._follow_bus(),
            )
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # an error in any part ends the worker; PID 1 starts the next one
            await self._link.stop()
            await self._flush()
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            self._close()

    async def _flush(self) -> None:
        await self._tail.drain()
        try:
            async with asyncio.timeout(FLUSH_S):
                while not self.outlet.delivered:  # noqa: ASYNC110 - two ways, one deadline, once in a lifetime
                    await asyncio.sleep(0.02)
        except TimeoutError:
            waiting, _ = self._log.waiting(self.outlet.published_seq)
            log.warning("stopped with reports that reached nobody", extra={"reports": waiting})

    async def _follow_bus(self) -> None:
        """Everything that needs Redis, as soon as there is a Secret that names one. Endless."""
        while True:
            try:
                config = OonaConfig.from_directory(self._settings.bus_dir)
            except OonaConfigError as error:
                self._lookout.redis, self._lookout.redis_problem = False, str(error)
            else:
                if config is not None:
                    await self._use_bus(config)
            await asyncio.sleep(_BUS_RETRY_S)

    async def _use_bus(self, config: OonaConfig) -> None:
        async with Oona(config) as oona, asyncio.TaskGroup() as parts:
            parts.create_task(follow_redis(oona, self._settings.identity.run_uid, self._desk))
            parts.create_task(self.outlet.publish(oona))
            parts.create_task(self._watch_bus(oona))

    async def _watch_bus(self, oona: Oona) -> None:
        while True:
            self._lookout.redis = oona.connected
            self._lookout.redis_problem = oona.problem
            await asyncio.sleep(LOOK_S)

    def _close(self) -> None:
        self._tail.close()
        self._lookout.close()
        self._page.close()
        self._log.close()


async def serve(environment: Environment, stop: asyncio.Event) -> None:
    settings = Settings.load(environment)
    registry = CollectorRegistry()
    weatherlight = Weatherlight(settings, registry)
    # Ready means: keys loaded and emergency page there, which is so by now, and this server up. Never Redis.
    async with ProbeServer(
        WEATHERLIGHT,
        environment,
        ready=str,
        registry=registry,
        routes=[web.get(REPORTS_PATH, weatherlight.outlet.serve)],
    ):
        await weatherlight.run(stop)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o770, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{path} cannot be made on the memory volume: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_worker(WEATHERLIGHT, serve))
