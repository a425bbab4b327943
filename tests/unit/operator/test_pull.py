"""Reports from the pods themselves: who is asked, when, how often, and what an unfriendly pod can do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.common_pb2 import BusMessageType
from esper_leyline.v1.report_pb2 import Notice, ReportBatch, RunReport
from esper_operator import observe, pull
from esper_operator.model import Pod, RunKey
from esper_operator.pull import HttpFetch, Puller
from esper_operator.reports import Intake
from esper_operator.testing.builders import a_run, pod_manifest

from tests.support.virtualtime import run_virtual

SEED = bytes(range(32))


def a_pod(number: int = 0, state: str = "training") -> Pod:
    raw = pod_manifest(a_run(), state, attempt=1, number=number)
    raw["metadata"]["labels"]["esper.dev/run-uid"] = f"run-{number}"
    raw["status"]["podIP"] = f"10.0.{number // 250}.{number % 250}"
    found = observe.pod(raw)
    assert found is not None
    return found


def envelope(uid: str, n: int, *, seed: bytes = SEED) -> BusEnvelope:
    report = RunReport(version=1, run_uid=uid, attempt=1, seq=(1 << 32) + n)
    kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
    return seal(report.SerializeToString(), kind, run_uid=uid, key=SigningKey.derive(seed, uid, Role.REPORT))


class Scene:
    """Pods that answer after a second with one report each, or as a test says."""

    def __init__(self, count: int, *, max_polls: int = 256) -> None:
        self.pods = [a_pod(number) for number in range(count)]
        self.by_ip = {pod.ip: pod for pod in self.pods}
        self.bus = False
        self.asked: list[tuple[str, int, int]] = []
        self.open = self.most_open = 0
        self.answer: Callable[[Pod, int], bytes] = lambda pod, after: self.batch(pod, after)
        self.takes_s = 1.0
        self.outcomes: list[str] = []
        self.intake = Intake(
            seed=SEED,
            generation=1,
            monotonic=asyncio.get_running_loop().time,
            on_report=lambda _key, _urgent: None,
            on_outcome=lambda _way, outcome: self.outcomes.append(outcome),
        )
        for pod in self.pods:
            self.intake.observe(pod.run_uid, RunKey(pod.namespace, pod.run), (0, 0))
        self.puller = Puller(
            intake=self.intake,
            pods=lambda: self.pods,
            bus_connected=lambda: self.bus,
            fetch=self.fetch,
            max_polls=max_polls,
        )

    def batch(self, pod: Pod, after: int) -> bytes:
        fresh = envelope(pod.run_uid, (after & 0xFFFFFFFF) + 1)
        return ReportBatch(envelopes=[fresh.SerializeToString()]).SerializeToString()

    async def fetch(self, ip: str, after: int, wait_s: int) -> bytes:
        self.asked.append((ip, after, wait_s))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.takes_s)
        finally:
            self.open -= 1
        return self.answer(self.by_ip[ip], after)

    async def lives(self, seconds: float) -> None:
        running = asyncio.create_task(self.puller.run())
        await asyncio.sleep(seconds)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        if running.done() and not running.cancelled():
            running.result()


def test_a_pod_is_asked_for_what_is_new_as_long_as_redis_is_away() -> None:
    async def main() -> None:
        scene = Scene(1)
        await scene.lives(3.2)
        first = 1 << 32
        assert [after for _, after, _ in scene.asked] == [0, first + 1, first + 2, first + 3]
        assert {wait for *_, wait in scene.asked} == {pull.WAIT_S}
        assert [report.seq - first for report in scene.intake.of("run-0")] == [3]

    run_virtual(main())


def test_nobody_is_asked_while_redis_delivers_and_everybody_once_it_is_silent() -> None:
    async def main() -> None:
        scene = Scene(1)
        scene.bus = True
        scene.intake.accept(envelope("run-0", 1), way="bus")
        await scene.lives(2.9)
        assert scene.asked == []
        await scene.lives(2.0)
        assert len(scene.asked) >= 1

    run_virtual(main())


def test_what_is_missing_in_redis_is_asked_of_its_pod_though_redis_delivers() -> None:
    def told(n: int, *, before: int) -> BusEnvelope:
        first = 1 << 32
        report = RunReport(
            version=1, run_uid="run-0", attempt=1, seq=first + n, notice=Notice(), previous_event_seq=first + before
        )
        kind = BusMessageType.BUS_MESSAGE_TYPE_RUN_REPORT
        return seal(
            report.SerializeToString(), kind, run_uid="run-0", key=SigningKey.derive(SEED, "run-0", Role.REPORT)
        )

    async def main() -> None:
        scene = Scene(1)
        scene.bus, scene.takes_s = True, 0.01
        scene.intake.accept(told(1, before=-(1 << 32)), way="bus")
        scene.intake.accept(told(3, before=2), way="bus")
        missing = [told(2, before=1), told(3, before=2)]
        scene.answer = lambda _pod, _after: ReportBatch(
            envelopes=[one.SerializeToString() for one in missing]
        ).SerializeToString()
        await scene.lives(1.0)
        assert scene.asked[0] == (scene.pods[0].ip, (1 << 32) + 1, pull.WAIT_S)
        assert [report.seq - (1 << 32) for report in scene.intake.of("run-0")] == [1, 2, 3]

    run_virtual(main())


@pytest.mark.parametrize("state", ["pending", "placed", "failed"])
def test_a_pod_whose_weatherlight_does_not_run_is_not_asked(state: str) -> None:
    async def main() -> None:
        scene = Scene(1)
        scene.pods = [a_pod(0, state)]
        await scene.lives(3)
        assert scene.asked == []

    run_virtual(main())


def test_of_more_pods_than_polls_each_gets_its_turn() -> None:
    async def main() -> None:
        scene = Scene(50, max_polls=8)
        await scene.lives(40)
        times = {pod.ip: sum(ip == pod.ip for ip, *_ in scene.asked) for pod in scene.pods}
        assert scene.most_open <= 8
        assert min(times.values()) >= 2
        assert max(times.values()) - min(times.values()) <= 1
        assert {wait for *_, wait in scene.asked} == {0}

    run_virtual(main())


def test_a_pod_that_answers_too_soon_with_nothing_new_is_asked_ever_more_rarely() -> None:
    async def main() -> None:
        scene = Scene(1)
        scene.takes_s = 0.0
        scene.answer = lambda _pod, _after: b""
        await scene.lives(60)
        assert len(scene.asked) < 20
        scene.asked.clear()
        forged = envelope("run-0", 7, seed=bytes(32)).SerializeToString()
        scene.answer = lambda _pod, _after: ReportBatch(envelopes=[forged]).SerializeToString()
        await scene.lives(60)
        assert len(scene.asked) < 20
        assert set(scene.outcomes) == {"forged"}

    run_virtual(main())


@pytest.mark.parametrize("answer", [b"\xff\xff", ReportBatch(envelopes=[b"\xff"]).SerializeToString()])
def test_an_answer_that_is_none_is_borne(answer: bytes) -> None:
    async def main() -> None:
        scene = Scene(1)
        scene.answer = lambda _pod, _after: answer
        await scene.lives(5)
        assert scene.intake.of("run-0") == ()

    run_virtual(main())


def test_a_pod_speaks_only_for_its_own_run() -> None:
    async def main() -> None:
        scene = Scene(2)
        other = envelope("run-1", 9).SerializeToString()
        scene.answer = lambda pod, after: ReportBatch(envelopes=[other]).SerializeToString()
        scene.pods = scene.pods[:1]
        await scene.lives(2.5)
        assert scene.intake.of("run-1") == ()

    run_virtual(main())


def test_a_bug_in_a_poll_ends_the_puller_and_with_it_the_process() -> None:
    async def main() -> None:
        scene = Scene(1)
        scene.answer = lambda _pod, _after: [][0]
        with pytest.raises(IndexError):
            await scene.lives(5)

    run_virtual(main())


# --- over HTTP ---


@asynccontextmanager
async def served(handler: Callable[[web.Request], object]) -> AsyncIterator[HttpFetch]:
    app = web.Application()
    app.router.add_get("/v1/reports", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(connector=pull.connections()) as session:
        yield HttpFetch(session, port)
    await runner.cleanup()


def test_the_question_and_the_answer_over_http() -> None:
    async def main() -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=f"{request.query['after']} {request.query['wait']}".encode())

        async with served(handler) as fetch:
            assert await fetch("127.0.0.1", 7, 3) == b"7 3"

    asyncio.run(main())


def test_a_pod_cannot_fill_the_operators_memory_or_send_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "MAX_BATCH_BYTES", 1000)

    async def main() -> None:
        async def large(_: web.Request) -> web.Response:
            return web.Response(body=b"x" * 1001)

        async with served(large) as fetch:
            with pytest.raises(aiohttp.ClientPayloadError):
                await fetch("127.0.0.1", 0, 0)

        async def elsewhere(_: web.Request) -> web.Response:
            raise web.HTTPFound("http://169.254.169.254/")

        async with served(elsewhere) as fetch:
            assert await fetch("127.0.0.1", 0, 0) != b""  # the redirect's own words; nobody went there

    asyncio.run(main())


def test_as_many_polls_may_be_open_as_there_may_be_polls() -> None:
    async def main() -> None:
        there = asyncio.Event()
        count = 0

        async def handler(_: web.Request) -> web.Response:
            nonlocal count
            count += 1
            if count == 150:
                there.set()
            await there.wait()
            return web.Response(body=b"ok")

        async with served(handler) as fetch:
            answers = await asyncio.gather(*(fetch("127.0.0.1", 0, 5) for _ in range(150)))
        assert set(answers) == {b"ok"}

    asyncio.run(main())
