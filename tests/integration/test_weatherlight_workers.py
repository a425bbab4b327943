"""Weatherlight's own troubles: what fails is started again and told, what cannot get well ends the container, and a
missed deadline of the trainer is on the bus at once."""

import asyncio
import contextlib
import re
import statistics
import time
from contextlib import aclosing

import pytest
from esper_leyline import paths, signing
from esper_leyline.events import RunEvent
from esper_leyline.exitcodes import SidecarExit
from esper_leyline.oona import EMERGENCY, TELEMETRY, Oona, OonaConfig
from esper_leyline.reasons import RunReason
from esper_leyline.signing import Verifier
from esper_leyline.v1 import common_pb2 as common
from esper_leyline.v1.report_pb2 import Notice
from esper_leyline.v1.telemetry_pb2 import TELEMETRY_LEVEL_CRITICAL, TELEMETRY_LEVEL_INFO, TelemetryPacket
from esper_runtime.sidecar import supervision
from esper_runtime.sidecar.environment import Environment
from esper_runtime.sidecar.supervision import CrashLoop
from esper_runtime.weatherlight.mode import CALM_S
from esper_runtime.weatherlight.preflight import preflight
from esper_runtime.weatherlight.worker import Weatherlight
from prometheus_client import CollectorRegistry

from tests.integration.test_telemetry import stands_for
from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENT_S, until
from tests.support.weatherlight import (
    UID,
    FakeClock,
    PodFiles,
    boot,
    event,
    opened,
    report_key,
    sealed,
    signal_message,
    transition,
)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def redis():
    with RedisServer() as server:
        yield server


@pytest.fixture
def make_pod(tmp_path):
    made = []

    def make(**options):
        made.append(PodFiles(tmp_path / "pod", **options))
        return made[-1]

    yield make
    for pod in made:
        pod.close()


@pytest.fixture
async def client(redis):
    async with Oona(OonaConfig(url=redis.url, timeout_s=0.5, block_s=0.2)) as oona:
        yield oona


