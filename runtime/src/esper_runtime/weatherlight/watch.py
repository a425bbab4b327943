"""A look at everything that tells nobody when it changes: the trainer's page, Redis, the supervisor's absence."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from esper_leyline import paths
from esper_leyline.pages import Heartbeat, Page, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import RuntimePhase

from esper_runtime.weatherlight.link import SupervisorLink
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder

LOOK_S: Final = 0.25
_REDIS_GONE_S: Final = 1.0
"""Redis must be silent for this long before it counts as gone."""
_PAGE_GONE_S: Final = 2.0
"""A page whose writer was killed inside a write reads well again when the next trainer writes."""
_SUPERVISOR_S: Final = 3.0
"""A supervisor that is alive connects within this time after weatherlight has started."""
_PAGE_EXPECTED: Final = frozenset({RuntimePhase.RUNTIME_PHASE_RUNNING, RuntimePhase.RUNTIME_PHASE_FROZEN})


class TrainerPage:
    """The trainer's heartbeats, opened anew when the file is another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._page: Page | None = None
        self._inode = 0

    def read(self) -> Heartbeat:
        """PageError when there is no page or no rest in it."""
        try:
            inode = self._path.stat().st_ino
        except OSError as error:
            raise PageError(f"{self._path} does not exist yet") from error
        if self._page is None or inode != self._inode:
            self.close()
            self._page, self._inode = Page.open(self._path), inode
        return Heartbeat.of(self._page.read())

    def close(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None


class Grace:
    """True once a state has lasted for long enough."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def lasts(self, state: bool, now: float) -> bool:
        if not state:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= self._seconds


class Lookout:
    def __init__(self, run_dir: Path, recorder: Recorder, link: SupervisorLink, metrics: Metrics) -> None:
        self._recorder = recorder
        self._link = link
        self._metrics = metrics
        self._page = TrainerPage(run_dir / paths.TRAINER_PAGE)
        self._page_gone = Grace(_PAGE_GONE_S)
        self._redis_gone = Grace(_REDIS_GONE_S)
        self._supervisor_gone = Grace(_SUPERVISOR_S)
        self.redis: bool | None = None
        """Whether Redis answers; None: this run has none."""
        self.redis_problem = ""
        self.bus_problem = ""
        """Why Redis, which answers, is of no use; empty when it is."""
        self.looked: Callable[[], None] = lambda: None
        """Called after each look."""

    async def run(self, beat: Callable[[], None] = lambda: None) -> None:
        """Endless."""
        while True:
            beat()
            self.look(time.monotonic())
            self.looked()
            await asyncio.sleep(LOOK_S)

    def look(self, now: float) -> None:
        self._look_at_page(now)
        self._look_at_redis(now)
        self._look_at_supervisor(now)
        if self._recorder.reports.problem:
            self._recorder.degraded("journal", RunReason.JOURNAL_DAMAGED, self._recorder.reports.problem)

    def _look_at_page(self, now: float) -> None:
        problem = ""
        beat = None
        try:
            beat = self._page.read()
        except (PageError, OSError) as error:
            problem = str(error)
        expected = self._recorder.reporter.phase in _PAGE_EXPECTED
        if self._page_gone.lasts(bool(problem) and expected, now):
            self._recorder.degraded("tolaria-page", RunReason.PAGE_UNREADABLE, problem)
        elif not problem:
            self._recorder.restored("tolaria-page")
        if beat is not None and beat.beat_ns:
            self._metrics.heartbeat_age.set(max(0, time.monotonic_ns() - beat.beat_ns) / 1e9)
        self._recorder.beat(beat)

    def _look_at_redis(self, now: float) -> None:
        self._metrics.redis_connected.set(int(self.redis is True))
        if self._redis_gone.lasts(self.redis is False, now):
            message = f"Redis cannot be reached; reports are kept and can be pulled. {self.redis_problem}".rstrip()
            self._recorder.degraded("oona", RunReason.BUS_UNAVAILABLE, message)
        elif self.redis and self.bus_problem:
            self._recorder.degraded("oona", RunReason.BUS_UNUSABLE, self.bus_problem)
        elif self.redis is not False:
            self._recorder.restored("oona")

    def _look_at_supervisor(self, now: float) -> None:
        """A container that died while no weatherlight was there has no connection whose end could be seen."""
        reporter = self._recorder.reporter
        missing = (
            reporter.expects_supervisor
            and not self._link.connected
            and not self._link.said_goodbye(reporter.incarnation)
        )
        if self._supervisor_gone.lasts(missing, now):
            self._recorder.died()

    def close(self) -> None:
        self._page.close()
