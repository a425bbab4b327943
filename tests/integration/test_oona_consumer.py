"""Delivery through groups, against a real server: at least once, once where asked, and given up only in plain sight."""

import asyncio
import contextlib
from collections import Counter

import pytest
from esper_leyline.oona import (
    DEAD_LETTERS,
    EMERGENCY,
    NORMAL,
    TELEMETRY,
    Consumer,
    ConsumerOptions,
    Housekeeper,
    Oona,
    OonaConfig,
    Pressure,
    Publisher,
    Rejected,
    ReplayError,
    RetryLater,
    Status,
    dead_letters,
    replay,
)
from esper_leyline.oona.admission import HIGH_DEPTH
from esper_leyline.signing import Role, SigningKey, Verifier, seal
from esper_leyline.v1 import common_pb2 as pb
from esper_leyline.v1.bus_pb2 import BusEnvelope, DeadLetterReason
from redis.asyncio import Redis

from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENT_S, until

pytestmark = pytest.mark.timeout(180)
KEY = SigningKey.derive(b"s" * 32, "run", Role.REPORT)
QUICK = {"claim_every_s": 0.1, "claim_idle_s": 0.2, "retry_first_s": 0.01, "retry_max_s": 0.02}


def message(text, priority=pb.MESSAGE_PRIORITY_NORMAL, kind=pb.BUS_MESSAGE_TYPE_FIELD_REPORT):
    return seal(text.encode(), kind, run_uid="run", key=KEY, priority=priority)


@pytest.fixture
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture
async def oona(server):
    config = OonaConfig(url=server.url, timeout_s=1.0, block_s=0.2, backoff_max_s=0.2)
    async with Oona(config) as client:
        yield client


@pytest.fixture
async def admin(server):
    async with Redis.from_url(server.url) as client:
        yield client


class Desk:
    """A handler that remembers what it has done, and fails as often as it is told."""

    def __init__(self, failures=0):
        self.done = []
        self.attempts = []
        self.failures = failures
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, delivery):
        text = delivery.envelope.payload.decode()
        self.attempts.append((text, delivery.attempt))
        await self.open.wait()
        if self.failures > 0:
            self.failures -= 1
            raise RetryLater("not now")
        self.done.append(text)


@contextlib.asynccontextmanager
async def running(oona, handler, *, name="a", group="g", stream=NORMAL, judge=lambda envelope: None, **options):
    consumer = Consumer(
        oona, stream, group=group, name=name, handler=handler, judge=judge, options=ConsumerOptions(**QUICK | options)
    )
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def pending(admin, stream=NORMAL, group="g"):
    return (await admin.xpending(stream.name, group))["pending"]


async def test_what_was_published_before_the_first_consumer_came_is_handled_in_order(oona, admin):
    for number in range(100):
        await oona.publish(NORMAL, message(str(number)))
    desk = Desk()
    async with running(oona, desk) as consumer:
        await until(lambda: len(desk.done) == 100)
    assert desk.done == [str(number) for number in range(100)]
    assert consumer.stats.handled == 100


async def test_each_group_gets_every_message_and_consumers_of_one_group_share_them(oona):
    shared, other = [Desk(), Desk()], Desk()
    async with running(oona, shared[0], name="a"), running(oona, shared[1], name="b"), running(oona, other, group="h"):
        for number in range(50):
            await oona.publish(NORMAL, message(str(number)))
        await until(lambda: len(other.done) == 50 and len(shared[0].done) + len(shared[1].done) == 50)
    assert Counter(shared[0].done + shared[1].done) == Counter(map(str, range(50)))


async def test_the_work_of_a_consumer_that_died_is_done_by_another(oona, admin):
    stuck, desk = Desk(), Desk()
    stuck.open.clear()
    for number in range(5):
        await oona.publish(NORMAL, message(str(number)))
    async with running(oona, stuck, name="dead"):
        await until(lambda: stuck.attempts)
        await until(lambda: pending(admin))
    async with running(oona, desk, name="alive") as consumer:
        await until(lambda: len(desk.done) == 5)
        await until(lambda: consumer.stats.claimed == 5)
    assert sorted(desk.done) == sorted(map(str, range(5)))


async def test_a_consumer_that_comes_back_begins_with_what_it_had_taken(oona, admin):
    stuck, desk = Desk(), Desk()
    stuck.open.clear()
    await oona.publish(NORMAL, message("begun"))
    async with running(oona, stuck, name="a"):
        await until(lambda: stuck.attempts)
    await oona.publish(NORMAL, message("new"))
    async with running(oona, desk, name="a", claim_idle_s=3600.0):
        await until(lambda: len(desk.done) == 2)
    assert desk.attempts == [("begun", 2), ("new", 1)]


async def test_a_failing_handler_is_asked_again_and_holds_nobody_up(oona, admin):
    desk = Desk(failures=2)
    async with running(oona, desk) as consumer:
        for text in ("first", "second", "third"):
            await oona.publish(NORMAL, message(text))
        await until(lambda: len(desk.done) == 3)
        await until(lambda: pending_is_empty(admin))
    assert consumer.stats.retried == 2
    assert not await admin.exists(DEAD_LETTERS.name)


