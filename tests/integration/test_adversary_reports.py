"""What pods tell, with Redis in foreign hands: only what they made counts, what is withheld is pulled, and the operator
outlives whatever answers in the place of Redis."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from esper_leyline.oona import REPORTS, Oona, OonaConfig, OonaUnavailable
from esper_leyline.oona.streams import FIELD
from esper_leyline.signing import Role
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.report_pb2 import Notice
from esper_operator import observe
from esper_operator.bususers import BusUsers
from esper_operator.fabric import Fabric
from esper_operator.metrics import Metrics
from esper_operator.model import RunKey
from esper_operator.pull import HttpFetch, Puller, connections
from esper_operator.reports import Intake
from esper_operator.testing.builders import a_run, pod_manifest
from redis.asyncio import Redis

from tests.support.forgeries import LIES, flipped, lying, rewritten, truncated, under_other_keys
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.weatherlight import SEED, UID, PodFiles, boot, event, opened, sealed, signal_message

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def make_pod(tmp_path):
    made = []

    def make(url):
        made.append(PodFiles(tmp_path / "pod", redis_url=url))
        made[-1].start()
        return made[-1]

    yield make
    for pod in made:
        pod.close()


@pytest.mark.row("T07")
async def test_the_operators_parts_outlive_a_server_that_is_no_redis():
    """An error in any of them would end its process, and with it every order by every way."""
    async with AsyncExitStack() as stack:
        liar = await stack.enter_async_context(lying())
        config = OonaConfig(url=liar.url, timeout_s=0.1, block_s=0.1, backoff_max_s=0.05, breaker_failures=10**9)
        oona = await stack.enter_async_context(Oona(config))
        metrics, operator = Metrics(), Operator()
        users = BusUsers(seed=SEED, generation=1, held=lambda: True, monotonic=time.monotonic, metrics=metrics)
        users.want(UID, RunKey("team", "digits"))
        entries = await stack.enter_async_context(aclosing(oona.reports()))
        order, done = sealed(signal_message(1)), []
        parts = {
            "reports": operator.intake.read(entries),
            "users": users.run(oona),
            "fabric": again(Fabric(oona, metrics).look, done),
            "signals": again(lambda: oona.publish_signal(UID, order), done),
            "catching up": again(lambda: newest_or_none(oona), done),
        }
        for part in parts.values():
            await stack.enter_async_context(endless(part))
        for lie in LIES:
            liar.tell(lie)
            before = len(done)
            await until(lambda before=before: liar.asked >= 10 and len(done) >= before + 6, what=lie)
    assert operator.taken == []


async def again(look: Callable[[], Awaitable[Any]], done: list[Any]) -> None:
    while True:
        done.append(await look())
        await asyncio.sleep(0.01)


async def newest_or_none(oona: Oona) -> object:
    try:
        return await oona.last(REPORTS)
    except OonaUnavailable:
        return None


@asynccontextmanager
async def endless(work: Coroutine[Any, Any, None]):
    """It must not end by itself."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        [end] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(end, asyncio.CancelledError), end


