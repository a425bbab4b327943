"""P9: how long from an emergency to the training loop that sees it, by each leg alone and under what disturbs it.

.venv/bin/python tests/bench/bench_emergency.py [--shots 1000] [--only redis,file] [--disk DIRECTORY]

A real trainer (perceptron H=64, steps of well under a millisecond, with durable saves, snapshots and epochs' ends as
ever), real weatherlight, kasmina and tamiyo as processes of their own, a real Redis with the chart's settings. A shot
is a signal that freezes the run, at a random moment of a step; when all have answered it is lifted by the same leg.

Times are CLOCK_MONOTONIC, which is one for all processes of a machine. Begin: right before the page is written, before
the operator's publisher seals and publishes, before the kubelet's rename. End: the trainer's event that it has seen the
signal. "of which page" is the part of it since weatherlight took the signal in; "all answers" ends with the last of
trainer (frozen), kasmina and tamiyo. A shot without an answer, or with two of one participant, ends the bench.

Legs: page (its writer alone), redis, file (a mounted ConfigMap from the kubelet's rename on), both (Redis and file at
once, as the operator sends). The way of a person's order through the API server: bench_cluster.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline import paths
from esper_leyline.oona import Oona, OonaConfig
from esper_leyline.pages import EmergencyPage, EmergencyRecord
from esper_leyline.v1.emergency_pb2 import EMERGENCY_MODE_FREEZE, EMERGENCY_SOURCE_SPEC, EmergencySignal
from redis.asyncio import Redis

from tests.bench import nerves
from tests.bench.common import machine, section, tail
from tests.bench.nerves import ACKS, KASMINA, SEEN, TAMIYO, TRAINER, Answers, KubeletMount, NervesPod
from tests.support.redis_server import RedisServer
from tests.support.weatherlight import UID, sealed, signal_message

QUIET_MS, LOADED_MS = 20.0, 100.0
PAUSE_S = 0.005
PARTICIPANTS = (TRAINER, KASMINA, TAMIYO)
Send = Callable[[EmergencySignal], Awaitable[int]]
"""Sends and says when it began, in ns of CLOCK_MONOTONIC."""


@dataclass
class Series:
    """Milliseconds, a value per shot."""

    loop: list[float] = field(default_factory=list)
    page: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)


class Shooter:
    """Fires at one pod; numbers only rise."""

    def __init__(self, pod: NervesPod, *, seed: int = 1) -> None:
        self._answers = Answers(pod.files.run_dir)
        self._dice = random.Random(seed)
        self._seq = 0

    async def series(self, send: Send, shots: int) -> Series:
        found = Series()
        for _ in range(shots):
            await asyncio.sleep(self._dice.uniform(0.0, PAUSE_S))
            await self._shot(send, found)
        return found

    async def _shot(self, send: Send, into: Series) -> None:
        stop = self._message()
        began_ns = await send(stop)
        answers = await self._answers.of(stop.signal_id, clear=False, participants=PARTICIPANTS)
        assert all(len(each) == 1 for each in answers.values()), f"answered twice: {answers}"
        into.loop.append((answers[SEEN][0].at_ns - began_ns) / 1e6)
        into.page.append(answers[SEEN][0].elapsed_ms)
        into.answers.append((max(answers[ack][0].at_ns for ack in ACKS) - began_ns) / 1e6)
        await send(self._message(clear=True, signal_id=stop.signal_id))
        await self._answers.of(stop.signal_id, clear=True, participants=PARTICIPANTS)

    def _message(self, **changes: object) -> EmergencySignal:
        self._seq += 1
        return signal_message(self._seq, mode=EMERGENCY_MODE_FREEZE, **changes)

    def close(self) -> None:
        self._answers.close()


class Legs:
    """The senders. What a leg does before its signal is on the way (a new directory with a file) is not timed."""

    def __init__(self, pod: NervesPod, oona: Oona) -> None:
        self._oona = oona
        self._mount = KubeletMount(pod.files.root / "emergency")

    async def redis(self, message: EmergencySignal) -> int:
        began_ns = time.monotonic_ns()
        await self._oona.publish_signal(UID, sealed(message))
        return began_ns

    async def file(self, message: EmergencySignal) -> int:
        self._mount.prepare(base64.b64encode(sealed(message).SerializeToString()))
        began_ns = time.monotonic_ns()
        self._mount.replace()
        return began_ns

    async def both(self, message: EmergencySignal) -> int:
        """At the same time: the file does not wait for the answer of Redis."""
        envelope = sealed(message)
        self._mount.prepare(base64.b64encode(envelope.SerializeToString()))
        began_ns = time.monotonic_ns()
        publishing = asyncio.create_task(self._oona.publish_signal(UID, envelope))
        await asyncio.sleep(0)
        self._mount.replace()
        await publishing
        return began_ns


class PageWriter:
    """Leg 1 alone: in the place of weatherlight, which is the page's one writer."""

    def __init__(self, pod: NervesPod) -> None:
        self._path = pod.files.run_dir / paths.EMERGENCY_PAGE
        self._page = EmergencyPage.create(self._path)

    async def __call__(self, message: EmergencySignal) -> int:
        began_ns = time.monotonic_ns()
        record = EmergencyRecord(
            term=message.term,
            seq=message.seq,
            mode=message.mode,
            clear=message.clear,
            attempt=message.attempt,
            signal_id=message.signal_id,
            arrived_ns=began_ns,
            source=EMERGENCY_SOURCE_SPEC,
        )
        self._page.publish(record)
        os.utime(self._path)
        return began_ns

    def close(self) -> None:
        self._page.close()


