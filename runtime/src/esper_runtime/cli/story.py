"""A run's story, made of the lines of its record (esper_runtime.tolaria.record). Pure.

Within an incarnation of the pod time is CLOCK_MONOTONIC; between two of them, which may be on different nodes, the wall
clock is all there is. `at` counts seconds on the axis that both give, from the record's first line. Lines of the
supervisor may be older than those before them, since it writes only when no trainer lives.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from esper_leyline.events import Level, RunEvent
from esper_leyline.exitcodes import ExitCode
from esper_leyline.phases import RecoveryKind
from esper_leyline.reasons import RunReason

from esper_runtime.tolaria.record import SUPERVISOR

Line = Mapping[str, Any]
_TROUBLE = frozenset({Level.WARNING, Level.ERROR, Level.CRITICAL})
_RECOVERIES = frozenset({RunEvent.ROLLBACK_COMPLETED, RunEvent.RECOVERY_COMPLETED})
BOUNDARY = "tolaria.epoch_hook.latency_ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A transition, and how long the phase lasted that it began."""

    at: float
    time: str
    before: str
    after: str
    reason: str
    attempt: int
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Back:
    """A rollback inside the process, or a recovery by a new one."""

    time: str
    kind: str
    cause: str
    tier: str
    from_step: int
    to_step: int
    detect_ms: float
    recover_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A trainer process that failed, as its supervisor saw it."""

    time: str
    step: int
    reason: str
    exit_code: int | None
    """None: it could not even be started."""
    message: str
    evidence: str
    """File with what a hung one looked like, below the run's directory; may be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    number: int
    step: int
    metrics: Mapping[str, float]
    samples_per_second: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Of the loss curve. `kept` is False for what a rollback undid."""

    step: int
    loss: float
    course: int
    """Number of rollbacks and restarts before it."""
    kept: bool = True


@dataclass(kw_only=True, slots=True)
class Story:
    """What the report draws."""

    began: str = ""
    ended: str = ""
    seconds: float = 0.0
    forward_seconds: float = 0.0
    """In which steps were trained that no rollback undid; validation counts as a part of training."""
    attempts: int = 0
    trainers: int = 0
    last_step: int = 0
    end: str = ""
    """The last word; empty while a trainer trains or when its container was killed."""
    stopped: bool = False
    """The last word is that of a trainer that left because it was told to: halted, suspended, drained."""
    resumed: bool = False
    """The present trainer follows such a one."""
    deaths: list[Death] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    backs: list[Back] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    committed: dict[int, float | None] = field(default_factory=dict)
    """Step of each checkpoint -> milliseconds that it held up training."""
    checkpoint_bytes: int = 0
    boundary_ms: list[float] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    """Lines that the record lacks, by why."""

    @property
    def goodput(self) -> float | None:
        """Share of the time that moved training forward; None when no time has passed."""
        return self.forward_seconds / self.seconds if self.seconds > 0 else None


def story_of(lines: Iterable[Line]) -> Story:
    """The story of a record, oldest line first."""
    timed = list(_on_axis(lines))
    story = Story()
    if not timed:
        return story
    story.began, story.ended = str(timed[0][1]["time"]), str(timed[-1][1]["time"])
    story.seconds = timed[-1][0]
    story.attempts = len({line["attempt"] for _, line in timed})
    story.trainers = len({_process(line) for _, line in timed if not _of_supervisor(line)})
    story.last_step = int(timed[-1][1]["step"])
    for at, line in timed:
        _fold(story, at, line)
    story.moves = _with_durations(story.moves, story.seconds)
    story.forward_seconds = _forward([(at, line) for at, line in timed if not _of_supervisor(line)])
    story.points = _curve(timed)
    return story


def _process(line: Line) -> str:
    return str(line["id"]).rsplit(".", 1)[0]


def _container(line: Line) -> str:
    """Attempt and incarnation."""
    return _process(line).rpartition(".")[0]


def _of_supervisor(line: Line) -> bool:
    return _process(line).endswith(f".{SUPERVISOR}")


def _on_axis(lines: Iterable[Line]) -> Iterable[tuple[float, Line]]:
    """Lines with their place on the axis. Those that only count others have none, and give their counts to them."""
    container, offset, first_ns, at, wall = "", 0.0, 0, 0.0, 0.0
    for line in lines:
        now = datetime.fromisoformat(line["time"]).timestamp()
        if _container(line) != container:
            offset = at + max(0.0, now - wall) if container else 0.0
            container, first_ns = _container(line), line["ns"]
        place = offset + (line["ns"] - first_ns) / 1e9
        if "repeats" not in line and place >= at:
            at, wall = place, now
        yield at, line


def _fold(story: Story, at: float, line: Line) -> None:
    fields, event = line["fields"], line["event"]
    if line["level"] in _TROUBLE:
        story.troubles[event] += int(line.get("count", 1))
    story.missing["the volume did not take them"] += int(line.get("lost", 0))
    story.missing["there was no room in the queue"] += sum(line.get("dropped", {}).values())
    if "repeats" in line:
        return
    if "from" in fields and "to" in fields:
        story.moves.append(_move(at, line))
    if event in _RECOVERIES:
        story.backs.append(_back(line, resumed=story.resumed))
    elif event == RunEvent.EPOCH:
        _add_epoch(story, line)
    elif event == RunEvent.METRICS:
        if BOUNDARY in fields.get("values", {}):
            story.boundary_ms.append(float(fields["values"][BOUNDARY]))
    elif event == RunEvent.CHECKPOINT_COMMITTED and "latestStep" in fields:
        story.committed.setdefault(fields["latestStep"], fields.get("stallMs"))
        story.checkpoint_bytes = fields.get("bytes", 0)
    elif event == RunEvent.TRAINER_FAILED:
        story.deaths.append(_death(line))
    elif event == RunEvent.STARTED:
        story.end = ""
        story.resumed, story.stopped = story.stopped, False
    elif event == RunEvent.ENDED:
        story.end = f"{fields.get('reason', '')} ({fields.get('exitCode', '')}) {fields.get('message', '')}".strip()
        story.stopped = fields.get("exitCode") in (ExitCode.HALTED, ExitCode.DRAINED)


def _move(at: float, line: Line) -> Move:
    fields = line["fields"]
    return Move(
        at=at,
        time=line["time"],
        before=fields["from"],
        after=fields["to"],
        reason=fields.get("reason", ""),
        attempt=line["attempt"],
        step=line["step"],
        seconds=0.0,
    )


def _with_durations(moves: list[Move], end: float) -> list[Move]:
    ends = [*(move.at for move in moves[1:]), end]
    return [replace(move, seconds=until - move.at) for move, until in zip(moves, ends, strict=False)]


def _back(line: Line, *, resumed: bool) -> Back:
    """A trainer that begins an attempt cannot know whether anything was lost; the record of the one before tells."""
    fields = line["fields"]
    kind, cause = fields.get("kind", ""), fields.get("cause", "")
    lost_nothing = resumed and kind == RecoveryKind.NEW_ATTEMPT and cause == RunReason.POD_LOST
    return Back(
        time=line["time"],
        kind=kind,
        cause=RunReason.RESUMED if lost_nothing else cause,
        tier=fields.get("tier", ""),
        from_step=fields.get("fromStep", 0),
        to_step=fields.get("toStep", 0),
        detect_ms=fields.get("detectMs", 0.0),
        recover_ms=fields.get("recoverMs", 0.0),
    )


def _death(line: Line) -> Death:
    fields = line["fields"]
    return Death(
        time=line["time"],
        step=line["step"],
        reason=fields.get("reason", ""),
        exit_code=fields.get("exitCode"),
        message=fields.get("message", ""),
        evidence=fields.get("evidence", ""),
    )


def _add_epoch(story: Story, line: Line) -> None:
    """An epoch that was trained again takes the place of what was undone."""
    fields = line["fields"]
    number = fields.get("epoch", 0)
    story.epochs = [epoch for epoch in story.epochs if epoch.number < number]
    story.epochs.append(
        Epoch(
            number=number,
            step=line["step"],
            metrics=fields.get("metrics", {}),
            samples_per_second=fields.get("samplesPerSecond"),
        )
    )


# Forward and back


def _fell_back_to(line: Line) -> int | None:
    """The step that training stands at after going back; None for other lines."""
    if line["event"] == RunEvent.ROLLBACK_COMPLETED:
        return int(line["fields"].get("toStep", line["step"]))
    return int(line["step"]) if line["event"] == RunEvent.STARTED else None


def _forward(timed: list[tuple[float, Line]]) -> float:
    """Seconds between lines of a process from one to the next of which the step rose, without what was undone.

    Of a stretch that was undone in part, its steps are taken to have been equally long.
    """
    stretches: list[tuple[float, int, int]] = []
    for (before_at, before), (at, line) in pairwise(timed):
        back = _fell_back_to(line)
        if back is not None:
            stretches = [
                (seconds * (min(end, back) - begin) / (end - begin), begin, min(end, back))
                for seconds, begin, end in stretches
                if begin < back
            ]
        elif _process(before) == _process(line) and line["step"] > before["step"]:
            stretches.append((at - before_at, before["step"], line["step"]))
    return sum(seconds for seconds, _, _ in stretches)


def _curve(timed: list[tuple[float, Line]]) -> list[Point]:
    points: list[Point] = []
    course = 0
    for _, line in timed:
        back = _fell_back_to(line)
        loss = line["fields"].get("loss")
        if back is not None:
            course += 1
            points = [
                point
                if point.step <= back
                else Point(step=point.step, loss=point.loss, course=point.course, kept=False)
                for point in points
            ]
        elif line["event"] in (RunEvent.PROGRESS, RunEvent.EPOCH) and isinstance(loss, (int, float)):
            points.append(Point(step=line["step"], loss=float(loss), course=course))
    return points