async def pending_is_empty(admin, stream=NORMAL, group="g"):
    return await pending(admin, stream, group) == 0


async def test_a_message_that_fails_as_often_as_it_may_is_a_dead_letter_and_can_be_replayed(oona, admin):
    desk = Desk(failures=3)
    async with running(oona, desk, max_attempts=3, once=True) as consumer:
        await oona.publish(NORMAL, message("poison"))
        (kept,) = await until(lambda: dead_letters(oona))
        assert kept.letter.reason == DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED
        assert (kept.letter.stream, kept.letter.group, kept.letter.delivery_attempts) == (NORMAL.name, "g", 3)
        assert kept.letter.detail == "not now"
        assert await pending_is_empty(admin)
        assert consumer.stats.dead == {"HANDLER_FAILED": 1}
        new = await replay(oona, [kept.id])
        await until(lambda: desk.done == ["poison"])
        assert await dead_letters(oona) == []
        assert set(new) == {kept.id}
        with pytest.raises(ReplayError, match="there is no dead letter"):
            await replay(oona, [kept.id])


@pytest.mark.row("T29", "K11")
@pytest.mark.parametrize("priority", ["LOW", "NORMAL", "HIGH", "CRITICAL"])
async def test_a_message_is_the_same_to_its_last_try_as_a_dead_letter_and_when_it_is_replayed(oona, priority):
    """Its priority above all: whoever passes it on knows no other."""
    sent = message("poison")
    sent.priority = pb.MessagePriority.Value(f"MESSAGE_PRIORITY_{priority}")
    received = []

    async def handler(delivery):
        received.append(delivery.envelope)
        if len(received) <= 2:
            raise RetryLater("not now")

    async with running(oona, handler, max_attempts=2):
        await oona.publish(NORMAL, sent)
        (kept,) = await until(lambda: dead_letters(oona))
        assert BusEnvelope.FromString(kept.letter.envelope) == sent
        await replay(oona, [kept.id])
        await until(lambda: len(received) == 3)
    assert received == [sent] * 3


async def test_a_handler_that_takes_too_long_is_ended_and_told(oona):
    desk = Desk()
    desk.open.clear()
    async with running(oona, desk, max_attempts=2, handler_timeout_s=0.05):
        await oona.publish(NORMAL, message("slow"))
        (kept,) = await until(lambda: dead_letters(oona))
    assert kept.letter.reason == DeadLetterReason.DEAD_LETTER_REASON_HANDLER_TIMEOUT


@pytest.mark.row("K12")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff\xff\xff", "UNDECODABLE"),
        (b"\0" * 300_000, "OVERSIZED"),
        (BusEnvelope(payload=b"x", message_type=4).SerializeToString(), "MISSING_PRIORITY"),
        (BusEnvelope(payload=b"x", priority=2).SerializeToString(), "INVALID"),
        (BusEnvelope(payload=b"x", priority=2, message_type=4, key_id="k", signature=b"s").SerializeToString(),
         "BAD_SIGNATURE"),
    ],
)  # fmt: skip
async def test_poison_is_a_dead_letter_at_once_with_its_reason(oona, admin, raw, reason):
    verifier = Verifier.from_text(KEY.public_text())

    def judge(envelope):
        from esper_leyline.signing import SignatureError

        try:
            verifier.check_envelope(envelope)
        except SignatureError as error:
            raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_BAD_SIGNATURE, error.reason) from error

    desk = Desk()
    async with running(oona, desk, judge=judge):
        await admin.xadd(NORMAL.name, {"e": raw})
        (kept,) = await until(lambda: dead_letters(oona))
        assert DeadLetterReason.Name(kept.letter.reason) == f"DEAD_LETTER_REASON_{reason}"
        await oona.publish(NORMAL, message("good"))
        await until(lambda: desk.done == ["good"])
    assert desk.attempts == [("good", 1)]


async def test_a_message_published_twice_is_handled_once_per_group(oona):
    desk, other = Desk(), Desk()
    twice = message("twice")
    async with running(oona, desk, once=True) as consumer, running(oona, other, group="h", once=True):
        await oona.publish(NORMAL, twice)
        await oona.publish(NORMAL, twice)
        await oona.publish(NORMAL, message("end"))
        await until(lambda: "end" in desk.done and "end" in other.done)
        await until(lambda: consumer.stats.duplicates == 1)
    assert (desk.done, other.done) == (["twice", "end"], ["twice", "end"])