class Listener:
    """Packets of both streams, each once, with the time at which it came."""

    def __init__(self, oona):
        self.packets = []
        self.arrived_ns = []
        self._verifier = Verifier.from_text(report_key().public_text())
        self._tasks = [asyncio.create_task(self._read(oona, stream)) for stream in (EMERGENCY, TELEMETRY)]

    async def _read(self, oona, stream):
        async with aclosing(oona.entries(stream)) as entries:
            async for entry in entries:
                envelope = entry.envelope()
                if envelope is None or envelope.message_type != common.BUS_MESSAGE_TYPE_TELEMETRY:
                    continue
                self._verifier.check_envelope(envelope)
                packet = TelemetryPacket.FromString(envelope.payload)
                if any(known.packet_id == packet.packet_id for known in self.packets):
                    continue  # Redis was away, and might have forgotten it
                assert (stream is EMERGENCY) == (packet.priority >= common.MESSAGE_PRIORITY_HIGH)
                self.arrived_ns.append(time.monotonic_ns())
                self.packets.append(packet)

    def named(self, name):
        return [packet for packet in self.packets if packet.events[0].name == name]

    async def stop(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def listener(client):
    made = Listener(client)
    yield made
    await made.stop()


def missed(number):
    return event(
        name=RunEvent.ROLLBACK_DEADLINE,
        level=TELEMETRY_LEVEL_CRITICAL,
        notice=Notice(reason=RunReason.RESTORE_FAILED, message=f"late {number}", warning=True),
    )


# A missed deadline


@pytest.mark.row("T22", "K07")
async def test_every_missed_deadline_is_on_the_emergency_stream_at_once_and_once(redis, make_pod, listener):
    """Also when two come together."""
    pod = make_pod(redis_url=redis.url)
    pod.start()
    await until(pod.ready)
    pod.journal.append(boot())
    count = 200
    for number in range(0, count, 2):
        pod.journal.append(missed(number))
        pod.journal.append(missed(number + 1))
        await until(lambda number=number: len(listener.packets) >= number)
    await until(lambda: len(listener.packets) >= count)
    packets = listener.named("rollback_deadline_triggered")
    assert [packet.events[0].description for packet in packets] == [f"RestoreFailed: late {n}" for n in range(count)]
    assert {packet.priority for packet in packets} == {common.MESSAGE_PRIORITY_CRITICAL}
    assert len({packet.packet_id for packet in packets}) == count
    sent_ns = [packet.timestamp.ToNanoseconds() for packet in packets]
    now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
    took_ms = [(at - (now_ns - (wall_ns - sent))) / 1e6 for at, sent in zip(listener.arrived_ns, sent_ns, strict=True)]
    print(f"journal to reader: median {statistics.median(took_ms):.1f} ms, worst {max(took_ms):.1f} ms")
    assert statistics.median(took_ms) < 100
    assert await pod.metric("esper_weatherlight_rollback_detections_total") == count
    assert await pod.metric("esper_weatherlight_emergency_telemetry_total") == count
    assert 0 < await pod.metric("esper_weatherlight_rollback_deadline_latency_ms") < 60_000


@pytest.mark.row("K08", "K14")
async def test_a_signal_is_told_once_however_it_came(redis, make_pod, listener, client):
    pod = make_pod(redis_url=redis.url)
    pod.start()
    await until(pod.ready)
    envelope = sealed(signal_message(1))
    await client.publish_signal(UID, envelope)
    pod.mount_signal(envelope.SerializeToString())

    async def duplicate():
        found = [
            await pod.metric(f'esper_weatherlight_signals_total{{leg="{leg}",verdict="duplicate"}}')
            for leg in ("redis", "configmap")
        ]
        return sum(found)

    await until(duplicate)
    await until(lambda: listener.named("emergency_signal_received"))
    await client.publish_signal(UID, sealed(signal_message(2, clear=True)))
    await until(lambda: len(listener.named("emergency_signal_received")) >= 2)
    told = listener.named("emergency_signal_received")
    assert [f"[{seq:032x}]" in packet.events[0].description for packet, seq in zip(told, (1, 2), strict=True)] == [
        True
    ] * 2
    assert "freeze" in told[0].events[0].description
    assert "cleared" in told[1].events[0].description
    assert await pod.metric("esper_weatherlight_emergency_detections_total") == 2, "its own packets are no signals"


# Breaker


@pytest.mark.row("K10", "T43")
async def test_the_breaker_before_redis_is_told_when_it_opens_and_when_it_has_closed(redis, make_pod, listener):
    pod = make_pod(redis_url=redis.url)
    pod.start()
    await until(pod.ready)
    pod.journal.append(boot())

    async def state():
        return await pod.metric("esper_oona_publish_breaker_state")

    await until(lambda: listener.packets == [])
    assert await state() == 1
    redis.kill()

    async def conservative():
        pod.journal.append(transition(2))  # something to publish
        return await pod.metric("esper_oona_conservative_mode")

    await until(conservative)
    assert await state() in (2, 3)
    assert await pod.ready(), "readiness does not depend on Redis"

    async def probes():
        return await pod.metric('esper_oona_publish_breaker_changes_total{to="half-open"}')

    await until(probes)  # a call from before it opened may close it without one
    redis.start()
    # Two streams and three lanes: in any order.
    entered = await until(lambda: listener.named("oona_conservative_enter"))
    left = await until(lambda: listener.named("oona_conservative_exit"))
    assert [packet.priority for packet in entered] == [common.MESSAGE_PRIORITY_HIGH]
    assert [packet.priority for packet in left] == [common.MESSAGE_PRIORITY_NORMAL]
    probed = await until(lambda: listener.named("oona_conservative_probe"))
    assert [packet.priority for packet in probed] == [common.MESSAGE_PRIORITY_NORMAL], "the first of many"
    assert (await state(), await pod.metric("esper_oona_conservative_mode")) == (1, 0)
    for to in ("open", "half-open", "closed"):
        assert await pod.metric(f'esper_oona_publish_breaker_changes_total{{to="{to}"}}') >= 1


# Workers


@contextlib.asynccontextmanager
async def inside(pod, clock):
    """A whole weatherlight in this process, so that a test can break a part of it."""
    registry = CollectorRegistry()
    made = Weatherlight(preflight(Environment(pod.environment)), registry, clock)
    stop = asyncio.Event()
    running = asyncio.create_task(made.run(stop))
    made.value = lambda name, **labels: registry.get_sample_value(f"esper_weatherlight_{name}", labels)
    made.stop, made.running = stop, running
    try:
        yield made
    finally:
        stop.set()
        made.outlet.pulled_seq = 1 << 63  # nobody listens: no reason to wait for somebody
        with contextlib.suppress(CrashLoop):
            await running


def breaking(times, method):
    """It raises so often, and then does what it did."""
    left = times

    def broken(*arguments):
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("put in by a test")
        return method(*arguments)

    return broken


@pytest.mark.row("K42")
async def test_a_worker_that_fails_degrades_the_run_and_is_back_with_what_it_missed(make_pod, monkeypatch):
    pod, clock = make_pod(), FakeClock()
    async with inside(pod, clock) as weatherlight:
        recorder = weatherlight._recorder
        monkeypatch.setattr(recorder, "event", breaking(1, recorder.event))  # after it was read from the journal
        for one in (boot(), transition(2, 1, 1)):
            pod.journal.append(one)
        began = time.monotonic()
        await until(lambda: weatherlight.value("worker_restarts_total", worker="journal"))
        reports = recorder.reports
        await until(lambda: reports.last is not None)  # the journal is read where reports end

        def degraded():
            return [(d.component, d.reason) for d in opened(reports.last.envelope).degradations]

        await until(lambda: ("weatherlight", RunReason.WORKER_FAILED) in degraded())
        assert time.monotonic() - began < 15
        assert weatherlight.value("system_mode", mode="degraded") == 1
        assert weatherlight.value("degraded", component="weatherlight") == 1
        seen = [opened(record.envelope).WhichOneof("event") for record in reports.after(0)]
        assert seen.count("transition") == 1, "it goes on with what it could not take in"
        clock.advance(CALM_S)
        await until(lambda: weatherlight.value("system_mode", mode="operational"))
        assert degraded() == []
        assert weatherlight.value("tasks_running") == 11


async def test_every_worker_can_be_started_again(make_pod, redis):
    """Each is cancelled from outside, and the whole works as before."""
    pod = make_pod(redis_url=redis.url)
    async with inside(pod, FakeClock()) as weatherlight:
        names = [worker.name for worker in weatherlight.workers()]
        await until(lambda: weatherlight.value("tasks_running") == len(names))
        await until(lambda: weatherlight._bus._oona is not None and weatherlight._bus._oona.connected)
        for task in asyncio.all_tasks():
            if task.get_name() in names:
                task.cancel()
        await until(lambda: all(weatherlight.value("worker_restarts_total", worker=name) == 1 for name in names))
        pod.journal.append(boot())
        pod.mount_signal(sealed(signal_message(1)).SerializeToString())
        await until(pod.emergency)
        await until(lambda: weatherlight.outlet.published_seq > 0)


async def test_a_crash_loop_ends_the_process_and_is_left_for_the_next_one_to_tell(make_pod, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_BACKOFF_S", 0.01)
    pod = make_pod()
    async with inside(pod, FakeClock()) as weatherlight:
        monkeypatch.setattr(weatherlight._tail, "drain", breaking(100, weatherlight._tail.drain))
        with pytest.raises(CrashLoop, match="worker journal"):
            await weatherlight.running
    assert RunEvent.WORKER_CRASH_LOOP.encode() in (pod.run_dir / paths.JOURNAL).read_bytes()


# Start and end


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda pod: (pod.root / "keys" / signing.REPORT_PRIVATE).unlink(), SidecarExit.KEY, "report.key is missing"),
        (
            lambda pod: (pod.root / "keys" / signing.OPERATOR_PUBLIC).write_text("nonsense"),
            SidecarExit.KEY,
            "holds no public keys, one of 64 hex digits a line",
        ),
        (
            lambda pod: (pod.run_dir / paths.WEATHERLIGHT_STATE).write_text(""),
            SidecarExit.VOLUME,
            "it must be a memory volume",
        ),
    ],
    ids=["no report key", "malformed operator key", "no state directory"],
)
async def test_what_can_never_get_well_ends_the_container_with_a_remedy(make_pod, spoil, code, words):
    pod = make_pod()
    spoil(pod)
    pod.start()
    assert await asyncio.to_thread(pod.process.wait, PATIENT_S) == code
    lines = [line for line in pod.log().splitlines() if words in line]
    assert len(lines) == 1, "one line says it"
    assert "Traceback" not in pod.log()


