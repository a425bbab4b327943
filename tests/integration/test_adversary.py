"""Somebody has every right on Redis, or is Redis: they can delay an order by one of its ways, and give none."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest
from esper_leyline import paths
from esper_leyline.oona import Oona, OonaConfig, Status, acl, signals
from esper_leyline.oona.housekeeping import PRESSURE_KEY
from esper_leyline.oona.streams import FIELD, STREAMS
from esper_leyline.reasons import SignalRejection
from esper_leyline.signing import Role
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE, ACK_STAGE_SEEN, EmergencyAck
from esper_leyline.v1.report_pb2 import Notice
from esper_runtime.tolaria.control import Control, Identity
from redis.asyncio import Redis

from tests.support.forgeries import LIES, changed, flipped, lying, rewritten, truncated, under_other_keys
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.weatherlight import SEED, UID, PodFiles, boot, event, sealed, signal_message

pytestmark = pytest.mark.timeout(240)
STREAM = signals(UID).name
MAX_GROWTH_BYTES = 48 * 1024 * 1024
MAX_LOG_BYTES = 128 * 1024
KILL = 3


class Trainer:
    """Tolaria's own ear on the page, in a thread as in a trainer; it remembers what it obeyed."""

    def __init__(self, pod: PodFiles) -> None:
        self.obeyed: list[tuple[int, str]] = []
        """Number of the order, and what was done about it."""
        self.order, self.phase = 0, 4
        self._stop = threading.Event()
        told: Any = self
        self._control = Control(
            pod.run_dir,
            identity=Identity(run_uid=UID, attempt=1, rank=0),
            heart=told,
            events=told,
            step=lambda: 1,
            save=lambda: 1,
            sleep=self._rest,
        )
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self) -> None:
        while not self._stop.is_set():
            outcome = self._control.poll()
            if outcome is not None:
                self.obeyed.append((0, f"ended: {outcome.message}"))
                return
            time.sleep(0.001)

    def _rest(self, seconds: float) -> None:
        if self._stop.is_set():
            self._control._terminate = True  # a frozen trainer ends by SIGTERM only
        time.sleep(seconds)

    def ack(self, ack: EmergencyAck) -> None:
        stage = {ACK_STAGE_SEEN: "seen", ACK_STAGE_DONE: "lifted" if ack.clear else "done"}[ack.stage]
        self.obeyed.append((int(ack.signal_id, 16), stage))

    def transition(self, *_: Any, **__: Any) -> None: ...

    def beat(self) -> None: ...

    def incident(self, name: str) -> AbstractContextManager[str]:
        return nullcontext(name)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class World:
    """A pod, its trainer, and the operator, who stops the run and lets it go on."""

    def __init__(self, pod: PodFiles, oona: Oona | None = None, admin: Redis | None = None) -> None:
        self.pod, self._oona, self._admin = pod, oona, admin
        self.trainer = Trainer(pod)
        self.sent: list[Any] = []
        self.expected: list[tuple[int, str]] = []
        self.took_s: dict[str, list[float]] = {"redis": [], "configmap": []}
        self.forged = 0
        self.counts: Counter[str] = Counter()

    @property
    def admin(self) -> Redis:
        assert self._admin is not None
        return self._admin

    @property
    def oona(self) -> Oona:
        assert self._oona is not None
        return self._oona

    def next_order(self, **changes: Any) -> Any:
        """Signed by the operator. Odd numbers freeze, even ones lift what was before."""
        seq = len(self.sent) + 1
        fields = {"clear": True, "signal_id": f"{seq - 1:032x}"} if seq % 2 == 0 else {}
        self.sent.append(sealed(signal_message(seq, **{**fields, **changes})))
        return self.sent[-1]

    async def stop_and_go(self, leg: str) -> None:
        """Two good orders by one way, each obeyed before the next."""
        for words in (("seen", "done"), ("lifted",)):
            order = self.next_order()
            number = len(self.sent) - (words == ("lifted",))
            self.expected += [(number, word) for word in words]
            began = time.monotonic()
            if leg == "configmap":
                self.pod.mount_signal(order.SerializeToString())
            else:
                await until(lambda order=order: self._published(order))
            await until(lambda: self.trainer.obeyed[-1:] == self.expected[-1:], what=f"order {number} by {leg}")
            self.took_s[leg].append(time.monotonic() - began)
        assert self.trainer.obeyed == self.expected

    async def _published(self, order: Any) -> bool:
        return (await self.oona.publish_signal(UID, order)).status is Status.PUBLISHED

    async def add(self, *entries: bytes, seen: bool = True) -> None:
        """The adversary's entries; returns when weatherlight has judged them all."""
        before = await self._judged()
        adding = self.admin.pipeline(transaction=False)
        for raw in entries:
            adding.xadd(STREAM, {FIELD: raw})
        await adding.execute()
        self.forged += len(entries)

        async def judged() -> bool:
            return await self._judged() >= before + len(entries)

        if seen:
            await until(judged)

    async def _judged(self) -> float:
        return sum([await self.verdicts(verdict) for verdict in ("rejected", "duplicate", "accepted")])

    async def verdicts(self, verdict: str) -> float:
        return await self.pod.metric(f'esper_weatherlight_signals_total{{leg="redis",verdict="{verdict}"}}')

    async def reasons(self) -> dict[str, int]:
        name = "esper_weatherlight_signals_rejected_total"
        found = {str(r): int(await self.pod.metric(f'{name}{{reason="{r}"}}')) for r in SignalRejection}
        return {reason: count for reason, count in found.items() if count}


