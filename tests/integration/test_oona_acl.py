"""Each role's user against a real server: what its code does works, everything else is refused."""

import asyncio
import contextlib
from contextlib import aclosing

import pytest
from esper_leyline import signing
from esper_leyline.oona import (
    DEAD_LETTERS,
    EMERGENCY,
    NORMAL,
    POLICY,
    REPORTS,
    TELEMETRY,
    Consumer,
    ConsumerOptions,
    Housekeeper,
    Oona,
    OonaConfig,
    OonaDenied,
    Publisher,
    Status,
    acl,
    dead_letters,
    replay,
    signals,
)
from esper_leyline.oona.housekeeping import pressures
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1 import common_pb2 as pb
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENT_S, until

pytestmark = pytest.mark.timeout(120)
SEED = b"s" * 32
OWN, OTHER = "0f5b4b0e-6a0e-4b62-9a5b-1f1d2c3b4a59", "11111111-6a0e-4b62-9a5b-1f1d2c3b4a59"
KEY = SigningKey.derive(SEED, OWN, Role.REPORT)


def message(kind=pb.BUS_MESSAGE_TYPE_RUN_REPORT, priority=pb.MESSAGE_PRIORITY_NORMAL):
    return seal(b"x", kind, run_uid=OWN, key=KEY, priority=priority)


@pytest.fixture(scope="module")
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture
async def admin(server):
    async with Redis.from_url(server.url) as client:
        await client.flushall()
        for user in await client.acl_users():
            if user not in ("default", b"default"):
                await client.acl_deluser(user)
        for name, rules in (
            (acl.run_user(OWN), acl.run_rules(OWN)),
            (acl.run_user(OTHER), acl.run_rules(OTHER)),
            (acl.NISSA, acl.nissa_rules()),
            (acl.OPERATOR, acl.operator_rules()),
        ):
            await client.execute_command("ACL SETUSER", *acl.setuser(name, f"password of {name}", rules))
        yield client


@contextlib.asynccontextmanager
async def as_user(server, name, database=0):
    config = OonaConfig(
        url=f"{server.url}/{database}",
        username=name,
        password=f"password of {name}",
        block_s=0.2,
        backoff_max_s=0.1,
    )
    async with Oona(config) as oona:
        yield oona


@contextlib.asynccontextmanager
async def raw(server, name):
    async with Redis.from_url(
        server.url, username=name, password=f"password of {name}", protocol=2, driver_info=None
    ) as client:
        yield client


async def first(generator):
    async with aclosing(generator) as entries:
        return await asyncio.wait_for(anext(entries), PATIENT_S)


@pytest.mark.parametrize("database", [0, 1])
async def test_a_run_does_all_that_its_code_does(server, admin, database):
    async with as_user(server, acl.run_user(OWN), database) as run:
        publisher = Publisher(run)
        for envelope in (
            message(),
            message(pb.BUS_MESSAGE_TYPE_EMERGENCY_ACK),
            message(pb.BUS_MESSAGE_TYPE_FIELD_REPORT),
            message(pb.BUS_MESSAGE_TYPE_TELEMETRY),
            message(pb.BUS_MESSAGE_TYPE_TELEMETRY, pb.MESSAGE_PRIORITY_CRITICAL),
        ):
            outcome = await publisher.publish(envelope)
            assert outcome.status is Status.PUBLISHED, outcome
        assert await pressures(run) == {}
        async with run.connection() as client:
            await run.ask(client.time(), 1.0)


async def test_a_run_hears_its_signals_by_stream_and_by_channel(server, admin):
    async with as_user(server, acl.run_user(OWN)) as run, as_user(server, acl.OPERATOR) as operator:
        following = asyncio.ensure_future(first(run.signals(OWN)))
        listening = asyncio.ensure_future(first(run.subscribe(signals(OWN).name)))

        async def heard():
            return (await admin.pubsub_numsub(signals(OWN).name))[0][1]

        await until(heard)
        critical = message(pb.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL, pb.MESSAGE_PRIORITY_CRITICAL)
        assert (await operator.publish_signal(OWN, critical)).status is Status.PUBLISHED
        assert (await following).envelope() == (await listening).envelope() == critical