@pytest.mark.row("K41")
@pytest.mark.parametrize("trouble", ["none", "no redis", "frozen redis"])
async def test_it_starts_and_stops_cleanly_within_ten_seconds(make_pod, redis, trouble):
    pod = make_pod(redis_url="" if trouble == "no redis" else redis.url)
    if trouble == "frozen redis":
        redis.freeze()
    pod.start()
    await until(pod.ready)
    pod.journal.append(boot())
    await until(pod.reports)  # there is something to deliver
    began = time.monotonic()
    assert await asyncio.to_thread(pod.stop) == 0  # 137 when PID 1 had to kill it after 10 s
    assert time.monotonic() - began < 10 + 5  # PID 1's own limit, and a busy machine
    assert not re.search("Traceback|never retrieved|does not end|Unhandled", pod.log())


@pytest.mark.row("K59")
async def test_what_a_run_says_last_is_on_the_bus_before_it_ends(make_pod, redis, listener):
    """Repetitions too, which else wait for more of them."""
    pod = make_pod(redis_url=redis.url)
    pod.start()
    await until(pod.ready)
    pod.journal.append(boot())
    await until(lambda: pod.metric("esper_weatherlight_redis_connected"))
    for number in range(100):
        level = TELEMETRY_LEVEL_INFO if number % 2 else TELEMETRY_LEVEL_CRITICAL
        pod.journal.append(event(name=RunEvent.NOTICE, level=level, notice=Notice(message=f"{number // 10}")))
    assert await asyncio.to_thread(pod.stop) == 0

    def told():
        return sum(stands_for(packet) for packet in listener.named(RunEvent.NOTICE))

    await until(lambda: told() >= 100)
    assert told() == 100


