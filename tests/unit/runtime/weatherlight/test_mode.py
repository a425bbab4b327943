"""Degraded while anything is known to be wrong, operational otherwise: in metric, report and on the bus."""

from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.events import RunEvent
from esper_leyline.journal import JournalReader
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import Counters, Degradation, Notice, RunReport, RuntimeEvent, RuntimePhase
from esper_runtime.sidecar.narrator import Narrator
from esper_runtime.weatherlight.metrics import Metrics
from esper_runtime.weatherlight.mode import CALM_S, SystemMode
from esper_runtime.weatherlight.recorder import Recorder
from esper_runtime.weatherlight.reportlog import ReportLog
from prometheus_client import CollectorRegistry

from tests.support.weatherlight import IDENTITY, RUNNING, FakeClock, boot, event, opened, report_key, transition

pytestmark = pytest.mark.row("K42", "T43")


class Scene:
    """A mode over a real recorder and journal, on a clock that the test moves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        self.recorder = Recorder(IDENTITY, ReportLog(directory), report_key, self.clock, metrics)
        self.mode = SystemMode(self.recorder, Narrator(directory, "weatherlight"), metrics, self.clock)
        for one in (boot(), transition(RUNNING, RuntimePhase.RUNTIME_PHASE_STARTING, 1)):
            self.recorder.event(one, 0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"esper_weatherlight_{name}", labels)

    @property
    def degraded(self) -> bool:
        found = self.value("system_mode", mode="degraded")
        assert found is not None
        assert self.value("system_mode", mode="operational") == 1 - found
        return bool(found)

    def report(self) -> RunReport:
        return opened(self.recorder.reports.after(0)[-1].envelope)

    def told(self, *names: RunEvent) -> list[str]:
        events = JournalReader(self.directory / paths.JOURNAL).events()
        return [event.notice.message for event in events if event.name in names]

    def look(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.mode.look()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def degradation(component: str, reason: str, *, degraded: bool = True) -> RuntimeEvent:
    change = Degradation(component=component, degraded=degraded, reason=reason, message="m")
    return event(degradation=change)


def test_a_worker_that_fails_degrades_at_once_and_is_forgiven_after_five_quiet_minutes(scene: Scene):
    assert not scene.degraded
    scene.mode.started("journal", again=False)
    scene.mode.failed("journal", "ValueError: x", 1.2)
    assert scene.degraded
    (told,) = scene.report().degradations
    assert (told.component, told.reason) == ("weatherlight", RunReason.WORKER_FAILED)
    assert told.message == "worker journal: ValueError: x"
    assert scene.value("worker_running", worker="journal") == 0
    assert scene.value("worker_backoff_seconds", worker="journal") == pytest.approx(1.2)
    assert (scene.value("tasks_running"), scene.value("tasks_backing_off")) == (0, 1)
    assert scene.value("last_error_ts") == pytest.approx(scene.clock().time.timestamp())
    scene.mode.started("journal", again=True)
    scene.look(CALM_S - 1)
    assert scene.degraded, "it works again, and nobody knows yet for how long"
    assert scene.value("worker_running", worker="journal") == 1
    assert scene.value("worker_restarts_total", worker="journal") == 1
    assert (scene.value("tasks_running"), scene.value("tasks_backing_off")) == (1, 0)
    scene.look(1)
    assert not scene.degraded
    assert list(scene.report().degradations) == []
    assert scene.told(RunEvent.SYSTEM_MODE_CHANGED) == ["degraded: weatherlight", "operational"]
    assert scene.told(RunEvent.WORKER_ERROR) == ["worker journal: ValueError: x"]
    assert scene.told(RunEvent.WORKER_RESTARTED) == ["worker journal was started again"]


def test_each_failure_begins_the_five_minutes_anew(scene: Scene):
    for _ in range(3):
        scene.mode.failed("bus", "x", 1.0)
        scene.mode.started("bus", again=True)
        scene.look(CALM_S - 1)
        assert scene.degraded
    scene.look(1)
    assert not scene.degraded


def test_one_that_waits_to_be_started_is_not_forgiven(scene: Scene):
    scene.mode.failed("bus", "x", 30.0)
    scene.look(2 * CALM_S)
    assert scene.degraded


def test_one_that_has_stopped_stays_a_trouble(scene: Scene):
    scene.mode.started("bus", again=False)
    scene.mode.stopped("bus")
    scene.look(100 * CALM_S)
    assert scene.degraded
    assert scene.report().degradations[0].message == "stopped: bus"
    assert (scene.value("tasks_running"), scene.value("tasks_backing_off")) == (0, 0)


@pytest.mark.parametrize(
    ("component", "reason"),
    [("tolaria", RunReason.CONSERVATIVE_MODE), ("tamiyo", RunReason.SIDECAR_DOWN), ("checkpoint", "CheckpointFailed")],
)
def test_what_the_trainer_says_counts_while_it_says_so(scene: Scene, component: str, reason: str):
    """A breaker that opens makes the run conservative, which the trainer tells as a degradation."""
    scene.recorder.event(degradation(component, reason), 1)
    scene.look()
    assert scene.degraded
    scene.recorder.event(degradation(component, reason, degraded=False), 2)
    scene.look()
    assert not scene.degraded
    assert scene.told(RunEvent.SYSTEM_MODE_CHANGED) == [f"degraded: {component}", "operational"]


def test_redis_out_of_reach_counts_and_its_return_does(scene: Scene):
    scene.recorder.degraded("oona", RunReason.BUS_UNAVAILABLE, "gone")
    scene.look()
    assert scene.degraded
    scene.recorder.restored("oona")
    scene.look()
    assert not scene.degraded


def test_a_crash_loop_is_told_before_the_process_ends(scene: Scene):
    scene.mode.crash_loop("journal", "5 failures")
    message = "worker journal of weatherlight: 5 failures; the container ends"
    assert scene.told(RunEvent.WORKER_CRASH_LOOP) == [message]
    assert (scene.report().notice.message, scene.report().notice.warning) == (message, True)


def test_the_next_process_begins_with_what_is_known_and_forgets_its_forerunner_s_workers(scene: Scene):
    scene.recorder.event(degradation("tolaria", RunReason.CONSERVATIVE_MODE), 1)
    scene.mode.failed("journal", "x", 1.0)
    scene.recorder.reports.close()
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    recorder = Recorder(IDENTITY, ReportLog(scene.directory), report_key, scene.clock, metrics)
    SystemMode(recorder, Narrator(scene.directory, "weatherlight"), metrics, scene.clock).look()
    assert recorder.reporter.degradations == {"tolaria"}
    assert registry.get_sample_value("esper_weatherlight_system_mode", {"mode": "degraded"}) == 1


def test_a_restarted_process_shows_the_run_s_totals_at_once(scene: Scene):
    scene.recorder.event(event(notice=Notice(message="m"), counters=Counters(rollbacks=3)), 1)
    scene.recorder.reports.close()
    registry = CollectorRegistry()
    Recorder(IDENTITY, ReportLog(scene.directory), report_key, scene.clock, Metrics(registry))
    assert registry.get_sample_value("esper_run_rollbacks_total") == 3
