"""The run's events on the bus: by their own priority, CRITICAL past all else, nothing lost and nothing twice."""

import asyncio
import contextlib
import time

import pytest
from esper_leyline import contracts, paths
from esper_leyline.events import RunEvent
from esper_leyline.journal import JournalWriter
from esper_leyline.oona import EMERGENCY, TELEMETRY, Consumer, ConsumerOptions, Oona, OonaConfig, Publisher
from esper_leyline.signing import Role, SigningKey, Verifier
from esper_leyline.v1 import common_pb2 as common
from esper_leyline.v1.report_pb2 import Notice, RuntimeEvent
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel, TelemetryPacket
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.reports import Identity
from esper_runtime.weatherlight.telemetry import REPEATS, Telemetry
from prometheus_client import CollectorRegistry

from tests.support.redis_server import RedisServer
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(180)
KEY = SigningKey.derive(b"s" * 32, "run", Role.REPORT)
IDENTITY = Identity(run_uid="run", run="default/digits", attempt=1, rank=0)


@pytest.fixture
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture
async def oona(server):
    config = OonaConfig(url=server.url, timeout_s=1.0, block_s=0.2, backoff_max_s=0.2)
    async with Oona(config) as client:
        yield client


class Pod:
    def __init__(self, directory):
        self.directory = directory
        self.journal = JournalWriter(directory / paths.JOURNAL)
        self.count = 0

    def say(self, level="INFO", text=None, name=RunEvent.NOTICE, writer="tolaria"):
        self.count += 1
        event = RuntimeEvent(
            writer=writer,
            monotonic_ns=time.monotonic_ns(),
            notice=Notice(reason="r", message=text or str(self.count)),
            name=name,
            level=TelemetryLevel.Value(f"TELEMETRY_LEVEL_{level}"),
        )
        event.time.GetCurrentTime()
        self.journal.append(event)

    def telemetry(self, **options):
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        return Telemetry(self.directory, self.directory, identity=IDENTITY, key=lambda: KEY, metrics=metrics, **options)


@pytest.fixture
def pod(tmp_path):
    return Pod(tmp_path)


@contextlib.asynccontextmanager
async def sending(telemetry, oona, admission=None):
    publisher = Publisher(oona, admission=admission)
    workers = (telemetry.read(), telemetry.send_urgent(publisher), telemetry.send_ordinary(publisher))
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        telemetry.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


def stands_for(packet):
    """How many events."""
    return next((int(point.value) for point in packet.metrics if point.name == REPEATS), 1)


def value(pod, name, **labels):
    return pod.registry.get_sample_value(f"esper_{name}", labels)


class Reader:
    """Nissa's side: every packet once."""

    def __init__(self):
        self.texts = []
        self.priorities = []
        self.packets = []
        self.verifier = Verifier.from_text(KEY.public_text())

    async def __call__(self, delivery):
        self.verifier.check_envelope(delivery.envelope)
        packet = TelemetryPacket.FromString(delivery.envelope.payload)
        assert packet.priority == delivery.envelope.priority
        self.priorities.append(packet.priority)
        self.packets.append(packet)
        self.texts += [event.description.removeprefix("r: ") for event in packet.events]

    @contextlib.asynccontextmanager
    async def reading(self, oona, *streams):
        options = ConsumerOptions(once=True, claim_every_s=0.2, claim_idle_s=5.0)
        tasks = [
            asyncio.create_task(Consumer(oona, stream, group="g", name="n", handler=self, options=options).run())
            for stream in streams
        ]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.row("T27", "K11", "K14")
@pytest.mark.parametrize(
    ("level", "stream", "priority", "health"),
    [
        ("INFO", TELEMETRY, common.MESSAGE_PRIORITY_NORMAL, common.HEALTH_STATUS_HEALTHY),
        ("WARNING", EMERGENCY, common.MESSAGE_PRIORITY_HIGH, common.HEALTH_STATUS_DEGRADED),
        ("ERROR", EMERGENCY, common.MESSAGE_PRIORITY_HIGH, common.HEALTH_STATUS_UNHEALTHY),
        ("CRITICAL", EMERGENCY, common.MESSAGE_PRIORITY_CRITICAL, common.HEALTH_STATUS_CRITICAL),
    ],
)
async def test_an_event_goes_where_its_level_says(pod, oona, level, stream, priority, health):
    async with sending(pod.telemetry(), oona), Reader().reading(oona, stream) as reader:
        pod.say(level, "hello")
        await until(lambda: reader.texts == ["hello"])
    assert reader.priorities == [priority]
    assert [packet.system_health.status for packet in reader.packets] == [health]
    for packet in reader.packets:
        contracts.check(packet)


@pytest.mark.row("K38", "K65")
async def test_packets_are_counted_once_by_who_wrote_them_and_by_the_stream_they_are_on(pod, oona):
    writers = ("tolaria", "kasmina", "tamiyo", "weatherlight", "supervisor", "some user's code")
    async with sending(pod.telemetry(), oona), Reader().reading(oona, TELEMETRY, EMERGENCY) as reader:
        for writer in writers:
            for level in ("INFO", "WARNING", "CRITICAL"):
                pod.say(level, f"{writer} {level}", name="degraded_inputs", writer=writer)
        await until(lambda: len(reader.texts) >= 18)
        async with oona.connection() as client:
            on_emergency = await oona.ask(client.xlen(EMERGENCY.name), 1.0)
    assert len(reader.texts) == 18
    for source in ("tolaria", "kasmina", "tamiyo", "weatherlight", "supervisor", "other"):
        for priority in ("NORMAL", "HIGH", "CRITICAL"):
            assert value(pod, "telemetry_packets_total", source=source, priority=priority) == 1, (source, priority)
    assert on_emergency == value(pod, "weatherlight_emergency_telemetry_total") == 12
    assert value(pod, "weatherlight_emergency_tamiyo_total") == 2
    assert value(pod, "weatherlight_telemetry_total", priority="CRITICAL", outcome="dropped") == 0