async def test_two_consumers_never_handle_one_message_at_a_time(oona):
    """The same envelope under two entries, one with each consumer: the second waits for the first."""
    first, second = Desk(), Desk()
    first.open.clear()
    twice = message("twice")
    async with running(oona, first, name="a", once=True, claim_idle_s=60.0, max_outstanding=1):
        await oona.publish(NORMAL, twice)
        await until(lambda: first.attempts)
        async with running(oona, second, name="b", once=True, claim_idle_s=60.0) as consumer:
            await oona.publish(NORMAL, twice)
            await oona.publish(NORMAL, message("other"))
            await until(lambda: "other" in second.done)
            assert "twice" not in second.done
            first.open.set()
            await until(lambda: consumer.stats.duplicates == 1)
    assert (first.done, second.done) == (["twice"], ["other"])


async def test_a_handlers_own_error_ends_the_consumer_and_the_entry_counts_as_tried(oona):
    async def broken(delivery):
        raise KeyError("a mistake in the handler")

    await oona.publish(NORMAL, message("crash"))
    for _ in range(3):
        consumer = Consumer(oona, NORMAL, group="g", name="a", handler=broken, options=ConsumerOptions(max_attempts=3))
        with pytest.raises(ExceptionGroup, match="TaskGroup") as caught:
            await asyncio.wait_for(consumer.run(), PATIENT_S)
        assert caught.group_contains(KeyError)
    desk = Desk()
    async with running(oona, desk, max_attempts=3):
        (kept,) = await until(lambda: dead_letters(oona))
    assert kept.letter.reason == DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED
    assert "its consumer ended" in kept.letter.detail


async def test_a_consumer_survives_redis_and_what_is_done_is_not_done_again(server, oona):
    desk = Desk()
    async with running(oona, desk):
        await oona.publish(NORMAL, message("before"))
        await until(lambda: desk.done == ["before"])
        server.kill()
        server.start()  # empty: streams and groups are gone

        async def arrived():
            await oona.publish(NORMAL, message("after"))
            return "after" in desk.done

        await until(arrived)
    assert desk.done.count("before") == 1


async def test_an_answer_that_redis_did_not_take_is_given_again(server, oona):
    desk = Desk()
    desk.open.clear()
    async with running(oona, desk, claim_idle_s=60.0, handler_timeout_s=PATIENT_S) as consumer:
        await oona.publish(NORMAL, message("slow"))
        await until(lambda: desk.attempts)
        server.freeze()
        desk.open.set()
        await until(lambda: not oona.connected)
        server.thaw()
        async with Redis.from_url(server.url) as admin:
            await until(lambda: pending_is_empty(admin))
    assert desk.done == ["slow"]
    assert consumer.stats.handled == 1


# Housekeeping


async def test_only_what_every_group_has_done_is_trimmed(oona, admin):
    stuck, desk = Desk(), Desk()
    stuck.open.clear()
    old = 1_000_000_000_000
    for number in range(10):
        await admin.xadd(NORMAL.name, {"e": message(str(number)).SerializeToString()}, id=f"{old + number}-0")
    keeper = Housekeeper(oona, clock=lambda: 0.0)
    async with running(oona, desk, group="fast"), running(oona, stuck, group="slow", claim_idle_s=60.0):
        await until(lambda: len(desk.done) == 10 and stuck.attempts)
        await until(lambda: pending_is_empty(admin, group="fast"))
        state = (await keeper.look())[NORMAL.name]
        assert (state.length, state.trimmed) == (10, 0)
        assert state.oldest_pending_s["slow"] > 3600
        stuck.open.set()
        await until(lambda: pending_is_empty(admin, group="slow"))
        await until(lambda: len(stuck.done) == 10)
    await oona.publish(NORMAL, message("young"))
    await admin.xtrim(NORMAL.name, maxlen=10)
    state = (await keeper.look())[NORMAL.name]
    assert state.depth == 1


async def test_a_backlog_makes_pressure_that_the_publisher_obeys_but_not_for_what_is_critical(oona, admin):
    await admin.xgroup_create(TELEMETRY.name, "nissa", id="0", mkstream=True)
    pipeline = admin.pipeline()
    for _ in range(HIGH_DEPTH):
        pipeline.xadd(TELEMETRY.name, {"e": b"x"})
    await pipeline.execute()
    now = [0.0]
    keeper, publisher = Housekeeper(oona, clock=lambda: now[0]), Publisher(oona, clock=lambda: now[0])
    state = (await keeper.look())[TELEMETRY.name]
    assert (state.depth, state.pressure) == (HIGH_DEPTH, Pressure.HIGH)

    def telemetry(priority):
        return message("t", priority, pb.BUS_MESSAGE_TYPE_TELEMETRY)

    outcomes = [(await publisher.publish(telemetry(priority))).status for priority in (1, 2, 3, 4)]
    assert outcomes == [Status.DROPPED, Status.DROPPED, Status.PUBLISHED, Status.PUBLISHED]
    assert await admin.xlen(EMERGENCY.name) == 2
    await admin.xtrim(TELEMETRY.name, maxlen=0)
    await admin.xgroup_setid(TELEMETRY.name, "nissa", id="$")
    await keeper.look()
    now[0] += 61.0
    assert (await keeper.look())[TELEMETRY.name].pressure is Pressure.NONE
    assert (await publisher.publish(telemetry(2))).status is Status.PUBLISHED