def tell(leg: str, condition: str, found: Series) -> None:
    section(f"{leg}, {condition}")
    limit = QUIET_MS if condition == "quiet" else LOADED_MS
    print(tail("to the training loop", found.loop, goal="P9", limit=limit))
    if leg != "page":
        print(tail("of which page", found.page))
    print(tail("all answers", found.answers, goal="K08", limit=LOADED_MS), flush=True)


async def page_leg(shots: int, disk: Path | None) -> None:
    with nerves.places(disk) as (memory, durable), NervesPod(memory, durable) as pod:
        pod.start(KASMINA, TAMIYO, TRAINER)
        writer, shooter = PageWriter(pod), Shooter(pod)
        conditions: dict[str, AbstractContextManager[None]] = {
            "quiet": contextlib.nullcontext(),
            "disk load": nerves.disk_load(durable),
            "one core burnt": nerves.core_burnt(),
        }
        for name, condition in conditions.items():
            with condition:
                tell("page", name, await shooter.series(writer, shots))
        shooter.close()
        writer.close()


Condition = Callable[[RedisServer, Path], AbstractContextManager[None]]
CONDITIONS: dict[str, Condition] = {
    "quiet": lambda server, disk: contextlib.nullcontext(),
    "disk load": lambda server, disk: nerves.disk_load(disk),
    "one core burnt": lambda server, disk: nerves.core_burnt(),
    "Redis down": lambda server, disk: nerves.redis_down(server),
    "appendfsync always and disk load": lambda server, disk: nerves.disk_load(disk),
}
ALWAYS = "appendfsync always and disk load"
WANTED = {
    "redis": ("quiet", "disk load", "one core burnt", ALWAYS),
    "file": ("quiet", "disk load", "one core burnt", "Redis down"),
    "both": ("quiet", "Redis down", ALWAYS),
}


async def sync_every(server: RedisServer, word: str) -> None:
    async with Redis.from_url(server.url) as admin:
        await admin.config_set("appendfsync", word)


async def bus_legs(names: list[str], shots: int, disk: Path | None) -> None:
    with (
        nerves.places(disk) as (memory, durable),
        nerves.redis_server(durable) as server,
        NervesPod(memory, durable, redis_url=server.url) as pod,
    ):
        pod.start()
        shooter = Shooter(pod)
        async with Oona(OonaConfig(url=server.url)) as oona:
            legs = Legs(pod, oona)
            for leg in names:
                for condition in WANTED[leg]:
                    await sync_every(server, "always" if condition == ALWAYS else "everysec")
                    with CONDITIONS[condition](server, durable):
                        tell(leg, condition, await shooter.series(getattr(legs, leg), shots))
        shooter.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=1000, help="per leg and condition")
    parser.add_argument("--only", default="page,redis,file,both", help="legs, separated by commas")
    parser.add_argument("--disk", type=Path, help="directory on the disk that is loaded; default: of temporary files")
    arguments = parser.parse_args()
    legs = arguments.only.split(",")
    with nerves.places(arguments.disk) as (_, durable):
        print(f"{machine()}, disk {nerves.filesystem(durable)}")
    if "page" in legs:
        asyncio.run(page_leg(arguments.shots, arguments.disk))
    others = [leg for leg in legs if leg in WANTED]
    if others:
        asyncio.run(bus_legs(others, arguments.shots, arguments.disk))


if __name__ == "__main__":
    main()
