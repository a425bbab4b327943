"""A sidecar's part in a halt: it knows at once, stops, and answers each signal of its attempt once."""

import asyncio
import os
from pathlib import Path

import pytest
from esper_leyline import env, paths
from esper_leyline.journal import JournalReader
from esper_leyline.pages import EmergencyPage, EmergencyRecord
from esper_leyline.v1.emergency_pb2 import ACK_STAGE_DONE
from esper_runtime.sidecar.emergency import EmergencyWatch
from esper_runtime.sidecar.environment import Environment

from tests.support.waiting import until

FREEZE = 1


def signal(seq: int, *, attempt: int = 1, clear: bool = False, name: str = "ab" * 16) -> EmergencyRecord:
    return EmergencyRecord(
        term=1, seq=seq, mode=FREEZE, clear=clear, attempt=attempt, signal_id=name, arrived_ns=1, source=1
    )


class Pod:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.page = EmergencyPage.create(directory / paths.EMERGENCY_PAGE)

    def watch(self) -> EmergencyWatch:
        variables = {env.RUN_DIR: str(self.directory), env.RUN_UID: "run", env.ATTEMPT: "1", env.RANK: "2"}
        return EmergencyWatch("kasmina", Environment(variables))

    def publish(self, record: EmergencyRecord) -> None:
        self.page.publish(record)
        os.utime(self.page.page.path)

    def answers(self) -> list[tuple[str, str, int, bool]]:
        events = JournalReader(self.directory / paths.JOURNAL).events()
        acks = [event.ack for event in events if event.HasField("ack")]
        assert all(ack.stage == ACK_STAGE_DONE and ack.run_uid == "run" and ack.rank == 2 for ack in acks)
        return [(ack.participant, ack.signal_id, ack.attempt, ack.clear) for ack in acks]


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


HALTED, LIFTED = ("kasmina", "ab" * 16, 1, False), ("kasmina", "ab" * 16, 1, True)


def test_every_signal_is_answered_in_order_and_once(pod: Pod) -> None:
    watch, seen = pod.watch(), list[bool]()
    watch.look(seen.append)
    for record in (signal(1), signal(2, clear=True), signal(3)):
        pod.publish(record)
    watch.look(seen.append)
    watch.look(seen.append)
    assert (watch.halted, seen) == (True, [True, False, True])
    pod.publish(signal(4, clear=True))
    watch.look(seen.append)
    assert not watch.halted
    assert pod.answers() == [HALTED, LIFTED, HALTED, LIFTED]


def test_a_signal_for_another_attempt_is_none_of_its_business(pod: Pod) -> None:
    watch = pod.watch()
    pod.publish(signal(1, attempt=2))
    watch.look()
    assert (watch.halted, pod.answers()) == (False, [])


def test_a_sidecar_that_comes_back_during_a_halt_is_halted_before_it_serves(pod: Pod) -> None:
    pod.publish(signal(1))
    pod.publish(signal(2, clear=True))
    pod.publish(signal(3))
    watch = pod.watch()
    watch.look()
    assert (watch.halted, pod.answers()) == (True, [HALTED])


@pytest.mark.row("K09")
@pytest.mark.parametrize("late", [False, True])
def test_only_its_own_id_lifts_a_halt(pod: Pod, late: bool) -> None:
    """Whether it was there all the time or comes when all has been said."""
    watch = pod.watch()
    if not late:
        watch.look()
    for record in (signal(1), signal(2, name="cd" * 16), signal(3, clear=True)):
        pod.publish(record)
    watch.look()
    assert watch.halted
    pod.publish(signal(4, clear=True, name="cd" * 16))
    watch.look()
    assert not watch.halted


def test_there_may_be_no_page_yet(tmp_path: Path) -> None:
    variables = {env.RUN_DIR: str(tmp_path), env.RUN_UID: "run", env.ATTEMPT: "1"}
    watch = EmergencyWatch("tamiyo", Environment(variables))
    watch.look()
    assert not watch.halted


async def test_writing_the_page_wakes_the_watch(pod: Pod) -> None:
    watch, seen = pod.watch(), list[bool]()
    task = asyncio.create_task(watch.run(seen.append))
    try:
        await asyncio.sleep(0)
        pod.publish(signal(1))
        await until(lambda: seen == [True])
        pod.publish(signal(2, clear=True))
        await until(lambda: seen == [True, False])
    finally:
        task.cancel()
    assert pod.answers() == [HALTED, LIFTED]