class Operator:
    """Its way in for reports, from Redis and from the pod, with what it takes folded at once."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.forged: list[str] = []
        self.taken: list[Any] = []
        self.intake = Intake(
            seed=SEED,
            generation=1,
            monotonic=time.monotonic,
            on_report=lambda _key, _urgent: self.fold(),
            on_outcome=lambda way, outcome: self.outcomes.update([(way, outcome)]),
            on_forged=lambda _key, reason: self.forged.append(reason),
        )
        self.intake.observe(UID, RunKey("team", "digits"), (0, 0))

    def fold(self) -> None:
        for report in self.intake.of(UID):
            self.taken.append(report)
        if self.taken:
            self.intake.observe(UID, RunKey("team", "digits"), (self.taken[-1].attempt, self.taken[-1].seq))

    def notices(self) -> list[str]:
        return [report.notice.message for report in self.taken if report.WhichOneof("event") == "notice"]

    @asynccontextmanager
    async def at_work(self, pod: PodFiles, oona: Oona):
        port = int((pod.run_dir / "weatherlight.port").read_text())
        raw = pod_manifest(a_run(), "training", attempt=1)
        raw["metadata"]["labels"]["esper.dev/run-uid"] = UID
        raw["status"]["podIP"] = "127.0.0.1"
        found = observe.pod(raw)
        async with aiohttp.ClientSession(connector=connections()) as session, aclosing(oona.reports()) as entries:
            puller = Puller(
                intake=self.intake,
                pods=lambda: [found],
                bus_connected=lambda: oona.connected,
                fetch=HttpFetch(session, port),
            )
            async with endless(self.intake.read(entries)), endless(puller.run()):
                yield


async def forged_reports(admin: Redis) -> int:
    """Made of every genuine report on the stream; so many were added."""
    genuine = [fields[FIELD] for _, fields in await admin.xrange(REPORTS.name)]
    first, last = BusEnvelope.FromString(genuine[0]), BusEnvelope.FromString(genuine[-1])
    made = [
        *(one.SerializeToString() for one in under_other_keys(last, SEED, UID, (Role.OPERATOR, Role.TAMIYO)).values()),
        *(one.SerializeToString() for one in rewritten(last, first.payload).values()),
        *truncated(genuine[-1]),
        *flipped(genuine[-1], bits=(0,)),
        *reversed(genuine),
        *genuine,
        bytes(300_000),
        b"",
    ]
    adding = admin.pipeline(transaction=False)
    for raw in made:
        adding.xadd(REPORTS.name, {FIELD: raw})
    adding.xadd(REPORTS.name, {b"x": genuine[0]})
    await adding.execute()
    return len(made) + 1


async def pass_on(pods: Oona, operators: Redis, withheld: set[str]) -> None:
    """Redis as its holder would have it: the operator gets to read what pods have written, without some of it."""
    async with aclosing(pods.reports()) as entries:
        async for entry in entries:
            report = opened(entry.raw)
            if report.WhichOneof("event") != "notice" or report.notice.message not in withheld:
                await operators.xadd(REPORTS.name, {FIELD: entry.raw})


async def last_passed_on(operators: Redis, message: str) -> bool:
    found = await operators.xrevrange(REPORTS.name)
    return any(opened(fields[FIELD]).notice.message == message for _, fields in found)


@pytest.mark.row("T07")
async def test_reports_that_the_pod_did_not_make_change_nothing_and_withheld_ones_are_pulled(make_pod):
    async with AsyncExitStack() as stack:
        pods, operators = (stack.enter_context(RedisServer()) for _ in range(2))
        admin = await stack.enter_async_context(Redis.from_url(operators.url))
        source, oona = [
            await stack.enter_async_context(Oona(OonaConfig(url=server.url, timeout_s=0.5)))
            for server in (pods, operators)
        ]
        pod, operator = make_pod(pods.url), Operator()
        await until(pod.ready)
        pod.journal.append(boot(1))
        withheld = {"5", "6", "7", "8"}
        await stack.enter_async_context(endless(pass_on(source, admin, withheld)))
        await stack.enter_async_context(operator.at_work(pod, oona))
        for n in range(5):
            pod.journal.append(event(notice=Notice(reason="Step", message=str(n))))
        await until(lambda: operator.notices() == ["0", "1", "2", "3", "4"])
        await until(lambda: last_passed_on(admin, "4"))
        forged = await forged_reports(admin)
        await until(lambda: sum(operator.outcomes.values()) >= forged)
        for n in range(5, 10):
            pod.journal.append(event(notice=Notice(reason="Step", message=str(n))))
        await until(lambda: "9" in operator.notices())
    places = [(report.attempt, report.seq) for report in operator.taken]
    assert operator.notices() == [*map(str, range(10))]
    assert places == sorted(set(places))
    assert len(operator.forged) < 20
    print(
        f"{forged} forged reports: {dict(operator.outcomes)}; {len(operator.forged)} Events; 10 genuine ones once each"
    )