OTHERS = signals(OTHER).name
FORBIDDEN_TO_A_RUN = [
    f"XADD {OTHERS} * e x",
    f"XADD {signals(OWN).name} * e x",
    f"XADD {POLICY.name} * e x",
    f"XADD {DEAD_LETTERS.name} * e x",
    "XADD foreign * e x",
    f"XREAD COUNT 1 STREAMS {OTHERS} 0",
    f"XREAD COUNT 1 STREAMS {signals(OWN).name} {OTHERS} 0 0",
    f"XREVRANGE {OTHERS} + - COUNT 1",
    f"XREVRANGE {REPORTS.name} + - COUNT 1",
    f"XREAD COUNT 1 STREAMS {EMERGENCY.name} 0",
    f"XRANGE {signals(OWN).name} - +",
    f"XLEN {REPORTS.name}",
    f"PUBLISH {OTHERS} x",
    f"PUBLISH {signals(OWN).name} x",
    f"SUBSCRIBE {OTHERS}",
    f"SUBSCRIBE {REPORTS.name}",
    "PSUBSCRIBE oona.*",
    f"XGROUP CREATE {REPORTS.name} g 0",
    f"XREADGROUP GROUP g c STREAMS {REPORTS.name} >",
    f"XTRIM {REPORTS.name} MAXLEN 0",
    f"XDEL {REPORTS.name} 0-1",
    f"DEL {REPORTS.name}",
    f"EXPIRE {REPORTS.name} 1",
    "HSET oona.pressure oona.telemetry high",
    "SET oona.seen.nissa.x done",
    "KEYS *",
    "SCAN 0",
    "CONFIG GET *",
    "INFO",
    "ACL LIST",
    "ACL WHOAMI",
    "ACL SETUSER default on",
    "CLIENT LIST",
    "FLUSHALL",
    "EVAL return 0",
    "SHUTDOWN NOSAVE",
    "REPLICAOF NO ONE",
    "MONITOR",
]


@pytest.mark.parametrize("command", FORBIDDEN_TO_A_RUN)
async def test_a_run_may_do_nothing_else(server, admin, command):
    words = [*command.split(), "0"] if command.startswith("EVAL") else command.split()
    async with raw(server, acl.run_user(OWN)) as client:
        with pytest.raises(NoPermissionError):
            await client.execute_command(*words)


async def test_a_follower_of_another_run_s_signals_gets_none(server, admin):
    async with as_user(server, acl.OPERATOR) as operator, as_user(server, acl.run_user(OWN)) as run:
        await operator.publish_signal(OTHER, message(priority=pb.MESSAGE_PRIORITY_CRITICAL))
        with pytest.raises(OonaDenied):
            await run.last(signals(OTHER))
        refused = await run.publish(signals(OTHER), message())
        assert refused.status is Status.REFUSED
        assert "permission" in refused.detail.lower() or "EXECABORT" in refused.detail


async def test_a_removed_user_is_cut_off_at_once_and_a_new_one_needs_no_restart(server, admin):
    async with as_user(server, acl.run_user(OWN)) as run:
        assert (await run.publish_report(message())).status is Status.PUBLISHED
        await admin.acl_deluser(acl.run_user(OWN))
        assert (await run.publish_report(message())).status is Status.UNAVAILABLE
        rules = acl.setuser(acl.run_user(OWN), f"password of {acl.run_user(OWN)}", acl.run_rules(OWN))
        await admin.execute_command("ACL SETUSER", *rules)

        async def published():
            return (await run.publish_report(message())).status is Status.PUBLISHED

        await until(published)


