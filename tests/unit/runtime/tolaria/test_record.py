"""The run's record: bounded in every direction, and never in the way of training."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.events import Level, RunEvent
from esper_runtime.tolaria.record import MAX_LINE_BYTES, Author, Line, Queue, Record, Sink, older, read

AUTHOR = Author(attempt=2, incarnation=3, trainer_start=1)
PATIENCE_S = 30.0


def line(number: int, event: RunEvent = RunEvent.NOTICE, level: Level = Level.INFO, **fields: Any) -> Line:
    return Line(
        number=number,
        ns=number * 10,
        time_ns=1_800_000_000_123_000_000,
        event=event,
        level=level,
        step=7,
        fields=fields,
    )


def numbers(path: Path) -> list[int]:
    return [int(found["id"].rsplit(".", 1)[1]) for found in read(path)]


# A line


def test_a_line_says_who_when_where_and_what(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    sink = Sink(path, AUTHOR)
    sink.write([line(42, RunEvent.ROLLBACK_STARTED, Level.WARNING, reason="NonFiniteLoss")], {})
    sink.close()
    assert json.loads(path.read_text()) == {
        "id": "2.3.1.42",
        "time": "2027-01-15T08:00:00.123+00:00",
        "ns": 420,
        "attempt": 2,
        "incarnation": 3,
        "step": 7,
        "level": "WARNING",
        "event": "tolaria.rollback.started",
        "fields": {"reason": "NonFiniteLoss"},
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("x" * 5000, "x" * 1024),
        (Path("/a"), "/a"),
        ([1, [2.5, None, True]], [1, [2.5, None, True]]),
        ({"a": {"b": float("inf")}}, {"a": {"b": "inf"}}),
        (list(range(1000)), list(range(128))),
        ("\ud800", "?"),
    ],
)
def test_any_value_can_be_written_and_none_without_bound(tmp_path: Path, value: Any, written: Any):
    sink = Sink(tmp_path / "r.jsonl", AUTHOR)
    sink.write([line(1, value=value)], {})
    assert next(read(tmp_path / "r.jsonl"))["fields"] == {"value": written}


def test_a_line_of_many_long_texts_is_cut_to_its_bound(tmp_path: Path):
    sink = Sink(tmp_path / "r.jsonl", AUTHOR)
    sink.write([line(1, texts=["x" * 1000] * 100)], {})
    (found,) = read(tmp_path / "r.jsonl")
    assert found["fields"]["truncated"] > MAX_LINE_BYTES
    assert (tmp_path / "r.jsonl").stat().st_size < 500


# The file


def test_two_files_hold_the_newest_lines_and_no_more(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    sink = Sink(path, AUTHOR, max_file_bytes=5_000)
    sink.write([line(number, RunEvent.PROGRESS, loss=0.5) for number in range(1, 500)], {})
    assert path.stat().st_size <= 5_000
    assert older(path).stat().st_size <= 5_000
    kept = numbers(path)
    assert kept == list(range(kept[0], 500))
    assert len(kept) > 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.1.jsonl", "record.jsonl"]


def test_the_bound_holds_over_restarts_of_the_trainer(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    for number in range(100):
        sink = Sink(path, AUTHOR, max_file_bytes=1_000)
        sink.write([line(number)], {})
        sink.close()
    assert path.stat().st_size + older(path).stat().st_size <= 2_000
    assert numbers(path)[-1] == 99


def test_a_torn_last_line_is_passed_over_and_spoils_no_line_after_it(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    first = Sink(path, AUTHOR)
    first.write([line(1), line(2, text="torn")], {})
    os.truncate(path, path.stat().st_size - 9)
    assert numbers(path) == [1]
    second = Sink(path, AUTHOR)
    second.write([line(3)], {})
    assert numbers(path) == [1, 3]


@pytest.mark.parametrize("foreign", [b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"id": 3}\n', b"{" * 40_000 + b"\n"])
def test_foreign_lines_are_left_out(tmp_path: Path, foreign: bytes):
    path = tmp_path / "record.jsonl"
    Sink(path, AUTHOR).write([line(1)], {})
    with path.open("ab") as file:
        file.write(foreign)
    Sink(path, AUTHOR).write([line(2)], {})
    assert numbers(path) == [1, 2]


def test_a_volume_that_fails_loses_lines_and_the_next_one_says_how_many(tmp_path: Path):
    place = tmp_path / "volume"
    path = place / "record.jsonl"
    sink = Sink(path, AUTHOR)
    sink.write([line(1, RunEvent.PROGRESS), line(2, RunEvent.PROGRESS)], {"LOW": 4})
    assert "No such file" in sink.trouble
    place.mkdir()
    sink.write([line(3, RunEvent.PROGRESS), line(4, RunEvent.PROGRESS)], {"LOW": 1, "NORMAL": 2})
    assert sink.trouble == ""
    third, fourth = read(path)
    assert third["lost"] == 2
    assert third["dropped"] == {"LOW": 5, "NORMAL": 2}
    assert "lost" not in fourth
    assert "dropped" not in fourth


def test_a_lost_line_is_not_there_to_be_repeated(tmp_path: Path):
    path = tmp_path / "volume" / "record.jsonl"
    sink = Sink(path, AUTHOR)
    sink.write([line(1, text="same")], {})
    path.parent.mkdir()
    sink.write([line(2, text="same"), line(3, text="same")], {})
    assert numbers(path) == [2]


def test_a_volume_that_vanishes_under_an_open_file_is_opened_anew(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    sink = Sink(path, AUTHOR, max_file_bytes=400)
    sink.write([line(1)], {})
    shutil.rmtree(tmp_path)
    sink.write([line(2, RunEvent.PROGRESS), line(3, RunEvent.PROGRESS)], {})  # the rotation finds no directory
    assert sink.trouble
    tmp_path.mkdir()
    sink.write([line(4)], {})
    assert numbers(path) == [4]


# Repetitions


def test_equal_events_of_an_epoch_are_counted_in_one_line_at_its_end(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    sink = Sink(path, AUTHOR)
    sink.write([line(n, RunEvent.TAMIYO_ERROR, Level.WARNING, message="gone") for n in range(1, 13)], {})
    sink.write([line(13, RunEvent.TAMIYO_ERROR, Level.WARNING, message="other")], {})
    assert numbers(path) == [1, 13]
    sink.write([line(14, RunEvent.EPOCH)], {})
    counted = list(read(path))[2]
    assert (counted["id"], counted["repeats"], counted["count"]) == ("2.3.1.12", "2.3.1.1", 11)
    assert counted["fields"] == {"message": "gone"}
    sink.write([line(15, RunEvent.TAMIYO_ERROR, Level.WARNING, message="gone")], {})
    assert numbers(path) == [1, 13, 12, 14, 15], "a new epoch begins anew"


def test_what_training_does_is_never_merely_counted(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    rollbacks = [line(number, RunEvent.ROLLBACK_COMPLETED, Level.WARNING, toStep=5) for number in (1, 2)]
    Sink(path, AUTHOR).write(rollbacks, {})
    assert numbers(path) == [1, 2]


def test_repetitions_are_told_when_the_trainer_ends_within_an_epoch(tmp_path: Path):
    sink = Sink(tmp_path / "r.jsonl", AUTHOR)
    sink.write([line(number) for number in (1, 2, 3)], {})
    sink.close()
    assert [found.get("count") for found in read(tmp_path / "r.jsonl")] == [None, 2]


# The queue


def test_a_full_queue_drops_the_oldest_of_the_least_important():
    queue = Queue(3)
    assert queue.add(line(1, RunEvent.PROGRESS)) is None
    assert queue.add(line(2, RunEvent.PROGRESS)) is None
    assert queue.add(line(3, level=Level.CRITICAL)) is None
    assert queue.add(line(4)) == 1  # LOW
    assert queue.add(line(5)) == 1
    assert queue.add(line(6, RunEvent.PROGRESS)) == 1, "the new line is the least important itself"
    assert [held.number for held in queue.take()] == [3, 4, 5]
    assert len(queue) == 0


# The thread


def test_lines_reach_the_file_in_order_and_close_waits_for_them(tmp_path: Path):
    record = Record(tmp_path / "r.jsonl", AUTHOR)
    for step in range(300):
        record.append(RunEvent.PROGRESS, step=step, loss=step / 2)
    assert record.close(PATIENCE_S)
    assert [found["step"] for found in read(tmp_path / "r.jsonl")] == list(range(300))


def test_a_volume_that_hangs_costs_lines_and_never_waits_for_training(tmp_path: Path):
    """A pipe that nobody reads takes 64 KiB and then no more, as a dead network volume does."""
    pipe = tmp_path / "record.jsonl"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    lost: list[str] = []
    record = Record(pipe, AUTHOR, on_dropped=lost.append, max_queued=100)
    text = "x" * 1000
    for step in range(400):
        record.append(RunEvent.PROGRESS, step=step, text=text)
    record.append(RunEvent.RUN_FAILED, step=400, level=Level.CRITICAL)
    assert not record.flush(0.0)
    assert lost
    assert set(lost) == {"LOW"}
    os.set_blocking(reading, True)
    received = b""
    while b"tolaria.run.failed" not in received:
        received += os.read(reading, 65536)
    assert record.flush(PATIENCE_S)
    assert record.close(PATIENCE_S)
    os.close(reading)
    told = [json.loads(found) for found in received.splitlines()]
    assert sum(found.get("dropped", {}).get("LOW", 0) for found in told) == len(lost)
    assert len(told) + len(lost) == 401


def test_a_record_that_cannot_be_written_says_so_and_goes_on(tmp_path: Path):
    record = Record(tmp_path / "absent" / "record.jsonl", AUTHOR)
    record.append(RunEvent.NOTICE, step=1)
    assert record.flush(PATIENCE_S)
    assert record.trouble == "record.jsonl: No such file or directory"
    record.append(RunEvent.NOTICE, step=2)
    assert record.close(PATIENCE_S)


@pytest.mark.row("T49")
def test_a_line_is_enqueued_in_well_under_two_milliseconds(tmp_path: Path):
    """Also while the volume hangs and the queue is full, so that each line drops another."""
    pipe = tmp_path / "record.jsonl"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    record = Record(pipe, AUTHOR, max_queued=1000)
    times: list[int] = []
    for step in range(5000):
        began = time.perf_counter_ns()
        record.append(RunEvent.EPOCH, step=step, metrics={"loss": 0.5, "accuracy": 0.25}, text="x" * 200)
        times.append(time.perf_counter_ns() - began)
    assert not record.flush(0.0)
    os.set_blocking(reading, True)
    received = b""
    while b'"step":4999' not in received:  # the newest line is never the one that gives way
        received = received[-100:] + os.read(reading, 65536)
    assert record.close(PATIENCE_S)
    os.close(reading)
    assert sorted(times)[4950] / 1e6 < 2.0
