"""What tells nobody when it changes is seen by looking, with time told by hand; the supervisor's end is an event."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.pages import Page
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import RunReport, RuntimePhase
from esper_runtime.weatherlight.link import SupervisorLink
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.reportlog import ReportLog
from esper_runtime.weatherlight.watch import Lookout
from prometheus_client import CollectorRegistry

from tests.support.waiting import until
from tests.support.weatherlight import IDENTITY, RUNNING, FakeClock, beat, boot, opened, report_key, transition


class Watching:
    """Recorder, link and lookout over a run directory, in this process."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self.state_dir = directory / "state"
        self.run_dir.mkdir()
        self.state_dir.mkdir()
        self.clock = FakeClock()
        metrics = Metrics(CollectorRegistry())
        self.recorder = Recorder(IDENTITY, ReportLog(self.state_dir), report_key, self.clock, metrics)
        self.drained = 0
        self.link = SupervisorLink(
            self.run_dir / paths.WEATHERLIGHT_SOCKET, self.state_dir, self.recorder, metrics, drain=self._drain
        )
        self.lookout = Lookout(self.run_dir, self.recorder, self.link, metrics)
        self.now = 0.0

    async def _drain(self) -> None:
        self.drained += 1

    def runs(self, incarnation: int = 1) -> None:
        self.recorder.event(boot(incarnation), 0)
        self.recorder.event(transition(RUNNING, RuntimePhase.RUNTIME_PHASE_STARTING, 1), 0)

    def look(self, seconds: float) -> None:
        """As the loop does, four times a second."""
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            self.clock.advance(0.25)
            self.lookout.look(self.now)

    def reports(self) -> list[RunReport]:
        return [opened(record.envelope) for record in self.recorder.reports.after(0)]

    def degraded(self) -> list[tuple[str, str]]:
        return [(d.component, d.reason) for d in self.reports()[-1].degradations]

    def deaths(self) -> int:
        return sum(report.WhichOneof("event") == "failure" for report in self.reports())


@pytest.fixture
def watching() -> Iterator[Watching]:
    with tempfile.TemporaryDirectory(prefix="esper-") as directory:  # short: a socket lies in it
        made = Watching(Path(directory))
        yield made
        made.lookout.close()


def test_redis_is_gone_after_a_second_of_silence_and_back_at_once(watching: Watching):
    page = Page.create(watching.run_dir / paths.TRAINER_PAGE)
    page.write(0, beat(1, ns=1).words())
    watching.runs()
    watching.lookout.redis, watching.lookout.redis_problem = False, "refused"
    watching.look(0.75)
    assert watching.degraded() == []
    watching.look(0.5)
    assert watching.degraded() == [("oona", RunReason.BUS_UNAVAILABLE)]
    assert "refused" in watching.reports()[-1].degradations[0].message
    watching.lookout.redis = True
    watching.look(0.25)
    assert watching.degraded() == []
    page.close()


def test_a_run_without_redis_lacks_nothing(watching: Watching):
    watching.runs()
    watching.look(1.75)
    assert watching.degraded() == []


def test_a_page_that_a_running_trainer_should_write_is_missed(watching: Watching):
    watching.runs()
    watching.look(1.75)
    assert watching.degraded() == []
    watching.look(0.5)
    assert watching.degraded() == [("tolaria-page", RunReason.PAGE_UNREADABLE)]
    page = Page.create(watching.run_dir / paths.TRAINER_PAGE)
    page.write(0, beat(5, ns=watching.clock.ns).words())
    watching.look(0.25)
    assert watching.degraded() == []
    page.close()


def test_a_supervisor_that_does_not_come_is_dead_after_three_seconds_and_once(watching: Watching):
    watching.runs()
    watching.look(2.75)
    assert watching.deaths() == 0
    watching.look(0.5)
    assert watching.deaths() == 1
    watching.look(60)
    assert watching.deaths() == 1


def test_one_that_said_goodbye_is_not_missed(watching: Watching):
    (watching.state_dir / "goodbye").write_text("1\n")
    watching.runs()
    watching.look(60)
    assert watching.deaths() == 0
    watching.runs(2)  # the goodbye was the first one's
    watching.look(4)
    assert watching.deaths() == 1


async def listening(watching: Watching) -> asyncio.Task[None]:
    task = asyncio.create_task(watching.link.run())
    await until((watching.run_dir / paths.WEATHERLIGHT_SOCKET).exists)
    return task


async def ended(link: asyncio.Task[None]) -> None:
    link.cancel()
    await asyncio.gather(link, return_exceptions=True)
    assert link.cancelled()


def test_a_link_that_is_ended_or_begun_again_is_nobody_s_death(watching: Watching):
    async def scenario() -> None:
        link = await listening(watching)
        watching.runs()
        reader, writer = await asyncio.open_unix_connection(watching.run_dir / paths.WEATHERLIGHT_SOCKET)
        writer.write(b"tolaria 0 1\n")
        await until(lambda: watching.link.connected)
        await ended(link)
        assert not watching.link.connected
        await reader.read()  # its end is seen on the other side
        writer.close()
        (watching.run_dir / paths.WEATHERLIGHT_SOCKET).unlink(missing_ok=True)
        link = await listening(watching)
        _, writer = await asyncio.open_unix_connection(watching.run_dir / paths.WEATHERLIGHT_SOCKET)
        writer.write(b"tolaria 0 1\n")
        await until(lambda: watching.link.connected)
        assert watching.deaths() == 0
        await ended(link)
        writer.close()

    asyncio.run(scenario())


def test_the_end_of_the_connection_is_the_death_at_once_after_the_last_events(watching: Watching):
    async def scenario() -> None:
        link = await listening(watching)
        watching.runs()
        _, writer = await asyncio.open_unix_connection(watching.run_dir / paths.WEATHERLIGHT_SOCKET)
        writer.write(b"tolaria 0 1\n")
        await until(lambda: watching.link.connected)
        watching.look(60)
        assert watching.deaths() == 0, "connected means alive"
        writer.close()
        await until(lambda: watching.deaths() == 1)  # nobody looks any more: the event alone tells
        assert watching.drained == 1
        await ended(link)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "said",
    [b"", b"hello\n", b"tolaria 0\n", b"tolaria x 1\n", b"tolaria 0 0\n", b"kasmina 0 1\n", b"\xff\n", b"x" * 999],
)
def test_who_does_not_say_who_it_is_counts_for_nothing(watching: Watching, said: bytes):
    async def scenario() -> None:
        link = await listening(watching)
        watching.runs()
        reader, writer = await asyncio.open_unix_connection(watching.run_dir / paths.WEATHERLIGHT_SOCKET)
        writer.write(said)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert not watching.link.connected
        assert watching.deaths() == 0
        await ended(link)

    asyncio.run(scenario())