# What the adversary does; each leaves the stream as it likes.


async def other_keys(world: World) -> None:
    kill = sealed(signal_message(1000, mode=KILL))
    forged = under_other_keys(kill, SEED, UID, (Role.REPORT, Role.TAMIYO)).values()
    await world.add(*(one.SerializeToString() for one in forged))


async def signatures_of_other_orders(world: World) -> None:
    kill = signal_message(1000, mode=KILL).SerializeToString()
    await world.add(*(one.SerializeToString() for one in rewritten(world.sent[-1], kill).values()))


async def every_beginning(world: World) -> None:
    await world.add(*truncated(world.sent[-1].SerializeToString()))


async def a_flipped_bit_in_every_byte(world: World) -> None:
    await world.add(*flipped(world.sent[-1].SerializeToString(), bits=(0,)))


async def everything_said_before_backwards_and_twice(world: World) -> None:
    said = [one.SerializeToString() for one in world.sent]
    await world.add(*reversed(said), *said)


async def the_lifted_stop_again(world: World) -> None:
    await world.add(world.sent[-2].SerializeToString())


async def the_last_order_fifty_times(world: World) -> None:
    await world.add(*[world.sent[-1].SerializeToString()] * 50)


async def old_orders_with_a_date_to_come(world: World) -> None:
    dated = [changed(one) for one in world.sent[-2:]]
    for one in dated:
        one.issued_at.FromDatetime(datetime(2100, 1, 1, tzinfo=UTC))
    await world.add(*(one.SerializeToString() for one in dated))


async def two_orders_in_the_wrong_order(world: World) -> None:
    """The stop comes behind what lifts it: it is over, and stays so."""
    stop, go = world.next_order(), world.next_order()
    await world.add(go.SerializeToString(), stop.SerializeToString())


async def an_order_for_another_attempt(world: World) -> None:
    orders = world.next_order(attempt=7), world.next_order(attempt=7)
    await world.add(*(one.SerializeToString() for one in orders))


async def entries_of_another_kind(world: World) -> None:
    before = await world.verdicts("rejected")
    await world.admin.xadd(STREAM, {b"x": world.sent[-1].SerializeToString()})
    await world.admin.xadd(STREAM, {f"f{n}".encode(): b"v" for n in range(500)})
    await world.admin.xadd(STREAM, {FIELD: b""})

    async def judged() -> bool:
        return await world.verdicts("rejected") >= before + 3

    await until(judged)
    world.forged += 3


async def a_flood(world: World) -> None:
    forged = under_other_keys(sealed(signal_message(1000, mode=KILL)), SEED, UID, ()).values()
    await world.add(*[one.SerializeToString() for one in forged] * 60, seen=False)


async def giants(world: World) -> None:
    for size in (300_000, 1 << 20, 8 << 20):
        await world.admin.xadd(STREAM, {FIELD: bytes(size)})
    world.forged += 3


async def a_stream_of_another_type(world: World) -> None:
    await world.admin.delete(STREAM)
    await world.admin.set(STREAM, "x" * 1000)


async def entries_from_the_future_and_then_none(world: World) -> None:
    before = await world.verdicts("rejected")
    await world.admin.xadd(STREAM, {FIELD: b"x"}, id="99999999999999-1")

    async def judged() -> bool:
        return await world.verdicts("rejected") > before

    await until(judged)
    world.forged += 1
    await world.admin.delete(STREAM)


