"""The trainer as a process: killed, drained, halted, frozen, misused."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from esper_leyline import paths
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import (
    ACK_STAGE_DONE,
    ACK_STAGE_SEEN,
    EMERGENCY_MODE_CHECKPOINT,
    EMERGENCY_MODE_FREEZE,
    EMERGENCY_MODE_KILL,
)

from tests.support.trainers import Pod
from tests.support.waiting import until_sync

START_S = 120.0
"""Torch takes seconds to import, and many on a busy machine."""
pytestmark = pytest.mark.timeout(400)
LONG = {"epochs": 100_000}
"""Never ends by itself within a test."""


@contextmanager
def running(pod: Pod) -> "Iterator[subprocess.Popen[str]]":
    process = pod.spawn()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def reach(pod: Pod, step: int) -> None:
    until_sync(lambda: (beat := pod.heartbeat()) and beat.step >= step, START_S, f"step {step}")


def acks(pod: Pod) -> list[tuple[str, int, bool]]:
    return [(ack.signal_id, ack.stage, ack.clear) for ack in pod.events("ack")]


def phase(pod: Pod) -> int:
    beat = pod.heartbeat()
    return beat.phase if beat else 0


def undisturbed(tmp_path: Path, epochs: int) -> list[str]:
    pod = Pod(tmp_path / "undisturbed").configure(config={"epochs": epochs})
    assert pod.train().exit_code == 0
    return pod.losses()


def test_killed_trainer_goes_on_from_memory_bit_for_bit(tmp_path: Path):
    pod = Pod(tmp_path / "killed").configure(
        config={"epochs": 3},
        faultInjection=[{"kind": "KillTrainer", "step": 29}],
        checkpoint={"memory": {"everySteps": 5}},
    )
    with running(pod) as process:
        assert process.wait(START_S) == -signal.SIGKILL
    before = len(pod.losses())
    pod.trainer_start = 2
    with running(pod) as process:
        assert process.wait(START_S) == 0
    recovery = pod.events("recovery")[0]
    assert (recovery.kind, recovery.to_step, recovery.verified) == (pb.RECOVERY_KIND_IN_PLACE, 25, True)
    assert recovery.recover_ms > 0
    assert ("RESTARTING", "RUNNING", "RestartedInPlace") in pod.moves()
    expected = undisturbed(tmp_path, 3)
    assert before == 28
    assert pod.losses()[before:] == expected[25:]


def test_drained_trainer_saves_and_the_next_attempt_goes_on_bit_for_bit(tmp_path: Path):
    pod = Pod(tmp_path / "drained").configure(config=LONG)
    with running(pod) as process:
        reach(pod, 40)
        process.terminate()
        assert process.wait(START_S) == 143
    word = json.loads((pod.run_dir / paths.LAST_WORD).read_text())
    saved = word["savedStep"]
    assert word["reason"] == "Drained"
    assert saved == len(pod.losses()) >= 40
    again = Pod(tmp_path / "again", attempt=2)
    (tmp_path / "again" / "checkpoints").rmdir()
    (tmp_path / "again" / "checkpoints").symlink_to(tmp_path / "drained" / "checkpoints")
    epochs = saved // 16 + 2
    again.configure(config={"epochs": epochs})
    assert again.train().exit_code == 0
    assert again.events("recovery")[0].kind == pb.RECOVERY_KIND_NEW_ATTEMPT
    assert pod.losses() + again.losses() == undisturbed(tmp_path, epochs)


@pytest.mark.row("K09")
def test_freeze_stops_stepping_until_it_is_cleared(tmp_path: Path):
    pod = Pod(tmp_path).configure(config=LONG)
    with running(pod) as process:
        reach(pod, 5)
        pod.signal(EMERGENCY_MODE_FREEZE, seq=1)
        until_sync(lambda: phase(pod) == pb.RUNTIME_PHASE_FROZEN, what="frozen")
        beat = pod.heartbeat()
        assert beat is not None
        until_sync(lambda: (b := pod.heartbeat()) and b.beat_ns > beat.beat_ns, what="a beat while frozen")
        later = pod.heartbeat()
        assert later is not None
        assert (later.step, later.emergency_order) == (beat.step, (1 << 32) | 1)
        pod.signal(EMERGENCY_MODE_FREEZE, seq=2, signal_id="cd" * 16, clear=True)  # of another halt: nothing happens
        pod.signal(EMERGENCY_MODE_FREEZE, seq=3, clear=True)
        reach(pod, beat.step + 3)
        process.terminate()
        assert process.wait(START_S) == 143
    mine = "ab" * 16
    assert acks(pod) == [(mine, ACK_STAGE_SEEN, False), (mine, ACK_STAGE_DONE, False), (mine, ACK_STAGE_DONE, True)]
    assert pod.moves()[1:4] == [
        ("RUNNING", "HALTING", "EmergencyStop"),
        ("HALTING", "FROZEN", "Frozen"),
        ("FROZEN", "RUNNING", "Resumed"),
    ]


@pytest.mark.row("K09")
def test_checkpoint_stop_saves_and_exits_75(tmp_path: Path):
    pod = Pod(tmp_path).configure(config=LONG)
    with running(pod) as process:
        reach(pod, 5)
        pod.signal(EMERGENCY_MODE_CHECKPOINT, seq=1, attempt=7)  # for another attempt: ignored
        reach(pod, 10)
        pod.signal(EMERGENCY_MODE_CHECKPOINT, seq=2, attempt=1)
        assert process.wait(START_S) == 75
    seen, done = pod.events("ack")
    assert (seen.stage, done.stage) == (ACK_STAGE_SEEN, ACK_STAGE_DONE)
    assert done.saved_step == done.step == len(pod.losses())
    assert pod.moves()[-1] == ("HALTING", "HALTED", "EmergencyStop")


def test_kill_stop_exits_75_and_a_halt_in_force_stops_the_next_start_before_its_first_step(tmp_path: Path):
    pod = Pod(tmp_path).configure(config=LONG)
    with running(pod) as process:
        reach(pod, 5)
        pod.signal(EMERGENCY_MODE_KILL, seq=1)
        assert process.wait(START_S) == 75
    assert not pod.events("ack")[-1].HasField("saved_step")
    steps = len(pod.losses())
    with running(pod) as process:
        assert process.wait(START_S) == 75
    assert len(pod.losses()) == steps


@pytest.mark.row("K09")
def test_stronger_order_ends_a_freeze(tmp_path: Path):
    pod = Pod(tmp_path).configure(config=LONG)
    pod.signal(EMERGENCY_MODE_FREEZE, seq=1)
    with running(pod) as process:
        until_sync(lambda: phase(pod) == pb.RUNTIME_PHASE_FROZEN, START_S, "frozen before the first step")
        assert pod.losses() == []
        pod.signal(EMERGENCY_MODE_CHECKPOINT, seq=2, signal_id="cd" * 16)
        assert process.wait(START_S) == 75
    assert pod.events("ack")[-1].saved_step == 0


def test_hung_trainer_dumps_its_stacks(tmp_path: Path):
    pod = Pod(tmp_path).configure(config=LONG, faultInjection=[{"kind": "Hang", "step": 3}])
    with running(pod) as process:
        until_sync(lambda: any(n.reason == "FaultInjected" for n in pod.events("notice")), START_S, "the hang")
        process.send_signal(signal.SIGUSR1)
        dump = pod.run_dir / paths.STACK_DUMP
        until_sync(lambda: "_hang" in dump.read_text(), what="a stack dump")


def test_crash_leaves_a_last_word_and_the_next_start_does_not_crash_again(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 1}, faultInjection=[{"kind": "Crash", "step": 7}])
    with running(pod) as process:
        assert process.wait(START_S) == 70
    word = json.loads((pod.run_dir / paths.LAST_WORD).read_text())
    assert (word["reason"], word["exitCode"]) == ("TrainerCrashed", 70)
    assert "InjectedCrash" in word["message"]
    pod.trainer_start = 2
    assert pod.train().exit_code == 0


@pytest.mark.parametrize(
    ("entrypoint", "config", "reason", "words"),
    [
        ("no_such_module:build", {}, "EntrypointNotFound", "there is no module no_such_module"),
        ("tiny:no_such_function", {}, "EntrypointNotFound", "has no 'no_such_function'; it has"),
        ("tiny:not_a_workload", {}, "EntrypointWrongType", "returned int; it must return"),
        ("tiny:raises", {}, "UserCodeError", "KeyError: 'nothing here'"),
        (
            "tiny:build",
            {"epoch": 3},
            "UnknownConfigKey",
            "runtime.config.epoch is unknown to this workload; known keys:",
        ),
        ("tiny:build", {"epochs": "3"}, "InvalidSpec", "runtime.config.epochs is '3'; give a value of type int"),
    ],
)
def test_user_code_error_exits_71_and_says_what_to_mend(
    tmp_path: Path, entrypoint: str, config: dict[str, object], reason: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    from esper_runtime.tolaria import trainer

    pod = Pod(tmp_path).configure(entrypoint=entrypoint, config=config)
    for name, value in pod.environment().items():
        monkeypatch.setenv(name, value)
    assert trainer.main() == 71
    word = json.loads((pod.run_dir / paths.LAST_WORD).read_text())
    assert (word["reason"], word["exitCode"]) == (reason, 71)
    assert words in word["message"]
    assert "esper_runtime/tolaria" not in word["message"]
    failure = pod.events("failure")[0]
    assert (failure.reason, failure.exit_code, failure.container) == (reason, 71, "tolaria")
