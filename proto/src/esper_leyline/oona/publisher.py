"""Sends messages by their own priority: chooses the stream, looks at the pressure, and says what became of each.

The pressure is read from Redis at most every LOOK_S, and never for what is CRITICAL.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from esper_leyline.oona.admission import Admission, Pressure, Verdict
from esper_leyline.oona.client import Oona, OonaUnavailable, Outcome, Status
from esper_leyline.oona.housekeeping import PRESSURE_LIVES_S, pressures
from esper_leyline.oona.streams import TELEMETRY, Stream, route
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import MESSAGE_PRIORITY_CRITICAL, MessagePriority

LOOK_S: Final = 5.0

_REFUSALS: Final = {
    Verdict.DROP: (Status.DROPPED, "back-pressure"),
    Verdict.REFUSE: (Status.REFUSED, "back-pressure: keep it and try again"),
    Verdict.COALESCE: (Status.COALESCED, "more critical messages than the emergency stream takes: counted"),
}


class Publisher:
    """Of one process."""

    def __init__(
        self, oona: Oona, *, clock: Callable[[], float] = time.monotonic, admission: Admission | None = None
    ) -> None:
        self.oona = oona
        self.admission = admission or Admission(clock)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """By priority (LOW …) and status; demoted ones count as such beside."""
        self.demoted = 0
        self._clock = clock
        self._pressures: dict[str, Pressure] = {}
        self._looking = asyncio.Lock()
        self._look_at = float("-inf")
        self._seen_at = float("-inf")

    async def publish(self, envelope: BusEnvelope, *, again: bool = False, demoted: bool = False) -> Outcome:
        """`again`: it was let through before, which counts once; `demoted`: to the ordinary stream, where it stays.

        ValueError for an envelope without priority, of a type that does not travel, or too large.
        """
        streams = route(envelope.message_type, envelope.priority, envelope.run_uid)
        if envelope.priority != MESSAGE_PRIORITY_CRITICAL:
            await self._look()
        verdict = Verdict.ADMIT if again else self._judge(envelope, streams[0])
        if verdict in _REFUSALS:
            status, detail = _REFUSALS[verdict]
            return self._count(envelope, Outcome(status=status, detail=detail))
        if verdict is Verdict.DEMOTE:
            self.demoted += 1
        if demoted or verdict is Verdict.DEMOTE:
            streams = (TELEMETRY,)
        first, *more = streams
        return self._count(envelope, await self.oona.publish(first, envelope, *more))

    def _judge(self, envelope: BusEnvelope, stream: Stream) -> Verdict:
        return self.admission.judge(envelope.message_type, envelope.priority, lambda: self._pressure(stream))

    def _pressure(self, stream: Stream) -> Pressure:
        return self._pressures.get(stream.name, Pressure.NONE)

    async def _look(self) -> None:
        async with self._looking:  # else who comes meanwhile would see no pressure
            now = self._clock()
            if now < self._look_at:
                return
            self._look_at = now + LOOK_S
            try:
                self._pressures = await pressures(self.oona)
                self._seen_at = now
            except OonaUnavailable:
                if now - self._seen_at > PRESSURE_LIVES_S:
                    self._pressures = {}

    def _count(self, envelope: BusEnvelope, outcome: Outcome) -> Outcome:
        priority = MessagePriority.Name(envelope.priority).removeprefix("MESSAGE_PRIORITY_")
        self.outcomes[priority, outcome.status] += 1
        return outcome
