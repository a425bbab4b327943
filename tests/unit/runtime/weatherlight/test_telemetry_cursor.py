"""From where weatherlight reads the journal again after a death."""

import asyncio

from esper_leyline import paths
from esper_leyline.events import RunEvent
from esper_leyline.journal import JournalWriter
from esper_leyline.oona import Admission, Outcome, Publisher, Status
from esper_leyline.signing import Role, SigningKey
from esper_leyline.v1.report_pb2 import Notice, RuntimeEvent
from esper_leyline.v1.telemetry_pb2 import TELEMETRY_LEVEL_CRITICAL, TelemetryPacket
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.reports import Identity
from esper_runtime.weatherlight.telemetry import REPEATS, Telemetry
from prometheus_client import CollectorRegistry

from tests.support.waiting import until

KEY = SigningKey.derive(b"s" * 32, "run", Role.REPORT)
LATE_NS = 1_000_000_000_000


class Bus:
    """Takes so many and then hangs, until the process is killed."""

    interruptions = 0

    def __init__(self, takes):
        self.takes, self.got = takes, []

    async def publish(self, _stream, envelope, *_more):
        if len(self.got) >= self.takes:
            await asyncio.Event().wait()
        self.got.append(TelemetryPacket.FromString(envelope.payload))
        return Outcome(status=Status.PUBLISHED, entry_id="1-0")

    def events(self):
        points = (point for packet in self.got for point in packet.metrics if point.name == REPEATS)
        return len(self.got) + sum(int(point.value) - 1 for point in points)


def telemetry(directory):
    return Telemetry(
        directory,
        directory,
        identity=Identity(run_uid="run", run="d/d", attempt=1, rank=0),
        key=lambda: KEY,
        metrics=Metrics(CollectorRegistry()),
        monotonic_ns=lambda: LATE_NS,
    )


async def test_repetitions_that_wait_behind_others_are_read_again(tmp_path):
    """They carry the place of the first of them, which is before those others."""
    journal = JournalWriter(tmp_path / paths.JOURNAL)

    def say(text):
        journal.append(
            RuntimeEvent(
                writer="tolaria",
                monotonic_ns=1,
                notice=Notice(reason="r", message=text),
                name=RunEvent.NOTICE,
                level=TELEMETRY_LEVEL_CRITICAL,
            )
        )

    for _ in range(21):
        say("flood")  # the first is sent, the others are held back
    for number in range(10):
        say(f"other {number}")

    async def live(bus, admission, done):
        part = telemetry(tmp_path)
        part.take()
        part.tell_repetitions(LATE_NS)
        task = asyncio.create_task(part.send_urgent(Publisher(bus, admission=admission)))
        await until(lambda: done(part))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        part.close()

    capped = Admission(lambda: 0.0, critical_per_minute=0)  # the first is counted, not sent
    first = Bus(takes=0)
    await live(first, _lets_all_but_one(capped), lambda part: part.waiting == 11)
    second = Bus(takes=99)
    await live(second, None, lambda part: part.waiting == 0)
    assert first.got == []
    assert second.events() >= 30, "twenty repetitions, ten others"


def _lets_all_but_one(capped):
    """The first is over the cap; the others are let through."""
    judge, asked = capped.judge, 0

    def once(*arguments):
        nonlocal asked
        asked += 1
        return judge(*arguments) if asked == 1 else Admission(lambda: 0.0).judge(*arguments)

    capped.judge = once
    return capped
