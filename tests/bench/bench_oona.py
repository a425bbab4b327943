"""Oona against bare redis-py on the same payloads and the same commands, and T27/K13: what a flood does to CRITICAL.

.venv/bin/python tests/bench/bench_oona.py [--rounds 30] [--calls 100] [--bursts 5] [--only publish,consume,burst]

Publish: Oona's `publish` of an envelope that is sealed already, against `pipeline(transaction=True)` with the same XADD
and PUBLISH of the same bytes on one connection (redis.asyncio). Consume: Oona's Consumer (group, contract checked, one
acknowledgement per message) against XREADGROUP of as many and an XACK for each. Rounds take turns in one process, with
a real server of the chart's settings; one call at a time, so throughput is the inverse of the median.

Burst: 10,000 NORMAL packets from six senders and 10 CRITICAL ones among them, through the Publisher, once while there
is room and then while telemetry is at its limit (nobody reads it, the housekeeper has said so). A CRITICAL packet is
delivered when a consumer's handler has it. Printed: what became of each, misrouted packets, and the longest backlog.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline.oona import (
    EMERGENCY,
    NORMAL,
    TELEMETRY,
    Consumer,
    ConsumerOptions,
    Delivery,
    Housekeeper,
    Oona,
    OonaConfig,
    Publisher,
    Status,
    Stream,
)
from esper_leyline.oona.admission import HIGH_DEPTH
from esper_leyline.oona.streams import FIELD
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.telemetry_pb2 import TelemetryPacket
from redis.asyncio import Redis

from tests.bench import nerves
from tests.bench.common import machine, quantile, ratio, section, tail

SIZES = (32, 1024, 16 * 1024)
KEY = SigningKey.derive(b"s" * 32, "run", Role.REPORT)
SENDERS = 6
NORMAL_PACKETS, CRITICAL_PACKETS = 10_000, 10
PAGE = 1000
DELIVERY_LIMIT_MS = 100.0
LOOK_S = 0.25
GROUP = "bench"


def sealed(payload: bytes, kind: pb.BusMessageType, priority: pb.MessagePriority) -> BusEnvelope:
    return seal(payload, kind, run_uid="run", key=KEY, priority=priority)


def report(size: int) -> BusEnvelope:
    return sealed(b"x" * size, pb.BUS_MESSAGE_TYPE_FIELD_REPORT, pb.MESSAGE_PRIORITY_NORMAL)


async def each_ms(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        await call()
        found.append((time.perf_counter() - began) * 1e3)
    return found


def compared(name: str, ours: list[list[float]], bare: list[list[float]]) -> None:
    """Rounds of single calls."""
    section(name)
    for word, rounds in (("Oona", ours), ("bare redis-py", bare)):
        together = [ms for one in rounds for ms in one]
        print(tail(word, together))
        print(f"  {'':30} {1e3 / statistics.fmean(together):.0f} a second")
    print(ratio("median, Oona / bare", *([statistics.median(one) for one in side] for side in (ours, bare))))
    print(ratio("p99, Oona / bare", *([quantile(one, 0.99) for one in side] for side in (ours, bare))), flush=True)


async def publishing(oona: Oona, bare: "Redis[bytes]", size: int, rounds: int, calls: int) -> None:
    envelope = report(size)
    raw = envelope.SerializeToString()

    async def ours() -> None:
        assert (await oona.publish(NORMAL, envelope)).status is Status.PUBLISHED

    async def plainly() -> None:
        async with bare.pipeline(transaction=True) as transaction:
            transaction.xadd(NORMAL.name, {FIELD: raw}, maxlen=NORMAL.max_length, approximate=True)
            transaction.publish(NORMAL.name, raw)
            await transaction.execute()

    taken: dict[str, list[list[float]]] = {"ours": [], "bare": []}
    sides = {"ours": ours, "bare": plainly}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            taken[name].append(await each_ms(sides[name], calls))
    compared(f"publish, {size} B", taken["ours"], taken["bare"])


async def consuming(oona: Oona, bare: "Redis[bytes]", size: int, rounds: int, calls: int) -> None:
    """A round's messages are there before it is timed; a value is the time per message."""
    raw = report(size).SerializeToString()
    taken: dict[str, list[list[float]]] = {"ours": [], "bare": []}
    sides = {"ours": _consumed, "bare": _plainly_consumed}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            await bare.delete(NORMAL.name)
            await bare.xgroup_create(NORMAL.name, GROUP, id="0", mkstream=True)
            filling = bare.pipeline(transaction=False)
            for _ in range(calls):
                filling.xadd(NORMAL.name, {FIELD: raw})
            await filling.execute()
            taken[name].append(await sides[name](oona, bare, calls))
    compared(f"consume and acknowledge, {size} B", taken["ours"], taken["bare"])


