"""Harm to Redis and to those who read from it."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from esper_leyline.oona import Oona, OonaConfig, dead_letters
from esper_leyline.oona.consumer import Consumer, ConsumerOptions, Delivery
from esper_leyline.oona.streams import FIELD, TELEMETRY
from esper_leyline.signing import Role, SigningKey, seal
from esper_leyline.v1.bus_pb2 import DeadLetterReason
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY, MESSAGE_PRIORITY_NORMAL

from tests.drills.drill import Drill, Notes
from tests.drills.stage import Stage
from tests.support.waiting import until_sync

OUTAGE_S: Final = 30.0
FLOOD: Final = 5000
GROUP: Final = "drill"


@contextmanager
def outage(stage: Stage, notes: Notes) -> Iterator[None]:
    """Redis is killed with all it knew, and nobody starts it again for half a minute."""
    laptop, before = stage.laptop, stage.laptop.step()
    guard, valkey = laptop.guard(), laptop.valkey()
    began = time.monotonic()
    os.kill(guard, signal.SIGSTOP)
    try:
        os.kill(valkey, signal.SIGKILL)
        yield
        stage.until(lambda: time.monotonic() >= began + OUTAGE_S, "the end of the outage")
        told = laptop.step() - before
        assert told > 0, "the status stood still without Redis"
        notes.add(f"{time.monotonic() - began:.0f} s without Redis; the status was told of {told} steps meanwhile")
    finally:
        notes.mend()
        os.kill(guard, signal.SIGCONT)


@contextmanager
def out_of_memory(stage: Stage, notes: Notes) -> Iterator[None]:
    """Redis has no memory left and evicts nothing: it refuses every message and answers all else."""
    before = stage.laptop.step()
    with stage.redis() as client:
        old = client.config_get("maxmemory")["maxmemory"]
        client.config_set("maxmemory", "1")
        try:
            yield
            stage.train(20)
        finally:
            notes.mend()
            client.config_set("maxmemory", old)
    notes.add(f"the status was told of {stage.laptop.step() - before} steps meanwhile")


class Reader:
    """A consumer of telemetry in a thread of its own."""

    def __init__(self, stage: Stage, handler: Callable[[Delivery], Awaitable[None]], **options: float) -> None:
        self._url = stage.redis_url
        self._handler = handler
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="reader")

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._reading.cancel)
        self._thread.join()

    def _run(self) -> None:
        self._reading = self._loop.create_task(self._read())
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._reading)
        self._loop.close()

    async def _read(self) -> None:
        async with Oona(OonaConfig(url=self._url)) as oona:
            options = ConsumerOptions(**self._options)  # type: ignore[arg-type]
            self.consumer = Consumer(oona, TELEMETRY, group=GROUP, name="drill", handler=self._handler, options=options)
            await self.consumer.run()


def _flood(stage: Stage, count: int) -> set[bytes]:
    """Messages of another run; their nonces."""
    key = SigningKey.derive(b"another installation's seed 0123", "another-run", Role.REPORT)
    nonces = set()
    with stage.redis() as client, client.pipeline(transaction=False) as calls:
        for _ in range(count):
            envelope = seal(
                b"drill",
                BUS_MESSAGE_TYPE_TELEMETRY,
                run_uid="another-run",
                key=key,
                priority=MESSAGE_PRIORITY_NORMAL,
            )
            nonces.add(envelope.nonce)
            calls.xadd(TELEMETRY.name, {FIELD: envelope.SerializeToString()}, maxlen=TELEMETRY.max_length)
        calls.execute()
    return nonces


@contextmanager
def slow_consumer(stage: Stage, notes: Notes) -> Iterator[None]:
    """A consumer takes messages and does not finish them, while thousands more come."""
    gate = threading.Event()
    handled: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        while not gate.is_set():  # noqa: ASYNC110 - another thread's event
            await asyncio.sleep(0.05)
        handled.append(delivery.envelope.nonce)

    with Reader(stage, handle, handler_timeout_s=600.0, claim_idle_s=3600.0, concurrency=16):
        expected = _flood(stage, FLOOD)
        try:
            yield
        finally:
            gate.set()
        until_sync(lambda: expected <= set(handled), 60, "the consumer has caught up")
        assert len(handled) == len(set(handled)), "something was handled twice"
        notes.add(f"{FLOOD} messages waited, all were handled once")
        with stage.redis() as client:
            client.xgroup_destroy(TELEMETRY.name, GROUP)


@contextmanager
def poison(stage: Stage, notes: Notes) -> Iterator[None]:
    """Bytes that are no message come between good ones."""
    handled: set[bytes] = set()

    async def handle(delivery: Delivery) -> None:
        handled.add(delivery.envelope.nonce)

    with Reader(stage, handle):
        good = _flood(stage, 50)
        with stage.redis() as client:
            client.xadd(TELEMETRY.name, {FIELD: b"\xff\xfe no envelope"})
        good |= _flood(stage, 50)
        yield
        until_sync(lambda: good <= handled, what="the good ones are handled")
    (kept,) = asyncio.run(_letters(stage.redis_url))
    assert kept == DeadLetterReason.DEAD_LETTER_REASON_UNDECODABLE
    notes.add(f"{len(good)} good messages around it were handled")
    with stage.redis() as client:
        client.xgroup_destroy(TELEMETRY.name, GROUP)


async def _letters(url: str) -> list[int]:
    async with Oona(OonaConfig(url=url)) as oona:
        return [kept.letter.reason for kept in await dead_letters(oona)]


DRILLS: Final = (
    Drill(
        name="redis-outage",
        harm="Redis is killed and comes back empty after 30 s",
        alerts=("OonaConservativeMode", "WeatherlightDegraded", "OonaPublishUnavailable"),
        fault=outage,
    ),
    Drill(
        name="redis-memory",
        harm="Redis is out of memory and evicts nothing",
        alerts=("OonaPublishUnavailable",),
        fault=out_of_memory,
    ),
    Drill(
        name="slow-consumer",
        harm=f"a consumer hangs, {FLOOD} messages come",
        alerts=("OonaQueueDepthHigh", "OonaOldestPending"),
        fault=slow_consumer,
        threshold_s={"OonaOldestPending": 60.0},
    ),
    Drill(
        name="poison",
        harm="bytes that are no message between good ones",
        alerts=("OonaDeadLetterGrowth",),
        fault=poison,
    ),
)
