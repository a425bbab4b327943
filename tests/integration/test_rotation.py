"""Keys are rotated while messages flow: nothing good is refused, nothing comes twice, and old keys end."""

import asyncio
import os
from collections import Counter
from contextlib import aclosing, asynccontextmanager

import pytest
from esper_leyline import signing
from esper_leyline.oona import Oona, OonaConfig
from esper_leyline.reasons import SignalRejection
from esper_leyline.signing import Role, SigningKey, announced
from esper_leyline.v1.report_pb2 import Notice
from esper_operator.model import RunKey
from esper_operator.reports import Intake

from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.weatherlight import SEED, UID, PodFiles, boot, event, sealed, signal_message

pytestmark = pytest.mark.timeout(180)
ROTATIONS, EACH = 6, 12
REJECTIONS = "esper_weatherlight_signals_rejected_total"


def replaced(path, text):
    """As the kubelet does: all at once."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


class Operator:
    """What an operator does about keys, in this process; a rotation is a new one."""

    def __init__(self):
        self.outcomes = Counter()
        self.taken = []
        self.generation = 0
        self.rotate()

    def rotate(self):
        self.generation += 1
        self.intake = Intake(
            seed=SEED, generation=self.generation, monotonic=lambda: 0.0, on_report=lambda _key, _urgent: None
        )
        self.intake.observe(UID, RunKey("team", "digits"), max(self.taken, default=(0, 0)))

    def take(self, envelope):
        outcome = self.intake.accept(envelope, way="bus")
        self.outcomes[outcome] += 1
        if outcome == "accepted":
            self.taken += [(report.attempt, report.seq) for report in self.intake.of(UID)]
            self.intake.observe(UID, RunKey("team", "digits"), self.taken[-1])

    def signal(self, seq):
        return sealed(signal_message(seq), key=SigningKey.derive(SEED, UID, Role.OPERATOR, self.generation))


@asynccontextmanager
async def reading(oona, operator):
    async def read():
        async with aclosing(oona.reports()) as entries:
            async for entry in entries:
                operator.take(entry.envelope())

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def mount(pod, generation):
    replaced(pod.root / "keys" / signing.OPERATOR_PUBLIC, announced(SEED, UID, Role.OPERATOR, generation))
    key = SigningKey.derive(SEED, UID, Role.REPORT, generation)
    replaced(pod.root / "keys" / signing.REPORT_PRIVATE, key.to_text())


@pytest.mark.row("T07")
async def test_signals_and_reports_go_on_through_six_rotations(tmp_path):
    operator = Operator()
    with RedisServer() as redis:
        pod = PodFiles(tmp_path / "pod", redis_url=redis.url)
        mount(pod, 1)
        pod.start()
        try:
            await until(pod.ready)
            async with Oona(OonaConfig(url=redis.url, timeout_s=0.5, block_s=0.2)) as oona, reading(oona, operator):
                await flow(pod, oona, operator)
                await refused_in_the_end(pod, oona)
        finally:
            pod.close()
    print(f"{dict(operator.outcomes)} reports, {ROTATIONS} rotations, {ROTATIONS * EACH} signals")


async def flow(pod, oona, operator):
    """Orders before, in and after each rotation, by both ways, and reports all the time."""
    pod.journal.append(boot(1))
    seq = 0
    for _ in range(ROTATIONS):
        for n in range(EACH):
            seq += 1
            pod.journal.append(event(notice=Notice(reason="Step", message=str(seq))))
            envelope = operator.signal(seq)
            if n % 2:
                pod.mount_signal(envelope.SerializeToString())
            else:
                await oona.publish_signal(UID, envelope)
            await until(lambda seq=seq: (found := pod.emergency()) is not None and found.seq == seq)
            if n == EACH // 3:
                operator.rotate()  # signs with the next key at once
            if n == 2 * EACH // 3:
                mount(pod, operator.generation)  # the kubelet comes later
        # The next rotation comes minutes later: what was signed before this one has arrived by then.
        await until(lambda seq=seq: operator.outcomes["accepted"] >= seq)
    assert operator.outcomes["forged"] == 0
    assert len(operator.taken) == len(set(operator.taken))
    assert operator.taken == sorted(operator.taken)
    assert await rejections(pod) == 0


async def rejections(pod):
    return sum([await pod.metric(f'{REJECTIONS}{{reason="{reason}"}}') for reason in SignalRejection])


async def refused_in_the_end(pod, oona):
    """Keys of two rotations ago, and of the future, move nothing."""
    before, strangers = pod.emergency(), (1, ROTATIONS - 1, ROTATIONS + 3)
    for generation in strangers:
        key = SigningKey.derive(SEED, UID, Role.OPERATOR, generation)
        await oona.publish_signal(UID, sealed(signal_message(10_000 + generation), key=key))
    good = SigningKey.derive(SEED, UID, Role.OPERATOR, ROTATIONS + 1)
    await oona.publish_signal(UID, sealed(signal_message(before.seq + 1), key=good))
    await until(lambda: pod.emergency().seq == before.seq + 1)
    assert await rejections(pod) == len(strangers)
