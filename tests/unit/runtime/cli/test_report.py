"""`esper report`: what a record tells, on lines made by hand; that of a real run is in tests/integration/trainer."""

import json
import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.exitcodes import ExitCode
from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.page import Scale, page
from esper_runtime.cli.report import MAX_ROWS, find_record, text
from esper_runtime.cli.story import story_of

START = datetime(2026, 11, 29, 12, 0, 0, tzinfo=UTC)


class Diary:
    """Writes lines as trainers do: seconds by a monotonic clock of their own node, and the wall clock."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.wall = 0.0
        self.trainer(attempt=1)

    def trainer(self, *, attempt: int, incarnation: int = 1, start: int = 1, after: float = 0.0) -> "Diary":
        """A new process, whose monotonic clock has nothing to do with the one before."""
        self.wall += after
        self._process = f"{attempt}.{incarnation}.{start}"
        self._ns_ahead = attempt * 10**15
        return self

    def add(self, seconds: float, event: str, step: int, level: str = "INFO", **more: Any) -> "Diary":
        """`seconds` after the line before."""
        self.wall += seconds
        attempt, incarnation, _ = map(int, self._process.split("."))
        fields = more.pop("fields", {})
        self.lines.append(
            {
                "id": f"{self._process}.{len(self.lines)}",
                "time": (START + timedelta(seconds=self.wall)).isoformat(),
                "ns": int(self._ns_ahead + self.wall * 1e9),
                "attempt": attempt,
                "incarnation": incarnation,
                "step": step,
                "level": level,
                "event": event,
                "fields": fields,
                **more,
            }
        )
        return self

    def progress(self, seconds: float, step: int, loss: float = 1.0) -> "Diary":
        return self.add(seconds, "tolaria.progress", step, fields={"loss": loss})

    def moves(self, seconds: float, before: str, after: str, step: int) -> "Diary":
        return self.add(seconds, "tolaria.transition", step, fields={"from": before, "to": after, "reason": "R"})

    def rolled_back(self, seconds: float, begin: int, end: int, cause: str = "NonFiniteLoss") -> "Diary":
        fields = {"kind": "InProcess", "cause": cause, "tier": "Fast", "fromStep": begin, "toStep": end,
                  "detectMs": 0.5, "recoverMs": 4.0}  # fmt: skip
        return self.add(seconds, "tolaria.rollback.completed", end, "WARNING", fields=fields)


def test_time_that_a_rollback_undid_is_no_goodput():
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100).progress(10, 200).rolled_back(1, 201, 150)
    diary.progress(5, 200)
    story = story_of(diary.lines)
    assert story.seconds == 26
    assert story.forward_seconds == pytest.approx(10 + 5 + 5)  # half of the second stretch was kept
    assert story.goodput == pytest.approx(20 / 26)


def test_stretches_that_were_undone_whole_count_for_nothing():
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100).progress(10, 200).progress(10, 300)
    story = story_of(diary.rolled_back(1, 301, 100).lines)
    assert story.forward_seconds == pytest.approx(10)


def test_time_between_two_trainers_is_the_wall_clock_s_and_is_no_goodput():
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100)
    diary.trainer(attempt=2, after=30).add(0, "tolaria.trainer.started", 80).progress(4, 100)
    story = story_of(diary.lines)
    assert (story.attempts, story.trainers) == (2, 2)
    assert story.seconds == pytest.approx(44)
    assert story.forward_seconds == pytest.approx(8 + 4)


def test_a_wall_clock_that_jumps_back_between_trainers_takes_no_time_away():
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100)
    diary.trainer(attempt=2, after=-3600).add(0, "tolaria.trainer.started", 100).progress(5, 150)
    assert story_of(diary.lines).seconds == pytest.approx(15)


def test_steps_that_stand_still_are_no_goodput():
    """Boundaries, checkpoints waited for, a freeze."""
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100).add(30, "tolaria.metrics", 100)
    assert story_of(diary.lines).goodput == pytest.approx(0.25)


def new_attempt(diary: Diary, number: int, step: int) -> Diary:
    diary.trainer(attempt=number, after=5).add(0, "tolaria.trainer.started", step)
    fields = {"kind": "NewAttempt", "cause": "PodLost", "fromStep": step, "toStep": step}
    return diary.add(1, "tolaria.recovery.completed", step, fields=fields)


@pytest.mark.parametrize(("code", "cause"), [(ExitCode.HALTED, "Resumed"), (ExitCode.DRAINED, "Resumed"),
                                             (ExitCode.HUNG, "PodLost")])  # fmt: skip
def test_an_attempt_that_follows_a_stop_has_lost_no_pod(code: ExitCode, cause: str):
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100)
    new_attempt(diary.add(1, "tolaria.trainer.ended", 100, fields={"reason": "R", "exitCode": int(code)}), 2, 100)
    new_attempt(diary.progress(10, 200), 3, 150)  # the second one was lost
    assert [back.cause for back in story_of(diary.lines).backs] == [cause, "PodLost"]


# The supervisor's lines


def died(diary: Diary, seconds: float, step: int, reason: str = "TrainerKilled", **fields: Any) -> Diary:
    diary.trainer(attempt=1, start=0)
    fields = {"reason": reason, "message": f"it died at step {step}\nand more", "exitCode": 137, **fields}
    return diary.add(seconds, "tolaria.trainer.failed", step, "ERROR", fields=fields)


def test_deaths_are_a_table_of_their_own_and_the_supervisor_is_no_trainer():
    diary = died(Diary().progress(1, 100), 1, 104).trainer(attempt=1, start=2).progress(5, 110)
    died(diary, 1, 111, "Hang", evidence="a00001/stacks-1.txt")
    diary.add(0, "tolaria.trainer.failed", 111, "ERROR", fields={"reason": "TrainerCrashed", "message": "no process"})
    story = story_of(diary.lines)
    assert story.trainers == 2
    said = text("r", story)
    assert re.search(r"TrainerKilled +137 +104 +it died at step 104 *$", said, re.M)
    assert re.search(r"Hang +137 +111 +it died at step 111 +a00001/stacks-1\.txt$", said, re.M)
    assert re.search(r"TrainerCrashed +111 +no process *$", said, re.M)
    assert "and more" not in said
    assert "Failures of the trainer" in page("r", story)


def test_time_within_an_incarnation_is_that_of_its_one_clock():
    """The wall clock jumped back while the trainer was restarted."""
    diary = died(Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100), 1, 104)
    diary.trainer(attempt=1, start=2).add(3, "tolaria.trainer.started", 100)
    diary.lines[-1]["time"] = START.isoformat()
    assert story_of(diary.lines).seconds == pytest.approx(14)


def test_a_line_that_waited_for_the_trainer_s_end_adds_no_time():
    diary = Diary().add(0, "tolaria.trainer.started", 0).progress(10, 100).progress(90, 200)
    diary.trainer(attempt=1, start=0).add(-95, "tolaria.notice", 60, "WARNING", fields={"reason": "SpareUnavailable"})
    died(diary, 96, 203)
    assert story_of(diary.lines).seconds == pytest.approx(101)
    assert story_of(diary.lines).forward_seconds == pytest.approx(100), "the supervisor trains nothing"
    diary.trainer(attempt=1, start=0).add(-60, "tolaria.notice", 60, "WARNING", fields={"reason": "SpareUnavailable"})
    diary.trainer(attempt=2, after=60 + 7).add(0, "tolaria.trainer.started", 200)
    assert story_of(diary.lines).seconds == pytest.approx(101 + 7)


def test_phases_last_until_the_next_one():
    diary = Diary().add(0, "tolaria.trainer.started", 0).moves(3, "Starting", "Running", 1)
    diary.moves(10, "Running", "RollingBack", 9).moves(1, "RollingBack", "Running", 5).progress(6, 20)
    said = text("r", story_of(diary.lines))
    assert re.search(r"^Starting +3\.0 +15\.0% +1$", said, re.M)
    assert re.search(r"^Running +16\.0 +80\.0% +2$", said, re.M)
    assert re.search(r"^RollingBack +1\.0 +5\.0% +1$", said, re.M)


def test_recoveries_tell_their_cause_and_milliseconds():
    said = text("r", story_of(Diary().progress(1, 100).rolled_back(1, 101, 90, "LossSpike").lines))
    assert re.search(r"InProcess +LossSpike +Fast +101 +90 +0\.5 ms +4\.0 ms$", said, re.M)


def test_an_epoch_trained_again_takes_the_place_of_what_was_undone():
    diary = Diary()
    for epoch, loss in ((1, 5.0), (2, 4.0), (1, 5.5), (2, 4.5)):
        fields = {"epoch": epoch, "metrics": {"train_loss": loss}}
        diary.add(1, "tolaria.epoch.closed", epoch * 10, fields=fields)
    assert [(e.number, e.metrics["train_loss"]) for e in story_of(diary.lines).epochs] == [(1, 5.5), (2, 4.5)]


def test_checkpoints_boundaries_and_what_is_missing_are_summed_up():
    diary = Diary().progress(1, 10)
    for step, stall in ((10, 2.0), (20, 6.0), (20, 6.0)):
        fields = {"latestStep": step, "stallMs": stall, "bytes": 2**21}
        diary.add(1, "tolaria.checkpoint.committed", step, fields=fields)
    for took in (1.0, 2.0, 9.0):
        diary.add(1, "tolaria.metrics", 20, fields={"values": {"tolaria.epoch_hook.latency_ms": took}})
    diary.add(1, "tolaria.notice", 20, "WARNING", dropped={"LOW": 3, "NORMAL": 1}, lost=2)
    diary.add(0, "tolaria.notice", 20, "WARNING", repeats="1.1.1.9", count=5)
    said = text("r", story_of(diary.lines))
    assert "2 committed, the newest of step 20, 2.0 MiB kept, training held up 4.0 ms (median), 6.0 ms at most" in said
    assert "Boundaries:   3, 2.00 ms (median), 9.00 ms at most" in said
    assert "2 because the volume did not take them, 4 because there was no room in the queue" in said
    assert re.search(r"^tolaria\.notice +6$", said, re.M)


def test_the_last_word_is_the_end_until_a_trainer_starts_again():
    ended = {"reason": "Drained", "exitCode": 143, "message": "stopped"}
    diary = Diary().progress(1, 10).add(1, "tolaria.trainer.ended", 10, fields=ended)
    assert "End:          Drained (143) stopped" in text("r", story_of(diary.lines))
    diary.trainer(attempt=1, incarnation=2).add(1, "tolaria.trainer.started", 10)
    assert "none is recorded; it stood at step 10" in text("r", story_of(diary.lines))


def test_long_tables_keep_their_beginning_and_end():
    diary = Diary()
    for epoch in range(1, 101):
        diary.add(1, "tolaria.epoch.closed", epoch, fields={"epoch": epoch, "metrics": {"train_loss": 1.0}})
    said = text("r", story_of(diary.lines))
    assert f"{100 - MAX_ROWS} more" in said
    assert re.search(r"^1 +1 +1", said, re.M)
    assert re.search(r"^100 +100 +1", said, re.M)
    assert len(said.splitlines()) < 40


# The page


def document(diary: Diary, name: str = "run") -> ElementTree.Element:
    html = page(name, story_of(diary.lines))
    return ElementTree.fromstring(html.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""))  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere():
    html = page("run", story_of(Diary().progress(1, 1).progress(1, 2).lines))
    assert not re.search(r"(src|href|url|@import|<script|https?:)", html)


def test_the_curve_has_a_mark_for_each_rollback_and_dashes_for_what_was_undone():
    diary = Diary().progress(1, 10, 4.0).progress(1, 20, 3.0).progress(1, 30, 2.5).rolled_back(1, 31, 20)
    diary.progress(1, 30, 2.0).progress(1, 40, 1.5)
    tree = document(diary)
    (svg,) = tree.iter("svg")
    assert [title.text for title in svg.iter("title")] == ["InProcess after NonFiniteLoss: step 31 to 20 in 4.0 ms"]
    kinds = [line.get("class") for line in svg.iter("polyline")]
    assert kinds == ["train", "undone", "train"]
    undone = next(line for line in svg.iter("polyline") if line.get("class") == "undone")
    scale = Scale([40, 31], [1.5, 4.0])
    expected = " ".join(f"{scale.x(step):.1f},{scale.y(loss):.1f}" for step, loss in ((20, 3.0), (30, 2.5)))
    assert undone.get("points") == expected


def test_losses_over_a_wide_range_are_drawn_on_a_logarithmic_scale():
    diary = Diary().progress(1, 0, 100.0).progress(1, 1, 1.0).progress(1, 2, 0.01)
    scale = Scale([0, 1, 2], [100.0, 1.0, 0.01])
    assert scale.y(1.0) == pytest.approx((scale.y(100.0) + scale.y(0.01)) / 2)
    assert "logarithmic" in page("run", story_of(diary.lines))


def test_losses_that_are_all_the_same_or_negative_can_be_drawn():
    for loss in (0.0, -3.0, 7.0):
        document(Diary().progress(1, 1, loss).progress(1, 2, loss))


def test_what_users_wrote_is_escaped():
    diary = Diary().progress(1, 1)
    fields = {"reason": "X", "exitCode": 70, "message": "<script>alert(1)</script>"}
    diary.add(1, "tolaria.trainer.ended", 1, fields=fields)
    html = page("<b>", story_of(diary.lines))
    assert "<script>" not in html
    assert "<b>" not in html


# Finding the record


def record(directory: Path) -> Path:
    directory.mkdir(parents=True)
    path = directory / "record.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in Diary().progress(1, 5).lines))
    return path


@pytest.mark.parametrize("given", [".", "uid", "uid/record.jsonl"])
def test_a_volume_s_copy_a_run_s_directory_and_the_file_itself_are_found(tmp_path: Path, given: str):
    path = record(tmp_path / "uid")
    assert find_record(str(tmp_path / given), namespace=None, state=None).resolve() == path


def test_the_state_of_a_laptop_s_run_is_found(tmp_path: Path):
    path = record(tmp_path / "checkpoints" / "uid")
    assert find_record(str(tmp_path), namespace=None, state=None) == path


def test_of_several_runs_the_owner_of_the_volume_is_meant_or_one_must_be_named(tmp_path: Path):
    record(tmp_path / "one")
    path = record(tmp_path / "two")
    with pytest.raises(BackendError, match=r"the records of 2 runs: give one of .*one, .*two"):
        find_record(str(tmp_path), namespace=None, state=None)
    (tmp_path / "claimed-by").write_text("two\n")
    assert find_record(str(tmp_path), namespace=None, state=None) == path


def test_where_there_is_no_record_the_message_says_what_to_give(tmp_path: Path):
    with pytest.raises(BackendError, match=r"there is no record\.jsonl there: give the run's directory"):
        find_record(str(tmp_path), namespace=None, state=None)
