"""A Standing with real log and journal, on a clock that the test moves."""

from itertools import count
from pathlib import Path

from esper_leyline import paths
from esper_leyline.journal import JournalReader
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel
from esper_runtime.checkpoint import Wal
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Standing
from esper_runtime.tolaria.telemetry import Events, Heart


class Clock:
    """Seconds and nanoseconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def ns(self) -> int:
        return round(self.now * 1e9)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


class Ward:
    """What a Standing needs, and what it told. A second one on the same directory is a later process of the run."""

    def __init__(self, root: Path, clock: Clock | None = None, *, restarted: bool = False) -> None:
        self.clock = clock or Clock()
        self.run_dir = root / "run"
        self.run_dir.mkdir(exist_ok=True)
        self.heart = Heart(self.run_dir)
        self.facts = Facts(Wal(root / "wal.log"), run_seconds=self.clock)
        self.events = Events(self.run_dir, counters=self.facts.counters, heart=self.heart)
        self.metrics = Metrics(None)
        ids = count(1)
        self.standing = Standing(
            facts=self.facts,
            events=self.events,
            metrics=self.metrics,
            run_seconds=self.clock,
            restarted=restarted,
            monotonic=self.clock,
            new_id=lambda: f"id-{next(ids)}",
        )

    def boundaries(self, number: int, *, seconds: float = 0.0, healthy: bool | None = True) -> None:
        """So many boundaries, `seconds` apart."""
        for _ in range(number):
            self.clock.pass_s(seconds)
            self.standing.boundary(healthy=healthy)

    def notices(self, reason: str) -> list[str]:
        """Messages of one reason, oldest first."""
        return [event.notice.message for event in self._events() if event.notice.reason == reason]

    def degradations(self, component: str) -> list[bool]:
        return [event.degradation.degraded for event in self._events() if event.degradation.component == component]

    def named(self) -> list[tuple[str, str]]:
        """Names and levels of all events, oldest first."""
        level = TelemetryLevel.Name
        return [(event.name, level(event.level).removeprefix("TELEMETRY_LEVEL_")) for event in self._events()]

    def _events(self) -> list[pb.RuntimeEvent]:
        return list(JournalReader(self.run_dir / paths.JOURNAL).events())
