"""The real sidecar as processes, with a real Redis, real files, sockets and signals."""

import asyncio
import os
import socket
import time
from contextlib import aclosing

import pytest
from esper_leyline import paths
from esper_leyline.oona import REPORTS, Oona, OonaConfig
from esper_leyline.pages import Page
from esper_leyline.reasons import RunReason
from esper_leyline.signing import Role, SigningKey
from esper_leyline.v1.report_pb2 import Notice, RuntimePhase
from esper_runtime.weatherlight.emergency import FILE_EVERY_S

from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.weatherlight import (
    RUNNING,
    UID,
    PodFiles,
    beat,
    boot,
    event,
    opened,
    sealed,
    signal_bytes,
    signal_message,
    transition,
)

pytestmark = pytest.mark.timeout(180)
"""Each test starts a process or several; on a busy machine that alone takes long."""


@pytest.fixture
def redis():
    with RedisServer() as server:
        yield server


@pytest.fixture
def make_pod(tmp_path):
    made = []

    def make(name="pod", **options):
        made.append(PodFiles(tmp_path / name, **options))
        made[-1].start()
        return made[-1]

    yield make
    for pod in made:
        pod.close()


@pytest.fixture
async def pod(redis, make_pod):
    made = make_pod(redis_url=redis.url)
    await until(made.ready)
    return made


def client(redis):
    return Oona(OonaConfig(url=redis.url, timeout_s=0.5, block_s=0.2))


