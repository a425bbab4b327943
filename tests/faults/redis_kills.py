"""Redis is killed and frozen while reports, telemetry and signals pass through it (fault row 5): nothing lost, nothing
twice.

A real weatherlight takes events from a pod's journal; the operator's real intake reads the reports by the bus alone,
two real consumers read the telemetry in the place of Nissa, and signals go by Redis and by the mounted file, as the
operator sends them. Every other kill also takes the end of the append-only file, up to what it got in its last second:
so much `appendfsync everysec` may lose when the node goes down with its server.

What a receiver acts on is counted: reports as the reconciler folds them, packets as a handler gets them, signals as
weatherlight accepts them.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from esper_leyline.events import RunEvent
from esper_leyline.oona import EMERGENCY, TELEMETRY, Consumer, ConsumerOptions, Delivery, Done, Oona, OonaConfig
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY
from esper_leyline.v1.report_pb2 import Notice
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel, TelemetryPacket
from esper_operator.model import RunKey
from esper_operator.reports import Intake

from tests.bench.nerves import CHART
from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENT_S, until
from tests.support.weatherlight import SEED, UID, PodFiles, boot, event, sealed, signal_message

LEVELS = ("INFO",) * 30 + ("WARNING",) * 8 + ("CRITICAL",) * 2
EVENT_S = 0.005
SIGNAL_S = 0.1
UP_S = (0.1, 0.6)
"""Between two faults."""
AWAY_S = (0.0, 0.4)
FROZEN_S = (0.1, 1.5)
FROZEN_SHARE = 0.2
TAIL_S = 1.0
"""Of the file, what a kill may take."""
QUICK: dict[str, Any] = {"timeout_s": 0.5, "block_s": 0.3, "backoff_max_s": 0.3}
RUN = RunKey("team", "digits")


class Redis:
    name = "redis"
    goal = 200

    def __init__(self, faults_per_shot: int = 20) -> None:
        self._faults = faults_per_shot

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        return asyncio.run(self._shoot(random.Random(number), directory))

    async def _shoot(self, dice: random.Random, directory: Path) -> "Counter[str]":
        with RedisServer(data_dir=directory / "redis", **CHART) as server, _pod(directory, server) as pod:
            await until(pod.ready)
            async with Oona(OonaConfig(url=server.url, **QUICK)) as oona, receiving(oona) as received:
                traffic = Traffic(pod, oona)
                async with traffic.flowing():
                    counts = Counter(await strike(server, dice, self._faults))
                await self._compare(traffic, received, pod)
        counts["faults"] = self._faults
        counts["reports"] = counts["packets"] = len(traffic.said)
        counts["signals"] = traffic.signals
        counts["sent again"] = received.again
        return counts

    async def _compare(self, traffic: "Traffic", received: "Received", pod: PodFiles) -> None:
        """AssertionError unless all that was sent has arrived, once."""
        wanted = traffic.said

        def all_there() -> bool:
            received.require_alive()
            return set(wanted) <= set(received.reports) and set(wanted) <= set(received.packets)

        with contextlib.suppress(TimeoutError):  # what is missing is told below
            async with asyncio.timeout(PATIENT_S):
                while not all_there():  # noqa: ASYNC110 - receivers run in this loop and tell nobody
                    await asyncio.sleep(0.02)
        for what, found in (("reports", received.reports), ("packets", received.packets)):
            lost = sorted(set(wanted) - set(found), key=int)
            twice = sorted((text for text, count in Counter(found).items() if count > 1), key=int)
            assert not lost, f"{len(lost)} of {len(wanted)} {what} lost, such as {lost[:10]}"
            assert not twice, f"{len(twice)} of {len(wanted)} {what} twice, such as {twice[:10]}"
        assert received.reports == wanted, "reports out of order"
        accepted = sum([await pod.metric(f'esper_weatherlight_signals_total{{leg="{leg}",verdict="accepted"}}')
                        for leg in ("redis", "configmap")])  # fmt: skip
        assert accepted == traffic.signals, f"{traffic.signals} signals sent, {accepted:g} accepted"


@contextlib.contextmanager
def _pod(directory: Path, server: RedisServer) -> Any:
    pod = PodFiles(directory / "pod", redis_url=server.url)
    pod.start()
    try:
        yield pod
    finally:
        pod.close()


class Traffic:
    """What is sent."""

    def __init__(self, pod: PodFiles, oona: Oona) -> None:
        self._pod, self._oona = pod, oona
        self.said: list[str] = []
        self.signals = 0

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        self._pod.journal.append(boot())
        tasks = [asyncio.create_task(part) for part in (self._events(), self._signals())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), f"traffic ended by itself: {ended}"
        await self._arrived()

    async def _events(self) -> None:
        while True:
            text = str(len(self.said))
            level = TelemetryLevel.Value(f"TELEMETRY_LEVEL_{LEVELS[len(self.said) % len(LEVELS)]}")
            said = event(notice=Notice(reason="r", message=text), name=RunEvent.NOTICE, level=level)
            assert self._pod.journal.append(said), "the journal is full"
            self.said.append(text)
            await asyncio.sleep(EVENT_S)

    async def _signals(self) -> None:
        while True:
            self.signals += 1
            envelope = sealed(signal_message(self.signals, clear=self.signals % 2 == 0))
            publishing = asyncio.ensure_future(self._oona.publish_signal(UID, envelope))
            self._pod.mount_signal(envelope.SerializeToString())
            await publishing
            await self._arrived()
            await asyncio.sleep(SIGNAL_S)

    async def _arrived(self) -> None:
        """The page has the newest signal. One that comes before that would be a change of mind, not a loss."""

        def there() -> bool:
            record = self._pod.emergency()
            return record is not None and record.seq == self.signals

        await until(there, what=f"signal {self.signals} on the page")


class Received:
    """What the receivers act on, in order."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.packets: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.again = 0
        """Messages that came once more and were let go."""
        self.intake = Intake(
            seed=SEED,
            generation=1,
            monotonic=time.monotonic,
            on_report=lambda _key, _urgent: self._fold(),
            on_outcome=lambda _way, outcome: self._count(outcome),
        )
        self.intake.observe(UID, RUN, (0, 0))

    def require_alive(self) -> None:
        """Its tasks are endless: what one ended with is the finding."""
        for task in self.tasks:
            if task.done():
                task.result()
                raise AssertionError("a receiver ended by itself")

    def _count(self, outcome: str) -> None:
        self.again += outcome == "repeated"

    def _fold(self) -> None:
        """As a reconcile does: takes what there is, and says how far it has got."""
        for report in self.intake.of(UID):
            if report.WhichOneof("event") == "notice" and report.notice.reason == "r":
                self.reports.append(report.notice.message)
            self.intake.fold(UID, (report.attempt, report.seq))

    async def packet(self, delivery: Delivery) -> None:
        if delivery.envelope.message_type != BUS_MESSAGE_TYPE_TELEMETRY:
            return  # signals are on the emergency stream too
        packet = TelemetryPacket.FromString(delivery.envelope.payload)
        self.packets += [one.description.removeprefix("r: ") for one in packet.events if one.name == RunEvent.NOTICE]


