"""The leader keeps the fabric: trims its streams, publishes their pressure, says how they are.

One period for all of it: the pressure is forgotten after PRESSURE_LIVES_S, so every third look may fail; a look is
about forty short calls, which take some ten milliseconds of waiting and no blocking.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from esper_leyline.oona import Housekeeper, Oona, OonaUnavailable
from esper_leyline.oona.housekeeping import StreamState
from esper_leyline.oona.streams import DEAD_LETTERS

from esper_operator.metrics import Metrics

logger = logging.getLogger(__name__)

LOOK_S: Final = 10.0
MAX_GROUPS: Final = 8
"""Per stream, as labels of a metric: whoever may make groups must not fill Prometheus."""


class Fabric:
    def __init__(self, oona: Oona, metrics: Metrics, housekeeper: Housekeeper | None = None) -> None:
        self._oona = oona
        self._housekeeper = housekeeper or Housekeeper(oona, clock=asyncio.get_running_loop().time)
        self._metrics = metrics
        self._aged: set[tuple[str, str]] = set()
        """Stream and group of the ages that are told."""
        self._failing = False

    async def run(self) -> None:
        """Endless."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        try:
            await self._oona.stand_by()  # an emergency must not have to connect first
            self._tell(await self._housekeeper.look())
        except OonaUnavailable as error:
            if not self._failing:
                logger.warning("the streams in Redis cannot be kept now: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _tell(self, found: Mapping[str, StreamState]) -> None:
        tell = self._metrics
        ages: dict[tuple[str, str], float] = {}
        for name, state in found.items():
            tell.gauge("esper_oona_queue_depth", state.depth, name)
            tell.gauge("esper_oona_stream_length", state.length, name)
            tell.gauge("esper_oona_backpressure_level", state.pressure.level, name)
            tell.count("esper_oona_trimmed_total", name, by=state.trimmed)
            pending = sorted(state.oldest_pending_s.items())[:MAX_GROUPS]
            ages |= {(name, group): age_s for group, age_s in pending}
        for place in self._aged - ages.keys():
            tell.forget("esper_oona_oldest_pending_age_s", *place)
        for (stream, group), age_s in ages.items():
            tell.gauge("esper_oona_oldest_pending_age_s", age_s, stream, group)
        self._aged = set(ages)
        if DEAD_LETTERS.name in found:
            tell.gauge("esper_oona_dead_letters", found[DEAD_LETTERS.name].length)
