"""Users of runs in a real Redis: made, made again by need, removed, and never those of others."""

import asyncio
import contextlib
import time

import pytest
from esper_leyline.oona import NORMAL, Oona, OonaConfig, Status, acl
from esper_leyline.signing import Role, SigningKey, bus_password, seal
from esper_leyline.v1 import common_pb2 as pb
from esper_operator import bususers
from esper_operator.bususers import BusUsers
from esper_operator.fabric import Fabric
from esper_operator.metrics import Metrics
from esper_operator.model import RunKey
from redis.asyncio import Redis

from tests.support.redis_server import RedisServer
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(120)
SEED = b"s" * 32


@pytest.fixture
def server():
    with RedisServer() as running:
        yield running


class Bench:
    """The operator's side: its users, its client, and an administrator who looks on."""

    def __init__(self, server, oona, admin):
        self.server, self.oona, self.admin = server, oona, admin
        self.metrics = Metrics()
        self.leads = True
        self.told = []
        self.users = self.operator(generation=1)

    def operator(self, *, generation):
        return BusUsers(
            seed=SEED,
            generation=generation,
            held=lambda: self.leads,
            monotonic=time.monotonic,
            metrics=self.metrics,
            on_denied=lambda key, why: self.told.append((key, why)),
        )

    def want(self, *uids):
        for uid in uids:
            self.users.want(uid, RunKey("default", uid))

    async def names(self):
        return {str(name) for name in await self.admin.acl_users()} - {"default", acl.OPERATOR}

    async def are(self, *uids):
        async def seen():
            return await self.names() == {f"run-{uid}" for uid in uids}

        await until(seen)

    async def lets_in(self, uid, generation=1):
        password = bus_password(SEED, uid, generation)
        config = OonaConfig(url=self.server.url, username=f"run-{uid}", password=password)
        key = SigningKey.derive(SEED, uid, Role.REPORT)
        async with Oona(config) as pod:
            envelope = seal(b"x", pb.BUS_MESSAGE_TYPE_RUN_REPORT, run_uid=uid, key=key)
            return (await pod.publish_report(envelope)).status is Status.PUBLISHED

    async def gone(self, uid, generation):
        return not await self.lets_in(uid, generation)

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


@contextlib.asynccontextmanager
async def ending(task):
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def bench(server, **rules):
    async with Redis.from_url(server.url) as admin:
        await admin.execute_command("ACL SETUSER", *acl.setuser(acl.OPERATOR, "pw", acl.operator_rules(**rules)))
        config = OonaConfig(
            url=server.url, username=acl.OPERATOR, password="pw", timeout_s=1.0, block_s=0.2, backoff_max_s=0.2
        )
        async with Oona(config) as oona:
            yield Bench(server, oona, admin)


@pytest.fixture
async def made(server):
    async with bench(server) as made:
        yield made


async def test_a_user_is_there_while_its_run_is(made, monkeypatch):
    monkeypatch.setattr(bususers, "LINGER_S", 0.5)
    made.want("a", "b", "c")
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        await made.are("a", "b", "c")
        assert await made.lets_in("a")
        made.users.forget("b")
        await made.are("a", "c")
        made.users.over("c")
        assert "run-c" in await made.names()  # its pods may still speak
        await made.are("a")
        assert not await made.lets_in("c")
        made.want("c")
        await made.are("a", "c")
        await until(lambda: made.value("esper_bus_users") == 2, what="the gauge to follow the server")
    assert made.value("esper_bus_user_changes_total", change="removed") == 2


async def test_after_a_rotation_the_password_before_counts_for_a_while(made, monkeypatch):
    monkeypatch.setattr(bususers, "CHECK_S", 0.05)
    made.want("a")
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        await made.are("a")
    monkeypatch.setattr(bususers, "ROTATION_S", 2.0)
    made.users = made.operator(generation=2)
    made.want("a")
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        await until(lambda: made.lets_in("a", 2))
        assert await made.lets_in("a", 1)
        await until(lambda: made.gone("a", 1))
        assert await made.lets_in("a", 2)


async def test_a_server_that_lost_its_users_gets_them_again(server, made):
    made.want("a", "b")

    async def listening():
        async for _ in made.oona.reports():
            pass

    async with (
        ending(asyncio.create_task(made.users.run(made.oona))),
        ending(asyncio.create_task(listening())),
    ):
        await made.are("a", "b")
        server.kill()
        server.start()
        await made.admin.connection_pool.disconnect()
        rules = acl.setuser(acl.OPERATOR, "pw", acl.operator_rules())
        await made.admin.execute_command("ACL SETUSER", *rules)  # as the server's own file does
        began = time.monotonic()
        await made.are("a", "b")
        assert time.monotonic() - began < bususers.CHECK_S
        assert await made.lets_in("b")


