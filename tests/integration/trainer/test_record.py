"""The record of a real run, and the report that is drawn from it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint.volume import RECORD_FILE
from esper_runtime.cli.report import report
from esper_runtime.tolaria.publish import Publisher
from esper_runtime.tolaria.record import read

from tests.support.trainers import PAUSED, Pod, Turns
from tests.support.waiting import PATIENT_S

PATIENCE_S = 30.0


def lines(pod: Pod) -> list[dict[str, Any]]:
    return list(read(pod.root / "checkpoints" / pod.uid / RECORD_FILE))


def named(pod: Pod, name: str) -> Iterator[dict[str, Any]]:
    return (line for line in lines(pod) if line["event"] == name)


@pytest.fixture(scope="module")
def nan_run(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """A tiny run whose loss turns NaN once, in a process of its own, to its end."""
    pod = Pod(tmp_path_factory.mktemp("nan")).configure(
        config={"epochs": 4}, faultInjection=[{"kind": "NonFiniteLoss", "step": 23}]
    )
    trainer = pod.spawn()
    _, said = trainer.communicate(timeout=50)
    assert trainer.returncode == 0, said
    return pod


def test_every_event_of_the_journal_is_in_the_record(nan_run: Pod):
    kinds = {"transition": 0, "recovery": 0, "epoch": 0, "completion": 0, "notice": 0, "degradation": 0}
    for event in nan_run.events():
        kind = event.WhichOneof("event")
        kinds[kind] = kinds.get(kind, 0) + 1
    found = lines(nan_run)
    told = [line["event"] for line in found]
    moves = [line for line in found if "from" in line["fields"]]
    assert len(moves) == kinds["transition"]
    assert told.count("tolaria.rollback.completed") == kinds["recovery"] == 1
    assert told.count("tolaria.epoch.closed") == kinds["epoch"] == 4
    assert told.count("tolaria.run.completed") == kinds["completion"] == 1
    own = {"tolaria.trainer.started", "tolaria.trainer.ended", "tolaria.progress", "tolaria.metrics"}
    counted = sum(line.get("count", 1) for line in found if line["event"] not in own)
    assert counted == len(nan_run.events())


def test_a_rollback_is_told_with_cause_steps_and_times(nan_run: Pod):
    (begun,) = named(nan_run, "tolaria.rollback.started")
    (done,) = named(nan_run, "tolaria.rollback.completed")
    assert (begun["level"], begun["step"], begun["fields"]["reason"]) == ("WARNING", 22, "NonFiniteLoss")
    assert (done["fields"]["cause"], done["fields"]["fromStep"], done["fields"]["toStep"]) == ("NonFiniteLoss", 23, 20)
    assert done["ns"] > begun["ns"]
    assert done["fields"]["recoverMs"] > 0


def test_each_epoch_has_its_metrics_and_a_snapshot_of_the_gauges(nan_run: Pod):
    epochs = list(named(nan_run, "tolaria.epoch.closed"))
    assert [line["fields"]["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert epochs[0]["fields"]["metrics"].keys() == {"train_loss", "validation_loss", "validation_accuracy"}
    values = [line["fields"]["values"] for line in named(nan_run, "tolaria.metrics")]
    assert [value["tolaria.epochs.total"] for value in values] == [1, 2, 3, 4]
    for line, value in zip(epochs, values, strict=True):
        assert value["tolaria.training.loss"] == line["fields"]["metrics"]["train_loss"]
        assert value["tolaria.validation.loss"] == line["fields"]["metrics"]["validation_loss"]
        assert value["tolaria.train.step_ms"] > 0
        assert value["tolaria.validation.latency_ms"] > 0
        assert value["tolaria.training.latency_ms"] >= value["tolaria.validation.latency_ms"]


def test_identities_rise_and_the_end_is_there(nan_run: Pod):
    found = [line for line in lines(nan_run) if "repeats" not in line]
    order = [int(line["id"].rsplit(".", 1)[1]) for line in found]
    assert order == sorted(set(order))
    assert {line["id"].rsplit(".", 1)[0] for line in found} == {"1.1.1"}
    assert [line["ns"] for line in found] == sorted(line["ns"] for line in found)
    assert found[0]["event"] == "tolaria.trainer.started"
    assert (found[-1]["event"], found[-1]["fields"]["exitCode"]) == ("tolaria.trainer.ended", 0)


def test_the_metrics_file_of_the_pod_holds_the_last_epoch(nan_run: Pod):
    text = (nan_run.run_dir / paths.TRAINER_METRICS).read_text()
    assert re.search(r"^esper_tolaria_epochs_total 4$", text, re.M)
    last = list(named(nan_run, "tolaria.epoch.closed"))[-1]["fields"]["metrics"]["train_loss"]
    assert float(re.search(r"^esper_tolaria_training_loss (\S+)$", text, re.M)[1]) == last  # type: ignore[index]


def test_the_report_of_a_copy_of_the_volume_tells_the_run_s_story(nan_run: Pod, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(nan_run.root / "checkpoints", copy)
    said = report(str(copy), html=tmp_path / "page.html", namespace=None, state=None)
    assert "End:          Complete (0)" in said
    assert re.search(r"InProcess +NonFiniteLoss +(Fast)? +23 +20 +[\d.]+ ms +[\d.]+ ms", said)
    assert re.search(r"^Goodput: +\d+\.\d%", said, re.M)
    assert re.search(r"^RollingBack +\d", said, re.M)
    assert len(re.findall(r"^[1-4] +\d+ +\d", said, re.M)) == 4
    html = (tmp_path / "page.html").read_text()
    assert "<svg" in html
    assert "InProcess after NonFiniteLoss: step 23 to 20" in html


def test_a_crash_leaves_the_user_s_frames_in_the_record(tmp_path: Path):
    pod = Pod(tmp_path).configure(faultInjection=[{"kind": "Crash", "step": 5}])
    trainer = pod.spawn()
    trainer.communicate(timeout=50)
    assert trainer.returncode == ExitCode.TRAINER_CRASHED
    ended = lines(pod)[-1]
    assert (ended["event"], ended["level"]) == ("tolaria.trainer.ended", "CRITICAL")
    assert "fault injection: Crash at step 5" in ended["fields"]["message"]


def test_a_restarted_trainer_goes_on_in_the_same_record(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 2})
    parts, state = pod.assemble()
    assert Turns(parts, state).run(10) is PAUSED
    assert parts.publisher.close(PATIENCE_S)
    parts.checkpoints.close(PATIENT_S)
    pod.trainer_start = 2
    assert pod.train().exit_code == 0
    found = lines(pod)
    assert {line["id"].rsplit(".", 1)[0] for line in found} == {"1.1.1", "1.1.2"}
    (recovery,) = [line for line in found if line["event"] == "tolaria.recovery.completed"]
    assert recovery["fields"]["kind"] == "InPlace"
    assert "2 trainer processes" in report(str(tmp_path / "checkpoints"), html=None, namespace=None, state=None)


class Seconds:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_record_that_cannot_be_written_degrades_the_run_and_nothing_else(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 2})
    (tmp_path / "checkpoints" / pod.uid / RECORD_FILE).mkdir(parents=True)  # a directory where the file should be
    parts, state = pod.assemble()
    clock = Seconds()
    publisher: Publisher = parts.publisher
    publisher._monotonic = clock
    turns = Turns(parts, state)
    assert turns.run(5) is PAUSED
    assert publisher._record.flush(PATIENCE_S)
    clock.now = 2.0
    assert turns.run(1) is PAUSED
    told = [(d.degraded, d.reason, d.message) for d in pod.events("degradation") if d.component == "record"]
    assert told == [(True, "RecordIncomplete", "training goes on without its record: record.jsonl: Is a directory")]
    (tmp_path / "checkpoints" / pod.uid / RECORD_FILE).rmdir()
    clock.now = 4.0
    assert turns.run(1) is PAUSED  # the sample of this second is the first line that can be written
    assert publisher._record.flush(PATIENCE_S)
    clock.now = 6.0
    assert turns.run(10**9).exit_code == 0
    assert [d.degraded for d in pod.events("degradation") if d.component == "record"] == [True, False]
    publisher.close(PATIENCE_S)
    assert lines(pod)[0]["lost"] >= 2


def test_a_metrics_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pod = Pod(tmp_path).configure(config={"epochs": 2})
    (pod.run_dir / paths.TRAINER_METRICS).mkdir()
    assert pod.train().exit_code == 0
    said = [r.message for r in caplog.records if "metrics cannot be written" in r.message]
    assert len(said) == 1
