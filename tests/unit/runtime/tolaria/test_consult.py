"""What became of asking the sidecars, in the run's record: a silence and a late answer have names of their own."""

from pathlib import Path

import pytest
from esper_leyline.events import RunEvent
from esper_leyline.reasons import CommandRejection, RunReason
from esper_leyline.v1.report_pb2 import Degradation
from esper_runtime.tolaria.consult import Consult
from esper_runtime.tolaria.handshake import BoundaryResult, Silence, Timings
from esper_runtime.tolaria.record import Author, Record, read
from esper_runtime.tolaria.telemetry import Events

from tests.support.standing import Ward
from tests.support.waiting import PATIENT_S


class Desk:
    """A consultation whose events go to a real record."""

    def __init__(self, root: Path) -> None:
        ward = Ward(root)
        self.path = root / "record.jsonl"
        self.record = Record(self.path, Author(attempt=1, incarnation=1, trainer_start=1))
        events = Events(ward.run_dir, counters=ward.facts.counters, heart=ward.heart, record=self.record)
        self.consult = Consult(
            handshake=None, standing=ward.standing, metrics=ward.metrics, facts=ward.facts, events=events
        )

    def told(self, result: BoundaryResult) -> list[str]:
        self.consult.account(result)
        self.consult.report(result)
        assert self.record.close(PATIENT_S)
        return [line["event"] for line in read(self.path)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def result(
    *,
    silent: tuple[Silence, ...] = (),
    degradations: tuple[Degradation, ...] = (),
    rejections: tuple[CommandRejection, ...] = (),
) -> BoundaryResult:
    return BoundaryResult(
        command=None,
        late=False,
        answered=True,
        rejections=rejections,
        degradations=degradations,
        heard=frozenset(),
        silent=silent,
        timings=Timings(total_ms=1.0),
    )


def down(component: str, message: str) -> Degradation:
    return Degradation(component=component, degraded=True, reason=RunReason.SIDECAR_DOWN, message=message)


@pytest.mark.parametrize(
    ("component", "late", "event"),
    [
        ("tamiyo", True, RunEvent.TAMIYO_TIMEOUT),
        ("tamiyo", False, RunEvent.TAMIYO_ERROR),
        ("kasmina", True, RunEvent.KASMINA_TIMEOUT),
        ("kasmina", False, RunEvent.KASMINA_ERROR),
    ],
)
@pytest.mark.parametrize("message", ["it sleeps", "UNAVAILABLE: a timeout, a deadline"])
def test_a_silence_is_a_timeout_when_it_was_waited_for(
    desk: Desk, component: str, late: bool, event: RunEvent, message: str
):
    silence = Silence(component=component, timed_out=late, message=message)
    told = desk.told(result(silent=(silence,), degradations=(down(component, message),)))
    assert told[0] == event


def test_of_two_silences_the_first_one_made_the_difference(desk: Desk):
    """An answer of an earlier boundary, late, and one of this."""
    silent = (
        Silence(component="tamiyo", timed_out=True, message="late"),
        Silence(component="tamiyo", timed_out=False, message="refused"),
    )
    told = desk.told(result(silent=silent, degradations=(down("tamiyo", "late"),)))
    assert told[0] == RunEvent.TAMIYO_TIMEOUT


@pytest.mark.parametrize("reason", list(CommandRejection))
def test_a_command_that_came_too_late_has_expired_and_others_are_refused(desk: Desk, reason: CommandRejection):
    stale = reason is CommandRejection.STALE_COMMAND
    told = desk.told(result(rejections=(reason,)))
    assert told == [RunEvent.COMMAND_EXPIRED if stale else RunEvent.COMMAND_REJECTED]
