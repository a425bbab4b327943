"""A Redis that dies may forget what it has acknowledged: its file is synced once a second. It comes again, once.

Here it forgets everything, which is more than a second's worth; all was sent within the time that is made good.
"""

import asyncio
import contextlib
from contextlib import aclosing

import pytest
from esper_leyline.oona import (
    EMERGENCY,
    NORMAL,
    REPORTS,
    TELEMETRY,
    Admission,
    Consumer,
    ConsumerOptions,
    Done,
    Oona,
    OonaConfig,
)
from esper_leyline.v1 import common_pb2 as common
from esper_leyline.v1.report_pb2 import Notice
from redis.asyncio import Redis

from tests.integration.test_oona_consumer import Desk, message
from tests.integration.test_telemetry import Pod, Reader, sending
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.weatherlight import PodFiles, boot, event, opened

pytestmark = pytest.mark.timeout(180)
ONCE = ConsumerOptions(once=True)
TEXTS = [str(number) for number in range(20)]


@pytest.fixture
def server():
    with RedisServer() as running_server:
        yield running_server


@pytest.fixture
async def oona(server):
    config = OonaConfig(url=server.url, timeout_s=1.0, block_s=0.2, backoff_max_s=0.2)
    async with Oona(config) as client:
        yield client


@contextlib.asynccontextmanager
async def handling(oona, stream, handler, done=None, *, group="g", options=ONCE):
    consumer = Consumer(oona, stream, group=group, name="n", handler=handler, options=options, done=done)
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_reports_that_redis_forgot_are_published_again(server, oona, tmp_path):
    pod = PodFiles(tmp_path, redis_url=server.url)
    pod.start()
    try:
        await until(pod.ready)
        pod.journal.append(boot())
        for text in TEXTS:
            pod.journal.append(event(notice=Notice(message=text)))

        async def acknowledged():
            newest = await oona.last(REPORTS)
            return newest is not None and opened(newest.raw).notice.message == TEXTS[-1]

        await until(acknowledged)
        server.kill()
        server.start()
        found = []
        async with aclosing(oona.reports()) as reports:
            async for entry in reports:  # an operator that begins only now
                found.append(opened(entry.raw))
                if found[-1].notice.message == TEXTS[-1]:
                    break
    finally:
        pod.close()
    taken = {report.seq: report for report in found}  # what comes again is the same
    assert list(taken) == sorted(taken)
    assert [report.notice.message for report in taken.values() if report.WhichOneof("event") == "notice"] == TEXTS


@pytest.mark.parametrize(("level", "stream"), [("INFO", TELEMETRY), ("CRITICAL", EMERGENCY)])
async def test_telemetry_that_redis_forgot_is_sent_again_and_read_once(server, oona, tmp_path, level, stream):
    pod = Pod(tmp_path)
    early, late = Reader(), Reader()
    async with sending(pod.telemetry(), oona):
        async with handling(oona, stream, early, group="early"):
            for text in TEXTS:
                pod.say(level, text)
            await until(lambda: early.texts == TEXTS)
            server.kill()
            server.start()
            pod.say(level, "after")
            await until(lambda: "after" in early.texts)
        async with handling(oona, stream, late, group="late"):
            await until(lambda: len(late.texts) > len(TEXTS))
    assert sorted(late.texts) == sorted([*TEXTS, "after"])
    assert sorted(early.texts) == sorted([*TEXTS, "after"]), "what was handled is not handled again"


async def test_what_is_sent_again_counts_once_against_the_cap(server, oona, tmp_path):
    """A Redis that comes and goes must not cost critical telemetry, which the second time nobody would count."""
    pod, reader = Pod(tmp_path), Reader()
    admission = Admission(lambda: 0.0, critical_per_minute=len(TEXTS) + 1)  # never refilled
    async with sending(pod.telemetry(), oona, admission):
        async with handling(oona, EMERGENCY, reader):
            for text in TEXTS:
                pod.say("CRITICAL", text)
            await until(lambda: reader.texts == TEXTS)
        server.kill()
        pod.say("CRITICAL", "while it is away")
        await until(lambda: oona.interruptions)
        server.start()
        late = Reader()
        async with handling(oona, EMERGENCY, late, group="late"):
            await until(lambda: len(late.texts) > len(TEXTS))
        pod.say("CRITICAL", "too many")
        await until(lambda: admission.coalesced)
    assert sorted(late.texts) == sorted([*TEXTS, "while it is away"])


async def test_what_was_demoted_stays_so_when_it_is_sent_again(server, oona, tmp_path):
    pod, reader = Pod(tmp_path), Reader()
    admission = Admission(lambda: 0.0, high_per_minute=1)  # never refilled
    async with sending(pod.telemetry(), oona, admission):
        async with handling(oona, TELEMETRY, reader):
            for text in TEXTS:
                pod.say("WARNING", text)
            await until(lambda: len(reader.texts) == len(TEXTS) - 1)
        server.kill()
        server.start()
        pod.say("INFO", "after")
        late, urgent = Reader(), Reader()
        async with handling(oona, TELEMETRY, late, group="late"), handling(oona, EMERGENCY, urgent, group="late"):
            await until(lambda: len(late.texts) + len(urgent.texts) == len(TEXTS) + 1)
    assert (urgent.texts, sorted(late.texts)) == (TEXTS[:1], sorted([*TEXTS[1:], "after"]))


@pytest.mark.parametrize("other", [NORMAL, TELEMETRY])
async def test_what_is_done_is_not_done_again_when_redis_forgot_that_it_is(server, oona, other):
    """Nor when it comes again on another stream of the group."""
    desk, done = Desk(), Done()
    envelope = message("once", kind=common.BUS_MESSAGE_TYPE_FIELD_REPORT)
    async with handling(oona, NORMAL, desk, done) as first, handling(oona, TELEMETRY, desk, done) as second:
        await oona.publish(NORMAL, envelope)
        await until(lambda: desk.done == ["once"])
        server.kill()
        server.start()

        async def again():
            await oona.publish(other, envelope)
            return (first if other is NORMAL else second).stats.duplicates

        await until(again)
    assert desk.done == ["once"]


async def test_more_taken_back_than_there_is_room_for_holds_nothing_up(server, oona):
    """Entries that Redis forgot are still being worked on here when they are taken again under new names."""
    desk = Desk()
    for number in range(6):
        await oona.publish(NORMAL, message(str(number)))
    async with Redis.from_url(server.url) as admin:
        await admin.xgroup_create(NORMAL.name, "g", id="0")
        await admin.xreadgroup("g", "n", {NORMAL.name: ">"})  # an earlier life of the same consumer
        desk.open.clear()
        options = ConsumerOptions(max_outstanding=4, claim_every_s=0.05)
        async with handling(oona, NORMAL, desk, options=options):
            await until(lambda: desk.attempts)
            await oona.publish(NORMAL, message("new"))
            desk.open.set()
            await until(lambda: "new" in desk.done)
    assert desk.done == [*map(str, range(6)), "new"]
