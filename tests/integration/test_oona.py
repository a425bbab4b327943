"""The client of the fabric against a real server that is killed, frozen and full."""

import asyncio
import time
from contextlib import aclosing

import pytest
from esper_leyline.oona import REPORTS, Entry, Oona, OonaConfig, OonaUnavailable, Status, Stream, signals
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import MessagePriority
from redis.asyncio import Redis

from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENT_S, until

pytestmark = pytest.mark.timeout(180)

NORMAL = MessagePriority.MESSAGE_PRIORITY_NORMAL
CRITICAL = MessagePriority.MESSAGE_PRIORITY_CRITICAL


def envelope(text, priority=NORMAL):
    return BusEnvelope(payload=text.encode(), priority=priority)


def text(entry):
    return entry.envelope().payload.decode()


@pytest.fixture
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture
async def oona(server):
    config = OonaConfig(url=server.url, timeout_s=1.0, block_s=0.3, backoff_max_s=0.2)
    async with Oona(config) as client:
        yield client


async def take(generator, count):
    return [await asyncio.wait_for(anext(generator), PATIENT_S) for _ in range(count)]


async def subscribed(admin, channel):
    async def somebody():
        return (await admin.pubsub_numsub(channel))[0][1]

    await until(somebody)


async def published(oona, message, priority=NORMAL):
    """Publishes again and again until Redis has taken it."""

    async def taken():
        return (await oona.publish_report(envelope(message, priority))).status is Status.PUBLISHED

    await until(taken)


async def test_a_report_reaches_stream_and_channel_in_one_transaction(server, oona):
    listening = Oona(oona.config)
    async with listening, aclosing(listening.subscribe(REPORTS.name)) as channel:
        first = asyncio.ensure_future(anext(channel))
        async with Redis.from_url(server.url) as admin:
            await subscribed(admin, REPORTS.name)
        outcome = await oona.publish_report(envelope("one"))
        assert outcome.status is Status.PUBLISHED
        assert await asyncio.wait_for(first, PATIENT_S) == Entry("", envelope("one").SerializeToString())
        assert (await oona.last(REPORTS)).id == outcome.entry_id


async def test_reports_are_read_from_a_position_on_and_then_as_they_come(oona):
    ids = [(await oona.publish_report(envelope(str(n)))).entry_id for n in range(3)]
    async with aclosing(oona.reports(ids[0])) as reports:
        assert [text(e) for e in await take(reports, 2)] == ["1", "2"]
        following = asyncio.ensure_future(anext(reports))
        await oona.publish_report(envelope("3"))
        assert text(await asyncio.wait_for(following, PATIENT_S)) == "3"


async def test_signals_to_many_runs_go_together_and_one_that_redis_refuses_holds_up_no_other(oona, server):
    async with Redis.from_url(server.url) as admin:
        await admin.set(signals("b").name, "no stream")
    outcomes = await oona.publish_signals({uid: envelope(uid, CRITICAL) for uid in ("a", "b", "c")})
    assert [outcome.status for outcome in outcomes.values()] == [Status.PUBLISHED, Status.REFUSED, Status.PUBLISHED]
    assert "WRONGTYPE" in outcomes["b"].detail
    for uid in ("a", "c"):
        newest = await oona.last(signals(uid))
        assert newest is not None
        assert newest.id == outcomes[uid].entry_id


async def test_signals_begin_with_the_newest_one(oona):
    for n in range(3):
        await oona.publish_signal("uid", envelope(str(n), CRITICAL))
    async with aclosing(oona.signals("uid")) as received:
        assert text(await asyncio.wait_for(anext(received), PATIENT_S)) == "2"
        following = asyncio.ensure_future(anext(received))
        await oona.publish_signal("uid", envelope("3", CRITICAL))
        assert text(await asyncio.wait_for(following, PATIENT_S)) == "3"


async def test_streams_are_bounded_and_signals_end_by_themselves(server, oona):
    small = Stream(name="small", max_length=5, exact=True)
    for n in range(12):
        await oona.publish(small, envelope(str(n)))
    await oona.publish_signal("uid", envelope("x"))
    async with Redis.from_url(server.url) as admin:
        assert await admin.xlen("small") == 5
        assert 0 < await admin.ttl(signals("uid").name) <= signals("uid").idle_seconds


async def test_a_dead_redis_is_an_outcome_then_a_refusal_and_a_recovery(server, oona):
    assert (await oona.publish_report(envelope("before"))).status is Status.PUBLISHED
    assert oona.connected
    server.kill()
    for _ in range(4):
        assert (await oona.publish_report(envelope("x"))).status is Status.UNAVAILABLE
    assert not oona.connected
    refused = await oona.publish_report(envelope("x"))
    assert "waiting" in refused.detail  # not even tried
    server.start()
    await published(oona, "after")
    assert oona.connected


async def test_a_frozen_redis_costs_one_timeout_and_leaks_no_connection(server, oona):
    await oona.publish_report(envelope("before"))
    server.freeze()
    started = time.monotonic()
    outcomes = await asyncio.gather(*(oona.publish_report(envelope("x")) for _ in range(20)))
    assert time.monotonic() - started < len(outcomes) / 2 * oona.config.timeout_s
    assert {outcome.status for outcome in outcomes} == {Status.UNAVAILABLE}
    server.thaw()
    await published(oona, "after")


