"""Events are said once, in bounds, and never hold anything up."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from esper_leyline.reasons import RunReason
from esper_operator.kube.api import EVENTS
from esper_operator.kube.errors import Forbidden, KubeError, Throttled, Transient
from esper_operator.kube.events import MAX_NOTE, MAX_QUEUED, RETRIES, RUN_BURST, RUN_PERIOD_S, EventPoster, Subject
from esper_operator.model import EventRecord
from esper_operator.testing.fakeapi import FakeApi, Request

from tests.support.virtualtime import run_virtual

SUBJECT = Subject("esper.dev/v1alpha1", "EsperTrainingRun", "ns", "digits", "uid-1")


def record(message: str) -> EventRecord:
    return EventRecord(reason=RunReason.ROLLED_BACK, message=message, warning=True, action="Rollback")


class Desk:
    def __init__(self) -> None:
        self.api = FakeApi()
        self.outcomes: Counter[str] = Counter()
        self.poster = EventPoster(
            self.api,
            instance="operator-0",
            now=lambda: datetime(2026, 1, 1, tzinfo=UTC),
            monotonic=lambda: asyncio.get_running_loop().time(),
            on_outcome=lambda outcome: self.outcomes.update([outcome]),
        )

    async def send(self, *messages: str, moment: str = "1", subject: Subject = SUBJECT) -> None:
        for message in messages:
            self.poster.post(subject, record(message), moment=moment)
        sender = asyncio.create_task(self.poster.run())
        await self.poster.flush(60)
        sender.cancel()

    @property
    def notes(self) -> list[str]:
        return sorted(str(event["note"]) for event in self.api.all(EVENTS))


def test_the_same_thing_is_said_once_and_again_at_another_moment() -> None:
    async def scenario() -> None:
        desk = Desk()
        await desk.send("one", "one", "two")
        await desk.send("one", moment="2")
        assert desk.notes == ["one", "one", "two"]
        another = Desk()
        another.api = desk.api
        another.poster._api = desk.api
        await another.send("one")  # by an operator that has just started
        assert (desk.notes, another.outcomes) == (["one", "one", "two"], Counter(repeated=1))

    run_virtual(scenario())


def test_a_long_note_is_cut_at_a_whole_character() -> None:
    async def scenario() -> None:
        desk = Desk()
        await desk.send("ä" * MAX_NOTE)
        (note,) = desk.notes
        assert len(note.encode()) <= MAX_NOTE
        assert set(note) == {"ä"}

    run_virtual(scenario())


def test_one_loud_run_is_limited_and_does_not_silence_another() -> None:
    async def scenario() -> None:
        desk = Desk()
        loud = RUN_BURST + 7
        await desk.send(*(f"n{number}" for number in range(loud)))
        assert desk.outcomes == Counter(posted=RUN_BURST, limited=7)
        await desk.send("quiet", subject=Subject("esper.dev/v1alpha1", "EsperTrainingRun", "ns", "quiet", "uid-2"))
        assert "quiet" in desk.notes
        await asyncio.sleep(RUN_PERIOD_S * 1.1)
        await desk.send("later")
        assert "later" in desk.notes

    run_virtual(scenario())


def test_the_queue_is_bounded_and_posting_never_waits() -> None:
    async def scenario() -> None:
        desk = Desk()
        for number in range(MAX_QUEUED + 50):
            desk.poster.post(Subject("v1", "Pod", "ns", "p", f"uid-{number}"), record("hello"), moment="1")
        assert desk.outcomes["limited"] + desk.outcomes["dropped"] >= 50

    run_virtual(scenario())


@pytest.mark.parametrize(
    ("error", "times", "outcome"),
    [
        (lambda: Transient("away"), 1, "posted"),
        (lambda: Throttled("slow down", retry_after_s=7.0), RETRIES - 1, "posted"),
        (lambda: Transient("away"), RETRIES, "failed"),
        (lambda: Forbidden("no"), 1, "failed"),
    ],
)
def test_what_cannot_be_sent_is_tried_again_or_counted(
    error: Callable[[], KubeError], times: int, outcome: str
) -> None:
    async def scenario() -> None:
        desk = Desk()
        left = times

        def before(_: Request) -> None:
            nonlocal left
            if left:
                left -= 1
                raise error()

        desk.api.before = before
        await desk.send("one")
        assert desk.outcomes == Counter({outcome: 1})

    run_virtual(scenario())