@contextlib.asynccontextmanager
async def receiving(oona: Oona) -> AsyncIterator[Received]:
    received = Received()
    options, done = ConsumerOptions(once=True, claim_every_s=0.5, claim_idle_s=30.0), Done()
    consumers = [
        Consumer(oona, stream, group="nissa", name="a", handler=received.packet, options=options, done=done)
        for stream in (TELEMETRY, EMERGENCY)
    ]
    parts = [received.intake.read(oona.reports()), *(consumer.run() for consumer in consumers)]
    received.tasks = [asyncio.create_task(part) for part in parts]
    try:
        yield received
        received.require_alive()
    finally:
        for task in received.tasks:
            task.cancel()
        await asyncio.gather(*received.tasks, return_exceptions=True)
    received.again += sum(consumer.stats.duplicates for consumer in consumers)


# The faults


async def strike(server: RedisServer, dice: random.Random, faults: int) -> "Counter[str]":
    """Kills and freezes one after the other; what each was."""
    counts: Counter[str] = Counter()
    sizes = Sizes(server)
    for _ in range(faults):
        await sizes.watch(dice.uniform(*UP_S))
        if dice.random() < FROZEN_SHARE:
            server.freeze()
            await asyncio.sleep(dice.uniform(*FROZEN_S))
            server.thaw()
            counts["frozen"] += 1
            continue
        server.kill()
        counts["killed"] += 1
        if dice.random() < 0.5:
            cut = sizes.cut(dice.uniform(0.0, TAIL_S))
            counts["killed and its last bytes lost"] += bool(cut)
            counts["bytes lost"] += cut
        await asyncio.sleep(dice.uniform(*AWAY_S))
        await asyncio.to_thread(server.start)
    return counts


class Sizes:
    """How long the append-only file was lately."""

    EVERY_S = 0.02

    def __init__(self, server: RedisServer) -> None:
        self._directory = Path(server._server.data_dir) / "appendonlydir"
        self._seen: deque[tuple[float, Path, int]] = deque(maxlen=int(2 * TAIL_S / self.EVERY_S))

    async def watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._seen.append((time.monotonic(), *self._now()))
            await asyncio.sleep(self.EVERY_S)

    def _now(self) -> tuple[Path, int]:
        path = max(self._directory.glob("*.incr.aof"), key=lambda found: int(found.suffixes[-3].lstrip(".")))
        return path, path.stat().st_size

    def cut(self, seconds: float) -> int:
        """Takes back what came in so many last seconds; the bytes."""
        path, size = self._now()
        since = time.monotonic() - seconds
        seen = [(at, length) for at, one, length in self._seen if one == path]
        keep = max((length for at, length in seen if at <= since), default=seen[0][1] if seen else size)
        self._seen.clear()  # its end is about to be another
        with path.open("r+b") as file:
            file.truncate(keep)
        return size - keep
