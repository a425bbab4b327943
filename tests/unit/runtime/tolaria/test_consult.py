"""What became of asking the sidecars, in the run's record: a silence and a late answer have names of their own."""

from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.events import PRIORITY, Level, RunEvent
from esper_leyline.journal import JournalReader
from esper_leyline.oona import EMERGENCY
from esper_leyline.oona.streams import route
from esper_leyline.reasons import CommandRejection, RunReason
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY
from esper_leyline.v1.report_pb2 import Degradation
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel
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
        self.metrics, self.run_dir = ward.metrics, ward.run_dir
        self.path = root / "record.jsonl"
        self.record = Record(self.path, Author(attempt=1, incarnation=1, trainer_start=1))
        events = Events(ward.run_dir, counters=ward.facts.counters, heart=ward.heart, record=self.record)
        ward.standing._events = events
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


@pytest.mark.row("T43")
@pytest.mark.parametrize("component", ["tamiyo", "kasmina"])
def test_a_timeout_has_its_event_and_its_metrics_and_leads_to_the_mode_with_its_own(desk: Desk, component: str):
    desk.metrics.set(f"tolaria.timeout.{component}_last_ms", 7.0)
    silence = Silence(component=component, timed_out=True, message="late")
    told = desk.told(result(silent=(silence,), degradations=(down(component, "late"),)))
    assert f"tolaria.{component}_timeout" in told
    assert "tolaria.conservative_mode_entered" in told
    value = desk.metrics.value
    assert value(f"tolaria.timeout.{component}_total") == 1
    assert value(f"tolaria.timeout.{component}_last_ms") == 0
    assert value("tolaria.mode.conservative") == 1
    other = {"tamiyo": "kasmina", "kasmina": "tamiyo"}[component]
    assert value(f"tolaria.timeout.{other}_total") is None, "nobody else is blamed"


def test_of_two_silences_the_first_one_made_the_difference(desk: Desk):
    """An answer of an earlier boundary, late, and one of this."""
    silent = (
        Silence(component="tamiyo", timed_out=True, message="late"),
        Silence(component="tamiyo", timed_out=False, message="refused"),
    )
    told = desk.told(result(silent=silent, degradations=(down("tamiyo", "late"),)))
    assert told[0] == RunEvent.TAMIYO_TIMEOUT


@pytest.mark.row("K27")
@pytest.mark.parametrize("reason", list(CommandRejection))
def test_a_refused_command_is_told_with_its_reason_and_one_that_no_tamiyo_sends_as_critical(
    desk: Desk, reason: CommandRejection
):
    told = desk.told(result(rejections=(reason,)))
    expired = reason is CommandRejection.EXPIRED
    assert told == [RunEvent.COMMAND_EXPIRED if expired else RunEvent.COMMAND_REJECTED]
    [line], [event] = read(desk.path), JournalReader(desk.run_dir / paths.JOURNAL).events()
    assert (line["fields"]["message"], event.notice.message) == (f"a command of Tamiyo was refused: {reason}",) * 2
    assert line["level"] == TelemetryLevel.Name(event.level).removeprefix("TELEMETRY_LEVEL_")
    suspect = {"missing_signature", "unknown_key_id", "invalid_signature", "wrong_run", "unknown_packet",
               "stale_command", "nonce_replayed"}  # fmt: skip
    assert line["level"] == (
        "CRITICAL" if reason in suspect else "WARNING" if reason in ("expired", "halted") else "ERROR"
    )
    stream = route(BUS_MESSAGE_TYPE_TELEMETRY, PRIORITY[Level(line["level"])], "run")
    assert stream == (EMERGENCY,)