# The bus, when it can be reached and is not as it must be


async def test_a_user_that_may_too_little_degrades_the_run_and_stops_nothing(make_pod, redis):
    pod = make_pod(redis_url=redis.url.replace("//", "//default:@"))
    import redis as sync_redis

    with sync_redis.Redis(port=redis.port) as admin:
        admin.execute_command("ACL SETUSER", "poor", "on", ">pw", "~*", "&*", "+@all", "-xadd")
        (pod.root / "bus" / paths.BUS_URL).write_text(redis.url)
        (pod.root / "bus" / paths.BUS_USERNAME).write_text("poor")
        (pod.root / "bus" / paths.BUS_PASSWORD).write_text("pw")
        pod.start()
        await until(pod.ready)
        pod.journal.append(boot())

        async def told(reason):
            reports = await pod.reports()
            return reports and any(d.reason == reason for d in reports[-1].degradations) and reports[-1]

        report = await until(lambda: told(RunReason.BUS_UNUSABLE))
        (problem,) = [d.message for d in report.degradations if d.component == "oona"]
        assert "this user may not: XADD oona.reports, XADD oona.telemetry, XADD oona.emergency" in problem
        pod.mount_signal(sealed(signal_message(1)).SerializeToString())
        await until(pod.emergency)


@pytest.mark.row("T43")
async def test_clocks_that_differ_are_measured_and_told_and_refuse_nothing(make_pod, redis, listener):
    pod, ahead_s = make_pod(redis_url=redis.url), 30.0
    async with inside(pod, FakeClock()) as weatherlight:
        weatherlight._bus._wall = lambda: time.time() + ahead_s
        pod.journal.append(boot())
        await until(lambda: weatherlight.value("clock_skew_seconds"))
        assert 29 < weatherlight.value("clock_skew_seconds") <= 30
        await until(lambda: listener.named("oona_clock_skew"))
        assert listener.named("oona_clock_skew")[0].priority == common.MESSAGE_PRIORITY_HIGH
        assert "ahead of that of Redis" in listener.named("oona_clock_skew")[0].events[0].description
        assert weatherlight.value("degraded", component="oona") == 0
