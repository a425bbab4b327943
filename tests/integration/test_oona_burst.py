"""A flood of NORMAL telemetry and some CRITICAL in it: who is delivered, what is dropped, and where everything goes.

A slice of what bench_oona measures. Times are judged by the median, which a busy machine does not move much.
"""

import asyncio
from collections import Counter

import pytest
from esper_leyline.oona import EMERGENCY, TELEMETRY, Housekeeper, Oona, OonaConfig, Publisher, Status
from esper_leyline.oona.admission import HIGH_DEPTH, HIGH_PER_MINUTE, SOFT_DEPTH
from esper_leyline.oona.streams import FIELD
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.telemetry_pb2 import TelemetryPacket
from redis.asyncio import Redis

from tests.bench.bench_oona import DELIVERY_LIMIT_MS, burst, packet, unread_backlog
from tests.bench.common import quantile
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(180)
PRIORITIES = (
    pb.MESSAGE_PRIORITY_LOW,
    pb.MESSAGE_PRIORITY_NORMAL,
    pb.MESSAGE_PRIORITY_HIGH,
    pb.MESSAGE_PRIORITY_CRITICAL,
)


@pytest.fixture
async def bus():
    with RedisServer() as server:
        async with Oona(OonaConfig(url=server.url, timeout_s=10.0, block_s=0.2)) as oona:
            async with Redis.from_url(server.url) as admin:
                yield oona, admin


@pytest.mark.row("T27", "K13")
@pytest.mark.parametrize(("backlog", "normal"), [(0, "published"), (HIGH_DEPTH, "dropped")])
async def test_critical_is_delivered_at_once_and_once_whatever_normal_does(bus, backlog, normal):
    oona, admin = bus
    await unread_backlog(admin, backlog)
    found = await burst(oona, normal=500, critical=10)
    assert found.outcomes == {("NORMAL", normal): 500, ("CRITICAL", "published"): 10}
    assert [len(each) for each in found.delivered_ms.values()] == [1] * 10
    assert found.misrouted == 0
    assert quantile([took for (took,) in found.delivered_ms.values()], 0.5) <= DELIVERY_LIMIT_MS


@pytest.mark.row("K13")
async def test_critical_does_not_wait_for_what_normal_waits_for(bus):
    oona, _ = bus
    async with oona._normal.lock:  # a NORMAL message is on its way, and stays so
        waiting = asyncio.ensure_future(oona.publish(TELEMETRY, packet("n", pb.MESSAGE_PRIORITY_NORMAL)))
        sent = await oona.publish(EMERGENCY, packet("c", pb.MESSAGE_PRIORITY_CRITICAL))
        assert sent.status is Status.PUBLISHED
        assert not waiting.done()
    assert (await waiting).status is Status.PUBLISHED


@pytest.mark.row("K39")
@pytest.mark.parametrize("number", [96, 1000])
async def test_below_its_limit_nothing_is_dropped_and_the_backlog_is_what_was_sent(bus, number):
    oona, admin = bus
    await unread_backlog(admin, 0)
    found = await burst(oona, normal=number, critical=0)
    assert found.outcomes == {("NORMAL", "published"): number}
    assert found.deepest == number < SOFT_DEPTH


@pytest.mark.row("K39")
async def test_above_its_limit_the_backlog_does_not_grow(bus):
    oona, admin = bus
    await unread_backlog(admin, HIGH_DEPTH)
    found = await burst(oona, normal=1000, critical=0)
    assert found.outcomes == {("NORMAL", "dropped"): 1000}
    assert found.deepest == HIGH_DEPTH < TELEMETRY.max_length


@pytest.mark.row("K43")
@pytest.mark.parametrize("backlog", [0, HIGH_DEPTH])
async def test_under_load_every_packet_goes_where_its_own_priority_says(bus, backlog):
    oona, admin = bus
    await unread_backlog(admin, backlog)
    await Housekeeper(oona, clock=lambda: 0.0).look()
    publisher = Publisher(oona, clock=lambda: 0.0)
    packets = iter([packet(str(number), PRIORITIES[number % 4]) for number in range(1000)])

    async def send():
        for envelope in packets:
            await publisher.publish(envelope)

    await asyncio.gather(*(send() for _ in range(6)))
    found = {stream.name: Counter() for stream in (TELEMETRY, EMERGENCY)}
    for name, priorities in found.items():
        for _, fields in await admin.xrange(name):
            if fields[FIELD] != b"x":
                envelope = BusEnvelope.FromString(fields[FIELD])
                assert TelemetryPacket.FromString(envelope.payload).priority == envelope.priority
                priorities[envelope.priority] += 1
    low, normal, high, critical = PRIORITIES
    ordinary = {} if backlog else {low: 250, normal: 250}
    # HIGH beyond its rate is let go to the ordinary stream, as HIGH; with no time passing none comes back.
    assert found[EMERGENCY.name] == {high: HIGH_PER_MINUTE, critical: 250}
    assert found[TELEMETRY.name] == {**ordinary, high: 250 - HIGH_PER_MINUTE}
    assert publisher.demoted == 250 - HIGH_PER_MINUTE
