"""Weatherlight's one connection to Redis: found as soon as a Secret names one, watched, and examined.

Nothing here is ever a reason not to run: while Redis is away, too old or forbids something, the run is degraded and
says so, and everything else goes on.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from esper_leyline.events import Level, RunEvent
from esper_leyline.oona import (
    MAX_SKEW_S,
    BreakerState,
    Examination,
    Oona,
    OonaConfig,
    OonaConfigError,
    OonaUnavailable,
    examine,
)
from esper_leyline.reasons import RunReason

from esper_runtime.sidecar.narrator import Narrator
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.watch import LOOK_S, Lookout

RETRY_S: Final = 5.0
"""How often to look for the optional Secret <run>-bus while it is absent or unusable."""
EXAMINE_S: Final = 60.0
"""How often Redis is examined while it is well; at once after each return, and again soon while something is wrong."""
SOON_S: Final = 10.0
_BREAKER_EVENTS: Final = {
    BreakerState.OPEN: RunEvent.BUS_CONSERVATIVE_ENTER,
    BreakerState.HALF_OPEN: RunEvent.BUS_CONSERVATIVE_PROBE,
    BreakerState.CLOSED: RunEvent.BUS_CONSERVATIVE_EXIT,
}

log = logging.getLogger(__name__)


class Bus:
    def __init__(
        self,
        directory: Path,
        run_uid: str,
        *,
        lookout: Lookout,
        recorder: Recorder,
        narrator: Narrator,
        metrics: Metrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`directory`: the mounted Secret."""
        self._directory = directory
        self._run_uid = run_uid
        self._lookout = lookout
        self._recorder = recorder
        self._narrator = narrator
        self._metrics = metrics
        self._wall = wall
        self._oona: Oona | None = None
        self._there = asyncio.Event()
        self._told = {BreakerState.CLOSED}
        """States of the breaker that need not be told again."""
        self._skewed = False

    async def client(self, beat: Callable[[], None] = lambda: None) -> Oona:
        """Waits until there is one, beating every second; then it is always the same."""
        while self._oona is None:
            beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._there.wait()
        return self._oona

    @property
    def connected(self) -> bool:
        """The last exchange with Redis succeeded."""
        return self._oona is not None and self._oona.connected

    async def watch(self, beat: Callable[[], None]) -> None:
        """Finds it and tells the lookout how it is. Endless; beats every RETRY_S at least."""
        while True:
            beat()
            if self._oona is None:
                self._find()
            if self._oona is None:
                await asyncio.sleep(RETRY_S)
                continue
            self._lookout.redis, self._lookout.redis_problem = self._oona.connected, self._oona.problem
            await asyncio.sleep(LOOK_S)

    def _find(self) -> None:
        try:
            config = OonaConfig.from_directory(self._directory)
        except OonaConfigError as error:
            self._lookout.redis, self._lookout.redis_problem = False, str(error)
            return
        if config is not None:
            self._oona = Oona(config, on_breaker=self._breaker_moved)
            self._there.set()

    def _breaker_moved(self, state: BreakerState) -> None:
        """Every change is counted; told is the first of each kind since the breaker was last closed, because it probes
        every second or two while Redis is away."""
        self._metrics.breaker(state)
        if state in self._told:
            return
        self._told.add(state)
        if state is BreakerState.CLOSED:
            self._told = {state}
        else:
            self._told.discard(BreakerState.CLOSED)
        problem = f": {self._oona.problem}" if self._oona is not None and self._oona.problem else ""
        message = f"the breaker before Redis is {state}{problem}"
        self._narrator.say(_BREAKER_EVENTS[state], RunReason.BUS_UNAVAILABLE, message)

    # Preflight of Redis

    async def inspect(self, beat: Callable[[], None]) -> None:
        """Examines Redis whenever it has come back, and now and then. Endless; beats every EXAMINE_S at least."""
        oona = await self.client(beat)
        while True:
            beat()
            try:
                self._examined(await examine(oona, self._run_uid, wall=self._wall))
            except OonaUnavailable as error:
                log.debug("Redis could not be examined: %s", error)
                await asyncio.sleep(SOON_S)
                continue
            wait_s = SOON_S if self._lookout.bus_problem else EXAMINE_S
            try:
                async with asyncio.timeout(wait_s):
                    await oona.wait_connected(False)
                    await oona.wait_connected()
            except TimeoutError:
                continue

    def _examined(self, found: Examination) -> None:
        problem = found.problem
        if problem and problem != self._lookout.bus_problem:
            log.error("preflight of Redis: %s", problem)
            self._narrator.say(RunEvent.PREFLIGHT_FAILED, RunReason.BUS_UNUSABLE, problem)
        self._lookout.bus_problem = problem
        self._metrics.clock_skew.set(found.skew_s)
        self._judge_clock(found.skew_s)

    def _judge_clock(self, skew_s: float) -> None:
        skewed = abs(skew_s) > MAX_SKEW_S
        if skewed == self._skewed:
            return
        self._skewed = skewed
        ahead = "ahead of" if skew_s > 0 else "behind"
        message = f"the clock of this pod's node is {abs(skew_s):.1f} s {ahead} that of Redis; {MAX_SKEW_S:g} s may be"
        level = Level.WARNING if skewed else Level.INFO
        self._narrator.say(RunEvent.BUS_CLOCK_SKEW, RunReason.CLOCK_SKEW, message, level=level)
        self._recorder.notice(RunReason.CLOCK_SKEW, message, warning=skewed)

    async def close(self) -> None:
        if self._oona is not None:
            await self._oona.aclose()