async def the_last_id_of_all(world: World) -> None:
    await world.admin.xadd(STREAM, {FIELD: b"x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    world.forged += 1
    outcome = await world.oona.publish_signal(UID, world.sent[-1])
    assert outcome.status is Status.REFUSED


async def no_users(world: World) -> None:
    await world.admin.execute_command("ACL DELUSER", acl.run_user(UID))


async def no_data(world: World) -> None:
    await world.admin.flushall()


async def a_pressure_that_is_none(world: World) -> None:
    names = {name: "high" for name in STREAMS}
    await world.admin.hset(PRESSURE_KEY, mapping={b"\xff\xfe": b"\xff", "": "none", **names})  # type: ignore[dict-item]
    world.pod.journal.append(event(notice=Notice(reason="Step", message="under pressure")))


async def all_keys_of_another_type(world: World) -> None:
    for name in (*STREAMS, PRESSURE_KEY):
        await world.admin.delete(name)
        await world.admin.set(name, "x")
    world.pod.journal.append(event(notice=Notice(reason="Step", message="nowhere to go")))


ATTACKS: tuple[Callable[[World], Awaitable[None]], ...] = (
    other_keys,
    signatures_of_other_orders,
    every_beginning,
    a_flipped_bit_in_every_byte,
    everything_said_before_backwards_and_twice,
    the_lifted_stop_again,
    the_last_order_fifty_times,
    old_orders_with_a_date_to_come,
    two_orders_in_the_wrong_order,
    an_order_for_another_attempt,
    entries_of_another_kind,
    a_flood,
    giants,
    a_stream_of_another_type,
    entries_from_the_future_and_then_none,
    the_last_id_of_all,
    no_users,
    a_pressure_that_is_none,
    all_keys_of_another_type,
    no_data,
)


async def make_user(admin: Redis) -> None:
    name = acl.run_user(UID)
    await admin.execute_command("ACL SETUSER", *acl.setuser(name, "secret", acl.run_rules(UID)))


async def make_good(world: World) -> None:
    """The adversary is gone, and somebody has cleared up behind them."""
    await make_user(world.admin)
    for name in (STREAM, PRESSURE_KEY, *STREAMS):
        await world.admin.delete(name)


def running(pod: PodFiles) -> tuple[int, int]:
    """Process id of the worker and its memory in bytes."""
    pid = pod.worker_pid()
    assert pid is not None
    return pid, psutil.Process(pid).memory_info().rss


@asynccontextmanager
async def bounded(pod: PodFiles):
    """Whatever happens within: the same worker, with its memory and its log within bounds."""
    pid, before = running(pod)
    logged = len(pod.log())
    yield
    now, after = running(pod)
    assert now == pid, pod.log()[-4000:]
    assert after - before < MAX_GROWTH_BYTES
    assert len(pod.log()) - logged < MAX_LOG_BYTES
    assert "Traceback" not in pod.log()
    print(f"worker: +{(after - before) / 2**20:.1f} MiB, {len(pod.log()) - logged} bytes of log")


@pytest.fixture
def make_pod(tmp_path):
    made = []

    def make(url, username="", password=""):
        pod = PodFiles(tmp_path / "pod", redis_url=url)
        for name, text in ((paths.BUS_USERNAME, username), (paths.BUS_PASSWORD, password)):
            (pod.root / "bus" / name).write_text(text)
        pod.start()
        made.append(pod)
        return pod

    yield make
    for pod in made:
        pod.close()


def told_of_times(world: World) -> str:
    lines = []
    for leg, times in world.took_s.items():
        if times:
            ms = sorted(1000 * took for took in times)
            lines.append(f"{leg}: {len(ms)} orders, median {statistics.median(ms):.1f} ms, slowest {ms[-1]:.1f} ms")
    return "; ".join(lines)


@pytest.mark.row("T07", "K62")
async def test_who_holds_redis_can_delay_and_not_command(make_pod):
    with RedisServer() as redis:
        async with Redis.from_url(redis.url) as admin, Oona(OonaConfig(url=redis.url, timeout_s=0.5)) as oona:
            await make_user(admin)
            pod = make_pod(redis.url, acl.run_user(UID), "secret")
            await until(pod.ready)
            pod.journal.append(boot(1))
            world = World(pod, oona, admin)
            try:
                await world.stop_and_go("redis")
                await world.stop_and_go("configmap")
                async with bounded(pod):
                    for attack in ATTACKS:
                        await attack(world)
                        await world.stop_and_go("configmap")
                        await make_good(world)
                        await world.stop_and_go("redis")
            finally:
                world.trainer.close()
            good = len(world.expected) * 2 // 3
            accepted = await world.verdicts("accepted")
            print(
                f"{world.forged} forged entries in {len(ATTACKS)} attacks, none obeyed; {good} good orders, all obeyed"
            )
            print(
                f"refused by reason: {await world.reasons()}; {told_of_times(world)}; {accepted:.0f} accepted by Redis"
            )
    assert world.trainer.obeyed == world.expected
    assert statistics.median(world.took_s["configmap"]) < 0.5


@pytest.mark.row("K62", "T36")
async def test_a_server_that_is_no_redis_delays_nothing_that_goes_the_other_way(make_pod):
    async with lying() as liar:
        pod = make_pod(liar.url)
        await until(pod.ready)
        pod.journal.append(boot(1))
        world = World(pod)
        try:
            await world.stop_and_go("configmap")
            async with bounded(pod):
                for lie in LIES:
                    liar.tell(lie)
                    await until(lambda: liar.asked >= 2, what=lie)
                    await world.stop_and_go("configmap")
                descriptors = psutil.Process(running(pod)[0]).num_fds()
                threads = psutil.Process(running(pod)[0]).num_threads()
            liar.tell("noise")
            await until(lambda: liar.asked >= 8)
            assert psutil.Process(running(pod)[0]).num_threads() <= threads
            assert psutil.Process(running(pod)[0]).num_fds() <= descriptors + 4  # as many as it has connections
        finally:
            world.trainer.close()
    print(f"{len(LIES)} lies; {told_of_times(world)}")
    assert statistics.median(world.took_s["configmap"]) < 0.5