async def _consumed(oona: Oona, bare: "Redis[bytes]", calls: int) -> list[float]:
    """Milliseconds from one message's handler to the next one's, the acknowledgement between them."""
    marks: list[float] = []
    done = asyncio.Event()

    async def handler(delivery: Delivery) -> None:
        marks.append(time.perf_counter())
        if len(marks) == calls:
            done.set()

    task = asyncio.create_task(Consumer(oona, NORMAL, group=GROUP, name="a", handler=handler).run())
    await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return [(after - before) * 1e3 for before, after in pairwise(marks)]


async def _plainly_consumed(oona: Oona, bare: "Redis[bytes]", calls: int) -> list[float]:
    marks: list[float] = []
    while len(marks) < calls:
        found = await bare.xreadgroup(GROUP, "a", {NORMAL.name: ">"}, count=ConsumerOptions().batch, block=1000)
        for name, _ in found[0][1]:
            marks.append(time.perf_counter())
            await bare.xack(NORMAL.name, GROUP, name)
    return [(after - before) * 1e3 for before, after in pairwise(marks)]


# The burst


@dataclass
class Burst:
    """What became of it."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    handed_at: dict[str, float] = field(default_factory=dict)
    delivered_ms: dict[str, list[float]] = field(default_factory=dict)
    """By packet; more than one value would be one delivery too many."""
    misrouted: int = 0
    deepest: int = 0
    seconds: float = 0.0

    async def take(self, delivery: Delivery) -> None:
        """Handler on the emergency stream."""
        packet = TelemetryPacket.FromString(delivery.envelope.payload)
        priority = delivery.envelope.priority
        self.misrouted += packet.priority != priority or priority < pb.MESSAGE_PRIORITY_HIGH
        if packet.packet_id in self.handed_at:
            took = (time.perf_counter() - self.handed_at[packet.packet_id]) * 1e3
            self.delivered_ms.setdefault(packet.packet_id, []).append(took)


def packet(name: str, priority: pb.MessagePriority) -> BusEnvelope:
    made = TelemetryPacket(packet_id=name, source_subsystem="tolaria", level=1, priority=priority)
    return sealed(made.SerializeToString(), pb.BUS_MESSAGE_TYPE_TELEMETRY, priority)


async def burst(oona: Oona, *, normal: int, critical: int, name: str = "burst") -> Burst:
    """Six senders of NORMAL at full speed; CRITICAL evenly among them, each sent at its time whatever else waits."""
    found, publisher = Burst(), Publisher(oona)
    ordinary = [packet(f"{name}-n{number}", pb.MESSAGE_PRIORITY_NORMAL) for number in range(normal)]
    urgent = [packet(f"{name}-c{number}", pb.MESSAGE_PRIORITY_CRITICAL) for number in range(critical)]
    queue = iter(ordinary)
    sent = 0

    async def send(envelope: BusEnvelope, word: str) -> None:
        outcome = await publisher.publish(envelope)
        found.outcomes[word, outcome.status] += 1

    async def flood() -> None:
        nonlocal sent
        for envelope in queue:
            await send(envelope, "NORMAL")
            sent += 1
            await asyncio.sleep(0)  # where nothing is sent any more, nothing waits either

    async def alarm(number: int) -> None:
        while sent < normal * (number + 0.5) / critical:  # noqa: ASYNC110 - a place in the flood, not a time
            await asyncio.sleep(0)
        envelope = urgent[number]
        found.handed_at[f"{name}-c{number}"] = time.perf_counter()
        await send(envelope, "CRITICAL")

    async with consuming_emergencies(oona, found), housekeeping(oona, found):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(SENDERS):
                tasks.create_task(flood())
            for number in range(critical):
                tasks.create_task(alarm(number))
        found.seconds = time.perf_counter() - began
        async with asyncio.timeout(20.0):
            while len(found.delivered_ms) < critical:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    found.misrouted += await strangers(oona, TELEMETRY)
    return found


async def strangers(oona: Oona, stream: Stream) -> int:
    """Entries of the ordinary stream that belong on the other one."""
    entries: list[tuple[bytes, dict[bytes, bytes]]] = []
    async with oona.connection() as client:
        while more := await client.xrange(stream.name, f"({entries[-1][0].decode()}" if entries else "-", count=PAGE):
            entries += more
    urgent = (pb.MESSAGE_PRIORITY_HIGH, pb.MESSAGE_PRIORITY_CRITICAL)
    found = (BusEnvelope.FromString(fields[FIELD]).priority for _, fields in entries if fields[FIELD] != b"x")
    return sum(priority in urgent for priority in found)


@contextlib.asynccontextmanager
async def consuming_emergencies(oona: Oona, into: Burst) -> AsyncIterator[None]:
    consumer = Consumer(
        oona, EMERGENCY, group=GROUP, name="a", handler=into.take, options=ConsumerOptions(once=True, batch=1)
    )
    async with _running(consumer.run()):
        yield


@contextlib.asynccontextmanager
async def housekeeping(oona: Oona, into: Burst) -> AsyncIterator[None]:
    """As the operator does, and more often; notes the backlog."""
    keeper = Housekeeper(oona, clock=time.monotonic)

    async def look() -> None:
        while True:
            into.deepest = max(into.deepest, (await keeper.look())[TELEMETRY.name].depth)
            await asyncio.sleep(LOOK_S)

    await keeper.look()
    async with _running(look()):
        yield
    into.deepest = max(into.deepest, (await keeper.look())[TELEMETRY.name].depth)


@contextlib.asynccontextmanager
async def _running(coroutine: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def unread_backlog(bare: "Redis[bytes]", entries: int) -> None:
    """A group on telemetry that reads nothing, with so many entries before it."""
    await bare.delete(TELEMETRY.name, EMERGENCY.name)
    await bare.xgroup_create(TELEMETRY.name, "slow", id="0", mkstream=True)
    filling = bare.pipeline(transaction=False)
    for _ in range(entries):
        filling.xadd(TELEMETRY.name, {FIELD: b"x"})
    if entries:
        await filling.execute()


async def bursting(oona: Oona, bare: "Redis[bytes]", bursts: int, normal: int) -> None:
    for title, backlog in (("while there is room", 0), ("at its limit", HIGH_DEPTH)):
        together, delivered = Counter[tuple[str, str]](), []
        doubles = misrouted = deepest = 0
        seconds = 0.0
        for number in range(bursts):
            await unread_backlog(bare, backlog)
            found = await burst(oona, normal=normal, critical=CRITICAL_PACKETS, name=f"{backlog}-{number}")
            together += found.outcomes
            delivered += [took for each in found.delivered_ms.values() for took in each[:1]]
            doubles += sum(len(each) - 1 for each in found.delivered_ms.values())
            misrouted, deepest = misrouted + found.misrouted, max(deepest, found.deepest)
            seconds += found.seconds
        section(f"{bursts} x {normal:,} NORMAL and {CRITICAL_PACKETS} CRITICAL, {title}")
        print(tail("CRITICAL, handed over to handler", delivered, goal="T27", limit=DELIVERY_LIMIT_MS))
        counts = ", ".join(f"{priority} {status} {count}" for (priority, status), count in sorted(together.items()))
        print(f"  {counts}; CRITICAL delivered {len(delivered)}, twice {doubles}; misrouted {misrouted}")
        print(
            f"  longest backlog {deepest} of {TELEMETRY.max_length}; {sum(together.values()) / seconds:.0f} a second",
            flush=True,
        )


async def measure(arguments: argparse.Namespace) -> None:
    with nerves.places(arguments.disk) as (_, durable), nerves.redis_server(durable) as server:
        async with Oona(OonaConfig(url=server.url)) as oona, Redis.from_url(server.url) as bare:
            for size in SIZES:
                if "publish" in arguments.only:
                    await publishing(oona, bare, size, arguments.rounds, arguments.calls)
                if "consume" in arguments.only:
                    await consuming(oona, bare, size, arguments.rounds, arguments.calls)
            if "burst" in arguments.only:
                await bursting(oona, bare, arguments.bursts, arguments.normal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=100, help="per round and side")
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--normal", type=int, default=NORMAL_PACKETS, help="per burst")
    parser.add_argument("--only", default="publish,consume,burst")
    parser.add_argument("--disk", type=Path, help="directory on a disk, for Redis; default: of temporary files")
    arguments = parser.parse_args()
    print(machine())
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
