"""One drill: the harm, the alerts that must tell of it, and what must be whole afterwards."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from esper_leyline.reasons import RunReason
from esper_runtime.checkpoint import LoadedGeneration

from tests.drills import rules
from tests.drills.stage import Run, Stage
from tests.support.trainers import same_bits

LIMIT_S: Final = 60.0
"""From the harm, or from when it reaches the alert's threshold, until the alert fires."""


@dataclass(slots=True)
class Notes:
    """What a fault has to tell beside the times of its alerts."""

    words: list[str] = field(default_factory=list)
    mended_at: float = field(default_factory=time.monotonic)

    def add(self, text: str) -> None:
        self.words.append(text)

    def mend(self) -> None:
        """Said right before the harm is taken back; what has no such moment is over once its alerts have fired."""
        self.mended_at = time.monotonic()


Fault = Callable[[Stage, Notes], AbstractContextManager[None]]
"""Does the harm when it is entered, and mends it when it is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drill:
    name: str
    harm: str
    """What is done, in a few words."""
    alerts: tuple[str, ...]
    fault: Fault
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the run's spec."""
    threshold_s: Mapping[str, float] = field(default_factory=dict)
    """Of alerts on an age: so long it must last by the rule itself, before waiting begins."""
    same_end: bool = True
    """The final state has the bits of a run that nothing befell."""
    why_other_end: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    drill: Drill
    fired_s: Mapping[str, float]
    cleared_s: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Of a run, after one drill or several."""

    steps: int
    left_out: int
    """Of these, because their batches made the loss bad."""
    reports: int


def play(drill: Drill, stage: Stage) -> Result:
    """AssertionError when an alert is there too early, too late, or for ever."""
    for alert in drill.alerts:
        assert not stage.firing(alert), f"{alert} fires before anything was done"
    notes = Notes()
    began = time.monotonic()
    fired: dict[str, float] = {}
    with drill.fault(stage, notes):
        for alert in drill.alerts:
            limit_s = LIMIT_S + drill.threshold_s.get(alert, 0.0)
            left_s = max(0.0, began + limit_s - time.monotonic())
            stage.until(lambda name=alert: stage.firing(name), f"{alert} fires in drill {drill.name}", left_s)
            fired[alert] = time.monotonic() - began
        notes.mend()
    cleared: dict[str, float] = {}
    for alert in drill.alerts:
        stage.until(lambda name=alert: not stage.firing(name), f"{alert} clears in drill {drill.name}")
        cleared[alert] = time.monotonic() - notes.mended_at
    return Result(drill=drill, fired_s=fired, cleared_s=cleared, notes=tuple(notes.words))


def finish(stage: Stage, expected: LoadedGeneration | None) -> End:
    """Lets the run end and holds it to what it promises: nothing is lost. `expected` is its final state."""
    dropped = "sum(esper_weatherlight_telemetry_total{outcome='dropped'})"
    assert stage.value(dropped) == 0, "telemetry was dropped"
    assert stage.value("sum(esper_weatherlight_reports_evicted_total)") == 0, "reports were given up"
    stage.run.finish()
    status = stage.laptop.status()
    assert status["phase"] == "Succeeded", status
    left_out = int(status.get("rollbacks", {}).get("skippedBatches") or 0)
    assert int(status["progress"]["step"]) == stage.run.steps - left_out, status["progress"]
    moves = stage.laptop.moves()
    assert all(before[1] == after[0] for before, after in pairwise(moves)), moves
    lost = [event for event in stage.events() if event["reason"] == RunReason.REPORTS_LOST]
    assert not lost, lost
    if expected is not None:
        same_bits(stage.run.final(), expected)
    return End(steps=stage.run.steps, left_out=left_out, reports=int(status["observedReport"]["seq"]) & 0xFFFFFFFF)


def reference(run: Run) -> LoadedGeneration:
    """The final state of a run that nothing befalls."""
    try:
        run.hurry()
        run.start()
        run.finish()
        return run.final()
    finally:
        run.close()


def clock() -> str:
    """How the drills shorten time, for people."""
    return f"""\
Durations in the rules (waits, windows, offsets) are divided by {rules.FACTOR}, so that two minutes are \
{120 / rules.FACTOR:g} seconds; Prometheus
scrapes and evaluates every {rules.EVERY_S:g} s. Thresholds are as shipped."""
