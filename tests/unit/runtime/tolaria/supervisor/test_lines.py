"""The supervisor's lines in a record that belongs to trainers most of the time."""

from pathlib import Path
from typing import Any

import pytest
from esper_leyline.events import Level, RunEvent
from esper_leyline.v1 import report_pb2 as pb
from esper_runtime.tolaria.record import Author, Line, Sink, older, read
from esper_runtime.tolaria.supervisor.lines import MAX_WAITING, Lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


@pytest.fixture
def lines(path: Path) -> Lines:
    return Lines(path, attempt=2, incarnation=3, step=lambda: 7)


def fail(lines: Lines, **fields: Any) -> None:
    lines.add(RunEvent.TRAINER_FAILED, level=Level.ERROR, **fields)


def trainer(path: Path, start: int, *, count: int = 1, max_file_bytes: int = 10_000) -> None:
    """A trainer's life: so many lines, and no end."""
    sink = Sink(path, Author(attempt=2, incarnation=3, trainer_start=start), max_file_bytes=max_file_bytes)
    told = [
        Line(number=n, ns=n, time_ns=n, event=RunEvent.PROGRESS, level=Level.INFO, step=n, fields={"loss": 0.5})
        for n in range(1, count + 1)
    ]
    sink.write(told, {})


def ids(path: Path) -> list[str]:
    return [line["id"] for line in read(path)]


def test_lines_wait_and_are_then_written_between_those_of_trainers(lines: Lines, path: Path):
    trainer(path, 1)
    fail(lines)
    fail(lines, step=5)
    assert ids(path) == ["2.3.1.1"]
    lines.write()
    lines.write()
    trainer(path, 2)
    fail(lines)
    lines.write()
    assert ids(path) == ["2.3.1.1", "2.3.0.1", "2.3.0.2", "2.3.2.1", "2.3.0.3"]
    assert [line["step"] for line in read(path)] == [1, 7, 5, 1, 7]


def test_the_line_that_a_killed_trainer_tore_spoils_none_of_ours(lines: Lines, path: Path):
    trainer(path, 1, count=2)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    fail(lines)
    lines.write()
    assert ids(path) == ["2.3.1.1", "2.3.0.1"]


def test_a_file_that_a_trainer_has_rotated_meanwhile_is_not_written_to(lines: Lines, path: Path):
    fail(lines)
    lines.write()
    trainer(path, 1, count=12, max_file_bytes=1000)
    fail(lines)
    lines.write()
    assert ids(path)[-1] == "2.3.0.2"
    assert "2.3.0.2" in path.read_text()
    assert "2.3.0.2" not in older(path).read_text()


def test_what_waits_is_bounded_and_the_next_line_tells_what_was_dropped(lines: Lines, path: Path):
    for _ in range(MAX_WAITING + 3):
        fail(lines)
    lines.write()
    found = list(read(path))
    assert len(found) == MAX_WAITING
    assert found[0]["dropped"] == {"HIGH": 3}


def test_a_volume_that_fails_loses_lines_and_the_next_one_says_how_many(tmp_path: Path):
    path = tmp_path / "volume" / "record.jsonl"
    lines = Lines(path, attempt=1, incarnation=1, step=lambda: 0)
    fail(lines)
    lines.write()
    path.parent.mkdir()
    fail(lines)
    lines.write()
    [line] = read(path)
    assert (line["id"], line["lost"]) == ("1.1.0.2", 1)


def test_events_of_the_journal_are_told_in_the_record_s_words(lines: Lines, path: Path):
    move = pb.Transition(from_phase=pb.RUNTIME_PHASE_RUNNING, to_phase=pb.RUNTIME_PHASE_RESTARTING, reason="R", step=9)
    lines.tell(pb.RuntimeEvent(transition=move))
    lines.tell(pb.RuntimeEvent(notice=pb.Notice(reason="R", message="m", warning=True)))
    lines.tell(pb.RuntimeEvent(boot=pb.Boot(attempt=1)))
    lines.write()
    assert [(line["event"], line["step"]) for line in read(path)] == [
        ("tolaria.transition", 9),
        ("tolaria.notice", 7),
    ]
