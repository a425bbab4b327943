"""Keeps the fabric's streams short and says how they are. One process does it for all, every minute.

What some group has not acknowledged is never trimmed here, however old; only a stream's own length, with which every
publication is bounded, can take it away. Ids of entries are Redis's own time, and so is the age that counts.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio import Redis

from esper_leyline.oona.admission import Pressure, PressureGauge
from esper_leyline.oona.answers import SMALL_ANSWER_BYTES
from esper_leyline.oona.client import Oona, sound_answers
from esper_leyline.oona.streams import STREAMS, Stream

PRESSURE_KEY: Final = "oona.pressure"
PRESSURE_LIVES_S: Final = 30.0
"""Without news for so long there is no pressure: a stream's length bounds it all the same."""
IDLE_CONSUMER_S: Final = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """One stream at one moment."""

    length: int = 0
    depth: int = 0
    """Entries that the slowest group has still to do."""
    pressure: Pressure = Pressure.NONE
    trimmed: int = 0
    """By this look."""
    consumers_removed: int = 0
    oldest_pending_s: Mapping[str, float] = field(default_factory=dict)
    """By group; groups with nothing pending are absent."""


class Housekeeper:
    def __init__(self, oona: Oona, *, clock: Callable[[], float], streams: Mapping[str, Stream] = STREAMS) -> None:
        self._oona = oona
        self._streams = streams
        self._gauges = {name: PressureGauge(clock) for name in streams}

    async def look(self) -> dict[str, StreamState]:
        """Trims, publishes the pressure, and says how every stream is. OonaUnavailable when Redis cannot be asked."""
        async with self._oona.connection() as client:
            with sound_answers():
                return await self._look(client)

    async def _look(self, client: Redis) -> dict[str, StreamState]:
        seconds, microseconds = await self._ask(client.time())
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        found = {name: await self._stream(client, stream, now_ms) for name, stream in self._streams.items()}
        pressed: dict[Any, Any] = {
            name: str(state.pressure) for name, state in found.items() if state.pressure is not Pressure.NONE
        }
        transaction = client.pipeline(transaction=True)
        transaction.delete(PRESSURE_KEY)
        if pressed:
            transaction.hset(PRESSURE_KEY, mapping=pressed)
            transaction.pexpire(PRESSURE_KEY, int(PRESSURE_LIVES_S * 1000))
        await self._ask(transaction.execute())
        return found

    async def _stream(self, client: Redis, stream: Stream, now_ms: int) -> StreamState:
        if not await self._ask(client.exists(stream.name)):
            return StreamState(pressure=self._gauges[stream.name].see(0))
        length = int(await self._ask(client.xlen(stream.name)))
        groups = await self._ask(client.xinfo_groups(stream.name))
        keep_from = (now_ms - stream.retention_s * 1000, 0)
        depth, removed, ages = 0, 0, {}
        for group in groups:
            name = group["name"]
            behind = group.get("lag")
            depth = max(depth, int(group["pending"]) + (length if behind is None else int(behind)))
            unread = _after(group["last-delivered-id"].decode())
            keep_from = min(keep_from, unread)
            if group["pending"]:
                oldest = await self._oldest(client, stream, name)
                keep_from = min(keep_from, oldest)
                ages[name.decode(errors="replace")] = max(0.0, (now_ms - oldest[0]) / 1e3)
            removed += await self._remove_idle(client, stream, name)
        trimmed = 0
        if keep_from > (0, 0):
            minimum = f"{keep_from[0]}-{keep_from[1]}"
            trimmed = int(await self._ask(client.xtrim(stream.name, minid=minimum, approximate=not stream.exact)))
        return StreamState(
            length=length - trimmed,
            depth=depth,
            pressure=self._gauges[stream.name].see(depth),
            trimmed=trimmed,
            consumers_removed=removed,
            oldest_pending_s=ages,
        )

    async def _oldest(self, client: Redis, stream: Stream, group: bytes) -> tuple[int, int]:
        summary = await self._ask(client.xpending(stream.name, group))
        first = summary["min"]
        return _id(first.decode()) if first else (1 << 62, 0)

    async def _remove_idle(self, client: Redis, stream: Stream, group: bytes) -> int:
        """Consumers that nobody is any more: processes of runs long gone."""
        gone = [
            consumer["name"]
            for consumer in await self._ask(client.xinfo_consumers(stream.name, group))
            if not consumer["pending"] and consumer["idle"] > IDLE_CONSUMER_S * 1000
        ]
        for name in gone:
            await self._ask(client.xgroup_delconsumer(stream.name, group, name))
        return len(gone)

    async def _ask(self, call: Awaitable[Any]) -> Any:
        return await self._oona.ask(call, self._oona.config.timeout_s)


async def pressures(oona: Oona) -> dict[str, Pressure]:
    """Streams under pressure, as the housekeeper last said. Anything else that stands there is passed over."""
    async with oona.connection(SMALL_ANSWER_BYTES) as client:
        found = await oona.ask(client.hgetall(PRESSURE_KEY), oona.config.timeout_s)
    known = {str(one).encode(): one for one in Pressure}
    with sound_answers():
        said = {name: known.get(found.get(name.encode())) for name in STREAMS}
    return {name: pressure for name, pressure in said.items() if pressure is not None}


def _id(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def _after(entry_id: str) -> tuple[int, int]:
    milliseconds, number = _id(entry_id)
    return milliseconds, number + 1