@pytest.mark.row("K38")
async def test_a_flood_of_equal_events_is_a_handful_of_packets_that_stand_for_all_of_them(pod, oona):
    telemetry = pod.telemetry()
    pod.say("WARNING", "mild")
    for _ in range(500):
        pod.say("CRITICAL", "again and again")
    pod.say("CRITICAL", "something else")
    async with sending(telemetry, oona), Reader().reading(oona, EMERGENCY) as reader:

        def told():
            return sum(map(stands_for, reader.packets))

        await until(lambda: told() >= 502)
    assert told() == 502
    assert len(reader.packets) < 50
    assert {"mild", "something else", "again and again"} == set(reader.texts)
    assert value(pod, "weatherlight_emergency_coalesced_total") == 502 - len(
        [packet for packet in reader.packets if not packet.metrics]
    )


@pytest.mark.parametrize("level", [0, 99])
async def test_an_event_without_a_level_is_counted_and_holds_up_nothing(pod, oona, level):
    async with sending(pod.telemetry(), oona), Reader().reading(oona, TELEMETRY) as reader:
        pod.journal.append(RuntimeEvent(writer="x" * 5000, name="y" * 5000, level=level))
        pod.say(text="after it")
        await until(lambda: reader.texts == ["after it"])
    assert value(pod, "weatherlight_priority_missing_total") == 1


async def test_whatever_user_code_writes_into_the_journal_keeps_the_contract(pod, oona):
    async with sending(pod.telemetry(), oona), Reader().reading(oona, TELEMETRY) as reader:
        pod.say(name="n" * 5000, writer="w" * 5000, text="t" * 5000)
        pod.say(name="named", writer="", text="\u00e9" * 3000)
        await until(lambda: len(reader.packets) == 2)
    for packet in reader.packets:
        contracts.check(packet)


async def test_a_reader_that_is_started_again_goes_on_behind_what_it_has_taken(pod, oona, monkeypatch):
    telemetry = pod.telemetry()
    add, broken = telemetry._add, [True]

    def fail_once(event, begin, end):
        if event.notice.message == "1" and broken.pop() if broken else False:
            raise RuntimeError("put in by a test")
        add(event, begin, end)

    monkeypatch.setattr(telemetry, "_add", fail_once)
    for number in range(3):
        pod.say(text=str(number))
    with pytest.raises(RuntimeError):
        await telemetry.read()
    async with sending(telemetry, oona), Reader().reading(oona, TELEMETRY) as reader:
        await until(lambda: len(reader.texts) >= 3)
    assert reader.texts == ["0", "1", "2"]


@pytest.mark.row("K59")
async def test_what_was_said_while_redis_was_away_arrives_once_and_in_order(pod, oona, server):
    async with sending(pod.telemetry(), oona), Reader().reading(oona, TELEMETRY) as reader:
        pod.say(text="before")
        await until(lambda: reader.texts == ["before"])
        server.freeze()
        for number in range(50):
            pod.say(text=str(number))
        await until(lambda: not oona.connected)
        server.thaw()
        await until(lambda: len(reader.texts) >= 51)
    assert reader.texts == ["before", *map(str, range(50))]


@pytest.mark.row("K59")
async def test_a_worker_that_is_killed_at_any_time_loses_nothing_and_says_nothing_twice(pod, oona):
    async with Reader().reading(oona, TELEMETRY) as reader:
        for round_ in range(10):
            telemetry = pod.telemetry()
            async with sending(telemetry, oona):
                for number in range(10):
                    pod.say(text=f"{round_}.{number}")
                await until(lambda least=round_ * 10 + 3: len(reader.texts) >= least)
        async with sending(pod.telemetry(), oona):
            await until(lambda: len(reader.texts) >= 100)
    assert reader.texts == [f"{round_}.{number}" for round_ in range(10) for number in range(10)]


async def test_beyond_its_room_the_oldest_of_what_matters_least_goes_and_is_counted(pod, oona):
    telemetry = pod.telemetry(max_spool_bytes=2000)
    pod.say("CRITICAL", "kept")
    for number in range(50):
        pod.say(text=f"n{number}")
    while telemetry.take():
        pass
    async with sending(telemetry, oona), Reader().reading(oona, TELEMETRY, EMERGENCY) as reader:
        await until(lambda: "kept" in reader.texts and "n49" in reader.texts)
    assert "n0" not in reader.texts
    dropped = pod.registry.get_sample_value(
        "esper_weatherlight_telemetry_total", {"priority": "NORMAL", "outcome": "dropped"}
    )
    assert dropped == 51 - len(reader.texts)


async def test_an_event_without_a_name_is_nobodys_business(pod, oona):
    async with sending(pod.telemetry(), oona), Reader().reading(oona, TELEMETRY) as reader:
        pod.journal.append(RuntimeEvent(writer="kasmina"))
        pod.say(text="named")
        await until(lambda: reader.texts == ["named"])