async def test_cancelled_publications_leave_a_working_client(server, oona):
    await oona.publish_report(envelope("before"))
    server.freeze()
    for _ in range(10):
        task = asyncio.ensure_future(oona.publish_report(envelope("x", CRITICAL)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    server.thaw()
    await published(oona, "after", CRITICAL)


async def test_critical_passes_an_open_breaker_and_is_not_queued_behind_normal(server, oona):
    for priority in (NORMAL, CRITICAL):
        await oona.publish_report(envelope("before", priority))
    await oona._normal.lock.acquire()  # a normal publication that takes its time
    assert (await oona.publish_signal("uid", envelope("stop", CRITICAL))).status is Status.PUBLISHED
    for _ in range(3):
        assert (await oona.publish_report(envelope("x"))).status is Status.UNAVAILABLE
    assert "waiting" in (await oona.publish_report(envelope("x"))).detail
    assert (await oona.publish_signal("uid", envelope("stop", CRITICAL))).status is Status.PUBLISHED


@pytest.mark.parametrize("trouble", ["kill", "freeze"])
async def test_a_reader_goes_on_where_it_was(tmp_path, trouble):
    with RedisServer(data_dir=tmp_path, persistent=True) as server:
        config = OonaConfig(url=server.url, timeout_s=1.0, block_s=0.3, backoff_max_s=0.2)
        async with Oona(config) as reading, Oona(config) as writing, aclosing(reading.reports()) as reports:
            await writing.publish_report(envelope("0"))
            assert [text(e) for e in await take(reports, 1)] == ["0"]
            following = asyncio.ensure_future(anext(reports))
            (server.kill if trouble == "kill" else server.freeze)()
            await asyncio.wait_for(reading.wait_connected(False), PATIENT_S)
            (server.start if trouble == "kill" else server.thaw)()
            await published(writing, "1")
            assert text(await asyncio.wait_for(following, PATIENT_S)) == "1"
            assert reading.connected


async def test_a_reader_begins_anew_when_redis_lost_its_data(server, oona):
    far_ahead = f"{int(time.time() * 1000) + 3_600_000}-0"
    async with Redis.from_url(server.url) as admin:
        await admin.xadd(REPORTS.name, {"e": envelope("old").SerializeToString()}, id=far_ahead)
    async with aclosing(oona.reports()) as reports:
        assert [text(e) for e in await take(reports, 1)] == ["old"]
        following = asyncio.ensure_future(anext(reports))
        server.kill()
        await asyncio.wait_for(oona.wait_connected(False), PATIENT_S)
        server.start()
        async with Oona(oona.config) as writing:
            await published(writing, "new")
        assert text(await asyncio.wait_for(following, PATIENT_S)) == "new"


async def test_a_subscriber_survives_a_frozen_server(server, oona):
    async with aclosing(oona.subscribe("c")) as channel:
        first = asyncio.ensure_future(anext(channel))
        async with Redis.from_url(server.url) as admin:
            await subscribed(admin, "c")
        await asyncio.wait_for(oona.wait_connected(), PATIENT_S)
        server.freeze()
        await asyncio.wait_for(oona.wait_connected(False), PATIENT_S)
        server.thaw()
        async with Oona(oona.config) as writing, asyncio.timeout(PATIENT_S):
            while not first.done():
                await writing.publish(Stream(name="c", max_length=10), envelope("hello"))
                await asyncio.sleep(0.02)
        assert text(await first) == "hello"


async def test_entries_that_are_no_envelopes_are_given_out_as_such(server, oona):
    async with Redis.from_url(server.url) as admin:
        await admin.xadd(REPORTS.name, {"other": b"field"})
        await admin.xadd(REPORTS.name, {"e": b"\xff\xff\xff"})
        await admin.xadd(REPORTS.name, {"e": b"\0" * 400_000})
    await oona.publish_report(envelope("good"))
    async with aclosing(oona.reports()) as reports:
        found = await take(reports, 4)
    assert [entry.envelope() for entry in found[:3]] == [None, None, None]
    assert text(found[3]) == "good"


async def test_a_full_redis_refuses_and_that_is_no_transport_failure():
    with RedisServer(maxmemory="1mb", **{"maxmemory-policy": "noeviction"}) as server:
        async with Oona(OonaConfig(url=server.url)) as oona:
            statuses = [(await oona.publish_report(envelope("x" * 100_000))).status for _ in range(30)]
            assert statuses[-1] is Status.REFUSED
            assert oona.connected


async def test_a_wrong_password_is_said_and_a_right_one_works(tmp_path):
    with RedisServer(password="secret") as server:
        (tmp_path / "url").write_text(server.url)
        (tmp_path / "password").write_text("wrong")
        config = OonaConfig.from_directory(tmp_path)
        async with Oona(config) as oona:
            refused = await oona.publish_report(envelope("x"))
            assert (refused.status, "password" in refused.detail.lower()) == (Status.UNAVAILABLE, True)
            with pytest.raises(OonaUnavailable, match=r"(?i)password"):
                await oona.last(REPORTS)
            (tmp_path / "password").write_text("secret")
            assert (await oona.publish_report(envelope("x", CRITICAL))).status is Status.PUBLISHED


async def test_an_oversized_envelope_is_a_mistake_of_the_caller(oona):
    with pytest.raises(ValueError, match="at most"):
        await oona.publish_report(envelope("x" * 300_000))


@pytest.mark.slow
async def test_a_cancelled_reader_always_ends(server, oona):
    """asyncio.wait_for of Python 3.11 loses a cancellation that comes together with its result."""

    async def read(client):
        async with aclosing(client.reports()) as reports:
            async for _ in reports:
                pass

    for n in range(150):
        reader = asyncio.create_task(read(oona))
        await asyncio.sleep(n * 0.0001)
        reader.cancel()
        done, _ = await asyncio.wait([reader], timeout=3)
        assert done, f"the reader of round {n} ignores its cancellation"
        assert reader.cancelled()
