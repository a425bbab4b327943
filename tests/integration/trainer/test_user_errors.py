"""Errors of the user's code: its own frames and the error, in the last word, the journal's failure and the record."""

import json
import re
from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.runconfig import parse
from esper_runtime.tolaria import trainer
from esper_runtime.tolaria.assemble import lay_out
from esper_runtime.tolaria.place import Place

from tests.support.trainers import CODE, Pod

FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')
USER = str(CODE / "clumsy.py")


def fail(tmp_path: Path, where: str, **config: object) -> tuple[Pod, int, str]:
    """(pod, exit code, message) of a trainer whose workload raises there."""
    pod = Pod(tmp_path).configure(entrypoint="clumsy:build")
    pod.document["config"] = {"where": where, **config}
    pod.write_config()
    read = parse((pod.root / "run.json").read_text())
    bench = lay_out(Place.read(pod.environment()), read)
    code = trainer.conclude(bench, trainer.run(bench, read))
    return pod, code, json.loads((pod.run_dir / paths.LAST_WORD).read_text())["message"]


@pytest.mark.parametrize(
    ("where", "code", "functions", "error"),
    [
        ("build", ExitCode.USER_CODE, ["build"], "json.decoder.JSONDecodeError: Expecting property name"),
        ("optimizer", ExitCode.USER_CODE, ["optimizer"], "ValueError: Invalid learning rate: -1.0"),
        ("data", ExitCode.TRAINER_CRASHED, ["__getitem__", "read_image"], "FileNotFoundError: image 7 is not there"),
        ("transform", ExitCode.TRAINER_CRASHED, ["transform"], "IndexError: list index out of range"),
        ("loss", ExitCode.TRAINER_CRASHED, ["loss"], "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("metrics", ExitCode.TRAINER_CRASHED, ["metrics"], "ZeroDivisionError: "),
    ],
)
def test_the_message_has_the_user_s_frames_and_the_error(
    tmp_path: Path, where: str, code: ExitCode, functions: list[str], error: str
):
    _, ended, message = fail(tmp_path, where)
    assert ended == code
    assert FRAME.findall(message) == [(USER, function) for function in functions]
    assert error in message.splitlines()[-1]


@pytest.mark.slow
def test_what_a_data_loader_s_worker_raises_is_told_by_the_user_s_frames_alone(tmp_path: Path):
    _, ended, message = fail(tmp_path, "data", workers=1)
    assert ended == ExitCode.TRAINER_CRASHED
    assert FRAME.findall(message) == [(USER, "__getitem__"), (USER, "read_image")]
    assert "in DataLoader worker process 0" in message
    assert message.splitlines()[-1] == "FileNotFoundError: image 7 is not there"


def test_what_stops_the_run_for_good_is_a_failure_in_the_journal(tmp_path: Path):
    pod, _, message = fail(tmp_path, "build")
    (failure,) = pod.events("failure")
    assert (failure.reason, failure.exit_code) == ("UserCodeError", ExitCode.USER_CODE)
    assert failure.message == message


def test_the_record_ends_with_the_same_words(tmp_path: Path):
    pod, _, message = fail(tmp_path, "loss")
    lines = (pod.root / "checkpoints" / pod.uid / "record.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["event"], last["level"]) == ("tolaria.trainer.ended", "CRITICAL")
    assert last["fields"]["message"] == message[:1024]