async def test_leftovers_go_and_what_is_somebody_else_s_stays(made):
    for name, password in (
        ("run-gone", bus_password(SEED, "gone")),
        ("run-other", bus_password(b"t" * 32, "other")),
        ("run-by-hand", "secret"),
        ("person", "secret"),
    ):
        await made.admin.execute_command("ACL SETUSER", name, "on", f">{password}")
    made.want("a")
    async with ending(asyncio.create_task(made.users.run(made.oona))):

        async def settled():
            return await made.names() == {"run-a", "run-other", "run-by-hand", "person"}

        await until(settled)


async def test_who_does_not_lead_touches_nothing(made):
    made.leads = False
    await made.admin.execute_command("ACL SETUSER", "run-gone", "on", f">{bus_password(SEED, 'gone')}")
    made.want("a")
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        await asyncio.sleep(0.5)
        assert await made.names() == {"run-gone"}
        made.leads = True
        made.want("b")
        await made.are("a", "b")


async def test_a_redis_that_allows_no_users_is_said_once_and_healed_by_itself(server, monkeypatch, caplog):
    monkeypatch.setattr(bususers, "DENIED_RETRY_S", 0.2)
    async with bench(server, users=False) as made:
        made.want("a")
        async with ending(asyncio.create_task(made.users.run(made.oona))):
            await until(lambda: len(made.told) >= 2)
            assert made.value("esper_bus_users_denied") == 1
            (key, why), *_ = made.told
            assert key == RunKey("default", "a")
            assert "permission" in why
            assert len([r for r in caplog.records if "redis.perRunUsers=false" in r.getMessage()]) == 1
            assert await made.names() == set()
            await made.admin.execute_command("ACL SETUSER", acl.OPERATOR, *acl.operator_rules())
            await made.are("a")
            await until(lambda: made.value("esper_bus_users_denied") == 0)


async def test_many_users_leave_redis_time_for_messages(made):
    made.want(*(f"uid-{number}" for number in range(1000)))
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        slowest = 0.0

        async def all_made():
            nonlocal slowest
            began = time.monotonic()
            await made.admin.ping()
            slowest = max(slowest, time.monotonic() - began)
            return made.value("esper_bus_user_changes_total", change="made") == 1000

        await until(all_made)
        assert len(await made.names()) == 1000
        assert slowest < 1.0


async def test_more_runs_than_allowed_get_no_user_and_no_memory(made, monkeypatch, caplog):
    monkeypatch.setattr(bususers, "MAX_USERS", 2)
    made.want("a", "b", "c", "d")
    assert len([r for r in caplog.records if "more than 2 runs" in r.getMessage()]) == 1
    made.users.forget("a")
    made.want("c")
    async with ending(asyncio.create_task(made.users.run(made.oona))):
        await made.are("b", "c")


async def test_the_fabric_is_kept_and_told(made):
    key = SigningKey.derive(SEED, "a", Role.REPORT)
    for _ in range(3):
        await made.oona.publish(NORMAL, seal(b"x", pb.BUS_MESSAGE_TYPE_FIELD_REPORT, run_uid="a", key=key))
    await made.admin.xgroup_create(NORMAL.name, "g", "0")
    await made.admin.xreadgroup("g", "c", {NORMAL.name: ">"}, count=1)
    fabric = Fabric(made.oona, made.metrics)
    await fabric.look()
    assert made.value("esper_oona_queue_depth", stream=NORMAL.name) == 3
    assert made.value("esper_oona_stream_length", stream=NORMAL.name) == 3
    assert made.value("esper_oona_oldest_pending_age_s", stream=NORMAL.name, group="g") >= 0
    assert made.value("esper_oona_backpressure_level", stream=NORMAL.name) == 0
    assert made.value("esper_oona_trimmed_total", stream=NORMAL.name) == 0
    assert made.value("esper_oona_dead_letters") == 0
    await made.admin.xgroup_destroy(NORMAL.name, "g")
    await fabric.look()
    assert made.value("esper_oona_oldest_pending_age_s", stream=NORMAL.name, group="g") is None


async def test_a_fabric_that_cannot_be_kept_is_said_once(server, made, caplog):
    fabric = Fabric(made.oona, made.metrics)
    server.kill()
    for _ in range(3):
        await fabric.look()
    assert len([r for r in caplog.records if "cannot be kept" in r.getMessage()]) == 1
    server.start()