async def test_nissa_consumes_in_groups_and_gives_up_to_the_dead_letters(server, admin):
    done = []

    async def handle(delivery):
        done.append(delivery.entry_id)

    async with as_user(server, acl.OPERATOR) as operator, as_user(server, acl.NISSA) as nissa:
        for stream in (TELEMETRY, EMERGENCY, NORMAL):
            await operator.publish(stream, message())
            await admin.xadd(stream.name, {"e": b"\xff"})
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    Consumer(
                        nissa,
                        stream,
                        group="nissa",
                        name="a",
                        handler=handle,
                        options=ConsumerOptions(once=True, claim_every_s=0.1),
                    ).run()
                )
                for stream in (TELEMETRY, EMERGENCY, NORMAL)
            ]

            async def finished():
                return len(done) == 3 and await admin.xlen(DEAD_LETTERS.name) == 3

            await until(finished)
            for task in tasks:
                task.cancel()


@pytest.mark.parametrize(
    "command",
    [
        f"XADD {TELEMETRY.name} * e x",
        f"XREADGROUP GROUP g c STREAMS {REPORTS.name} >",
        f"XREAD COUNT 1 STREAMS {OTHERS} 0",
        f"XREVRANGE {DEAD_LETTERS.name} + -",
        f"XTRIM {TELEMETRY.name} MAXLEN 0",
        f"XGROUP DESTROY {TELEMETRY.name} g",
        f"PUBLISH {TELEMETRY.name} x",
        "SUBSCRIBE oona.reports",
        "SET oona.seen.other.x done",
        "SET oona.pressure x",
        f"DEL {TELEMETRY.name}",
        "ACL LIST",
        "INFO",
    ],
)
async def test_nissa_may_do_nothing_else(server, admin, command):
    async with raw(server, acl.NISSA) as client:
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command.split())


async def test_the_operator_keeps_the_fabric_and_its_users(server, admin):
    async with as_user(server, acl.OPERATOR) as operator:
        await operator.publish(NORMAL, message())
        found = await Housekeeper(operator, clock=lambda: 0.0).look()
        assert found[NORMAL.name].length == 1
        assert await dead_letters(operator) == []
        with pytest.raises(ValueError, match="no dead letter"):
            await replay(operator, ["1-1"])
        async with operator.connection() as client:
            rules = acl.setuser("run-a", "x", acl.run_rules("a"))
            await operator.ask(client.execute_command("ACL SETUSER", *rules), 1.0)
            listed = dict(map(acl.listed, await operator.ask(client.acl_list(), 1.0)))
            assert listed["run-a"] == {acl.hashed("x")}
            assert await operator.ask(client.acl_deluser("run-a"), 1.0) == 1
            assert "run_id" in await operator.ask(client.info("server"), 1.0)


async def test_without_users_the_operator_makes_none(server, admin):
    rules = acl.setuser(acl.OPERATOR, f"password of {acl.OPERATOR}", acl.operator_rules(users=False))
    await admin.execute_command("ACL SETUSER", *rules)
    async with as_user(server, acl.OPERATOR) as operator, operator.connection() as client:
        with pytest.raises(OonaDenied):
            await operator.ask(client.execute_command("ACL SETUSER", "run-a", "on"), 1.0)
        assert (await operator.publish(NORMAL, message())).status is Status.PUBLISHED


@pytest.mark.parametrize(
    "command", ["KEYS *", "FLUSHALL", "CONFIG GET *", "SET foreign x", "PSUBSCRIBE *", "XADD foreign * e x", "ACL LOAD"]
)
async def test_the_operator_may_do_nothing_else(server, admin, command):
    async with raw(server, acl.OPERATOR) as client:
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command.split())


async def test_a_password_of_another_seed_lets_nobody_in(server, admin):
    name = acl.run_user(OWN)
    rules = acl.setuser(name, signing.bus_password(SEED, OWN), acl.run_rules(OWN))
    await admin.execute_command("ACL SETUSER", *rules)
    for seed, expected in ((SEED, Status.PUBLISHED), (b"t" * 32, Status.UNAVAILABLE)):
        config = OonaConfig(url=server.url, username=name, password=signing.bus_password(seed, OWN))
        async with Oona(config) as run:
            assert (await run.publish_report(message())).status is expected