class Received:
    """What an operator reads from Redis."""

    def __init__(self, oona):
        self.reports = []
        """All of it. A report whose publication was not answered in time comes twice."""
        self._task = asyncio.create_task(self._read(oona))

    async def _read(self, oona):
        async with aclosing(oona.reports()) as entries:
            async for entry in entries:
                self.reports.append(opened(entry.raw))

    @property
    def taken(self):
        """What the operator folds: a report that is no newer than the last one is dropped."""
        newest = 0
        found = []
        for report in self.reports:
            if report.seq > newest:
                newest = report.seq
                found.append(report)
        return found

    def has(self, **wanted):
        """The first report with that event whose fields are as wanted, e.g. has(transition={"to_phase": 4})."""
        [(name, fields)] = wanted.items()
        for report in self.reports:
            if report.WhichOneof("event") == name:
                content = getattr(report, name)
                if all(getattr(content, key) == value for key, value in fields.items()):
                    return report
        return None

    async def stop(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def received(redis):
    async with client(redis) as oona:
        made = Received(oona)
        yield made
        await made.stop()


class Supervisor:
    """Tolaria's end of weatherlight.sock."""

    def __init__(self, pod, incarnation=1):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        # The limit of 108 bytes for socket paths does not hold for relative ones.
        here = os.getcwd()
        os.chdir(pod.run_dir)
        try:
            self.socket.connect(paths.WEATHERLIGHT_SOCKET)
        finally:
            os.chdir(here)
        self.socket.sendall(f"tolaria 0 {incarnation}\n".encode())

    def poked(self):
        return self.socket.recv(1) == b"e"

    def close(self):
        self.socket.close()


def begin(pod, incarnation=1):
    pod.journal.append(boot(incarnation))
    pod.journal.append(transition(RUNNING, RuntimePhase.RUNTIME_PHASE_STARTING, 1))


async def test_events_reach_the_operator_by_both_ways_in_order(pod, received):
    begin(pod)
    pod.journal.append(event(notice=Notice(reason="FaultInjected", message="one")))
    await until(lambda: received.has(notice={"message": "one"}))
    assert received.has(transition={"to_phase": RUNNING}).phase == RUNNING
    seqs = [report.seq for report in received.reports]
    assert seqs == sorted(seqs)
    pulled = await pod.reports()
    assert [r for r in pulled if r.WhichOneof("event")] == [r for r in received.taken if r.WhichOneof("event")]


async def test_heartbeats_on_the_page_become_progress(pod, received):
    begin(pod)
    page = Page.create(pod.run_dir / paths.TRAINER_PAGE, 4)
    began = time.monotonic()
    for step in (3, 40):
        page.write(0, beat(step, ns=time.monotonic_ns()).words())
        await until(lambda step=step: any(r.progress.step == step for r in received.reports))
    page.close()
    report = next(r for r in received.reports if r.progress.step == 40)
    assert (report.progress.loss, report.progress.total_steps) == (0.5, 1000)
    assert 0 <= report.heartbeat_age_ms <= (time.monotonic() - began) * 1000


@pytest.mark.row("K62")
async def test_a_signal_by_redis_is_on_the_page_and_the_supervisor_is_poked(pod, redis):
    supervisor = Supervisor(pod)
    async with client(redis) as oona:
        await oona.publish_signal(UID, sealed(signal_message(7)))
        record = await until(pod.emergency)
    assert (record.seq, record.signal_id, record.mode) == (7, f"{7:032x}", 1)
    assert await asyncio.to_thread(supervisor.poked)
    supervisor.close()


@pytest.mark.row("K62")
async def test_a_signal_by_the_mounted_file_needs_no_redis(make_pod):
    pod = make_pod()
    await until(pod.ready)
    pod.mount_signal(signal_bytes(1))
    assert (await until(pod.emergency)).seq == 1
    pod.mount_signal(signal_bytes(2, clear=True))
    await until(lambda: pod.emergency().seq == 2)
    assert pod.emergency().clear


async def test_the_kubelets_way_of_replacing_a_configmap_is_seen(make_pod):
    pod = make_pod()
    await until(pod.ready)
    mount = pod.root / "emergency"
    (mount / paths.EMERGENCY_SIGNAL).symlink_to(f"..data/{paths.EMERGENCY_SIGNAL}")
    took_s = []
    for seq in (1, 2, 3, 4):
        other = PodFiles(pod.root / f"other-{seq}")
        other.mount_signal(signal_bytes(seq))
        content = (other.root / "emergency" / paths.EMERGENCY_SIGNAL).read_bytes()
        (mount / f"..version-{seq}").mkdir()
        (mount / f"..version-{seq}" / paths.EMERGENCY_SIGNAL).write_bytes(content)
        (mount / "..data_tmp").symlink_to(f"..version-{seq}")
        began = time.monotonic()
        (mount / "..data_tmp").rename(mount / "..data")
        await until(lambda seq=seq: pod.emergency() and pod.emergency().seq == seq)
        took_s.append(time.monotonic() - began)
    assert min(took_s) < FILE_EVERY_S / 5, "seen by the look at intervals alone"


async def test_signals_sent_before_the_pod_existed_are_not_missed(redis, make_pod):
    async with client(redis) as oona:
        await oona.publish_signal(UID, sealed(signal_message(3)))
    by_redis = make_pod("a", redis_url=redis.url)
    assert (await until(by_redis.emergency)).seq == 3
    by_file = PodFiles(by_redis.root.parent / "b")
    by_file.mount_signal(signal_bytes(4))
    by_file = make_pod("b")
    assert (await until(by_file.emergency)).seq == 4


@pytest.mark.row("K62")
async def test_both_legs_bring_one_signal(pod, redis):
    envelope = sealed(signal_message(1))
    async with client(redis) as oona:
        await oona.publish_signal(UID, envelope)
        first = await until(pod.emergency)
        pod.mount_signal(envelope.SerializeToString())

        async def duplicate():
            return await pod.metric('esper_weatherlight_signals_total{leg="configmap",verdict="duplicate"}')

        await until(duplicate)
    assert pod.emergency() == first
    assert await pod.metric('esper_weatherlight_signals_total{leg="redis",verdict="accepted"}') == 1
    assert await pod.metric('esper_weatherlight_signal_lag_seconds_count{leg="configmap"}') == 1


@pytest.mark.row("T07")
async def test_forged_and_replayed_signals_are_ignored_counted_and_told(pod, redis, received):
    begin(pod)
    forger = SigningKey.derive(b"z" * 32, UID, Role.OPERATOR)
    async with client(redis) as oona:
        await oona.publish_signal(UID, sealed(signal_message(9), key=forger))
        notice = await until(lambda: received.has(notice={"reason": RunReason.SIGNAL_REJECTED}))
        assert pod.emergency() is None
        await oona.publish_signal(UID, sealed(signal_message(5)))
        await until(pod.emergency)
        await oona.publish_signal(UID, sealed(signal_message(4)))

        async def replayed():
            return await pod.metric('esper_weatherlight_signals_rejected_total{reason="replayed"}')

        await until(replayed)
    assert notice.notice.warning
    assert "unknown_key_id" in notice.notice.message
    assert pod.emergency().seq == 5


async def test_a_dead_container_is_told_after_its_last_words(pod, received):
    supervisor = Supervisor(pod)
    begin(pod)
    await until(lambda: received.has(transition={"to_phase": RUNNING}))
    pod.journal.append(event("supervisor", notice=Notice(message="its last word")))
    supervisor.close()
    report = await until(lambda: received.has(transition={"reason": RunReason.CONTAINER_DIED}))
    assert report.phase == RuntimePhase.RUNTIME_PHASE_RESTARTING
    assert received.has(failure={"reason": RunReason.CONTAINER_DIED}).seq < report.seq
    assert received.has(notice={"message": "its last word"}).seq < report.seq


async def test_a_clean_end_is_no_death_not_even_for_the_next_worker(pod):
    supervisor = Supervisor(pod)
    begin(pod)
    supervisor.socket.sendall(b"x")
    supervisor.close()

    async def disconnected():
        return await pod.metric("esper_weatherlight_supervisor_connected") == 0

    await until(disconnected)
    pod.kill_worker()
    await until(pod.ready)
    # Two signs of life: longer than a missing supervisor is waited for.
    batch = await pod.pull(after=(1 << 32) | 2, wait=10)
    batch = await pod.pull(after=batch.last_seq, wait=10)
    assert all(opened(raw).WhichOneof("event") is None for raw in batch.envelopes)
    assert not [r for r in await pod.reports() if r.WhichOneof("event") == "failure"]


async def test_a_death_while_weatherlight_was_away_is_noticed(pod):
    supervisor = Supervisor(pod)
    begin(pod)

    async def running():
        return any(r.phase == RUNNING for r in await pod.reports())

    await until(running)
    pod.kill_worker()
    supervisor.close()
    await until(pod.ready)

    async def told():
        return any(r.WhichOneof("event") == "failure" for r in await pod.reports())

    await until(told)


async def test_reports_wait_for_redis_and_arrive_in_order_when_it_is_back(pod, redis, received):
    begin(pod)
    await until(lambda: received.has(transition={"to_phase": RUNNING}))
    redis.kill()
    for n in range(20):
        pod.journal.append(event(notice=Notice(message=str(n))))

    def lacks_redis(report):
        return any(d.component == "oona" for d in report.degradations)

    async def degraded():
        return any(lacks_redis(r) for r in await pod.reports())

    await until(degraded)
    assert await pod.ready(), "readiness does not depend on Redis"
    assert await pod.metric("esper_weatherlight_spool_reports") >= 20
    redis.start()
    await until(lambda: received.has(notice={"message": "19"}))
    notices = [r.notice.message for r in received.taken if r.WhichOneof("event") == "notice"]
    assert notices == [str(n) for n in range(20)]
    await until(lambda: not lacks_redis(received.reports[-1]))


async def test_a_frozen_redis_delays_neither_the_file_nor_the_pull(pod, redis):
    begin(pod)
    redis.freeze()
    by_file, by_pull = [], []
    for n in range(1, 6):
        began = time.monotonic()
        pod.mount_signal(signal_bytes(n))
        await until(lambda n=n: (record := pod.emergency()) and record.seq == n)
        by_file.append(time.monotonic() - began)
        began = time.monotonic()
        pod.journal.append(event(notice=Notice(message=f"frozen {n}")))

        async def pulled(n=n):
            return any(r.notice.message == f"frozen {n}" for r in await pod.reports())

        await until(pulled)
        by_pull.append(time.monotonic() - began)
    one_timeout_s = OonaConfig(url=redis.url).timeout_s
    assert min(by_file) < one_timeout_s / 2
    assert min(by_pull) < one_timeout_s / 2


async def test_sigterm_flushes_the_last_reports_and_exits_0(pod, redis):
    begin(pod)
    pod.journal.append(event(notice=Notice(message="the last word")))
    assert await asyncio.to_thread(pod.stop) == 0
    async with client(redis) as oona:
        assert opened((await oona.last(REPORTS)).raw).notice.message == "the last word"


async def test_sigterm_without_anybody_to_listen_ends_in_time(make_pod):
    pod = make_pod()
    await until(pod.ready)
    begin(pod)
    assert await asyncio.to_thread(pod.stop) == 0  # 137 when it had to be killed
    assert "reached nobody" in pod.log()


async def test_a_pull_counts_as_delivered(make_pod):
    pod = make_pod()
    await until(pod.ready)
    begin(pod)
    batch = await pod.pull(wait=5)
    await until(lambda: batch.last_seq)
    stopping = asyncio.create_task(asyncio.to_thread(pod.stop))
    while not stopping.done():
        try:
            batch = await pod.pull(after=batch.last_seq)
        except OSError:
            break
        await asyncio.sleep(0.05)
    assert await stopping == 0
    assert "reached nobody" not in pod.log()


@pytest.mark.slow
async def test_killed_at_any_instant_it_loses_nothing_and_numbers_nothing_twice(pod, redis, received):
    begin(pod)
    sent = 0
    for _ in range(12):
        for _ in range(25):
            pod.journal.append(event(notice=Notice(message=str(sent))))
            sent += 1
            await asyncio.sleep(0.001)
        pod.kill_worker()
    await until(pod.ready)
    await until(lambda: received.has(notice={"message": str(sent - 1)}))
    contents = {}
    for report in [*received.reports, *await pod.reports()]:
        assert contents.setdefault(report.seq, report) == report
    in_order = [contents[seq] for seq in sorted(contents)]
    notices = [r.notice.message for r in in_order if r.WhichOneof("event") == "notice"]
    assert notices == [str(n) for n in range(sent)]


async def test_many_instances_live_side_by_side(redis, make_pod):
    pods = [make_pod(f"pod-{n}", redis_url=redis.url) for n in range(3)]
    for pod in pods:
        await until(pod.ready)
    assert len({pod.url for pod in pods}) == 3
    async with client(redis) as oona:
        await oona.publish_signal(UID, sealed(signal_message(1)))
    for pod in pods:
        await until(pod.emergency)
