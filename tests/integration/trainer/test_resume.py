"""A run that was killed, or whose newest checkpoint is damaged, ends with the bits of one that nothing happened to."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers import Pod, same_bits
from tests.support.waiting import until_sync

START_S = 120.0
pytestmark = pytest.mark.timeout(400)
EPOCHS = 3
CHECKPOINTS: dict[str, Any] = {"everySteps": 8, "memory": {"everySteps": 5}, "retention": {"keepLatest": 10}}


@pytest.fixture
def expected(tmp_path: Path) -> Pod:
    pod = Pod(tmp_path / "undisturbed").configure(config={"epochs": EPOCHS}, checkpoint=CHECKPOINTS)
    assert pod.train().exit_code == 0
    return pod


def killed(tmp_path: Path, step: int) -> Pod:
    """A run whose trainer was ended by SIGKILL before this step."""
    pod = Pod(tmp_path / "killed").configure(
        config={"epochs": EPOCHS}, checkpoint=CHECKPOINTS, faultInjection=[{"kind": "KillTrainer", "step": step}]
    )
    process = pod.spawn()
    try:
        assert process.wait(START_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    return pod


def lost(tmp_path: Path, *steps: int) -> Pod:
    """A run each of whose pods was lost right after the checkpoint of one of these steps was on the volume."""
    pod = Pod(tmp_path / "killed")
    for pod.incarnation, step in enumerate(steps, start=1):
        pod.configure(
            config={"epochs": EPOCHS}, checkpoint=CHECKPOINTS, faultInjection=[{"kind": "Hang", "step": step + 1}]
        )
        process = pod.spawn()
        try:
            until_sync(lambda step=step: pod.saved_step() == step, START_S, f"the checkpoint of step {step}")
        finally:
            process.kill()
            process.communicate()
        for name in ("shm", "run"):
            shutil.rmtree(pod.root / name)
            (pod.root / name).mkdir()
    pod.incarnation += 1
    del pod.document["faultInjection"]
    pod.write_config()
    return pod


@pytest.mark.parametrize("step", [1, 2, 29, 48])
def test_killed_and_resumed_from_memory_it_ends_with_the_same_bits(tmp_path: Path, expected: Pod, step: int):
    pod = killed(tmp_path, step)
    pod.trainer_start = 2
    assert pod.train().exit_code == 0
    assert pod.events("recovery")[0].to_step == (step - 1) // 5 * 5
    same_bits(pod.newest(), expected.newest())


def test_killed_and_resumed_from_the_volume_it_ends_with_the_same_bits(tmp_path: Path, expected: Pod):
    pod = lost(tmp_path, 8)
    assert pod.train().exit_code == 0
    told = [kind for event in pod.events() if (kind := event.WhichOneof("event")) in ("checkpoint", "recovery")]
    assert told[:2] == ["checkpoint", "recovery"]
    assert pod.events("checkpoint")[0].latest_verified_step == 8
    assert pod.events("recovery")[0].to_step == 8
    same_bits(pod.newest(), expected.newest())


def test_killed_at_any_instant_it_ends_with_the_same_bits(tmp_path: Path, expected: Pod):
    pod = Pod(tmp_path / "killed").configure(config={"epochs": EPOCHS}, checkpoint=CHECKPOINTS)
    for start, step in enumerate((4, 17, 31), start=1):
        pod.trainer_start = start
        process = pod.spawn()
        try:
            until_sync(lambda step=step: (b := pod.heartbeat()) and b.step >= step, START_S, f"step {step}")
            process.kill()
            assert process.wait(START_S) in (-signal.SIGKILL, 0)
        finally:
            process.kill()
            process.communicate()
    pod.trainer_start = 4
    assert pod.train().exit_code == 0
    same_bits(pod.newest(), expected.newest())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "aux.safetensors", "state.json"])
def test_a_checkpoint_with_one_flipped_bit_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, expected: Pod, name: str
):
    pod = lost(tmp_path, 8, 16)
    generations = sorted((pod.root / "checkpoints" / pod.uid / "a00001").glob("gen-*"))
    newest, before = generations[-1], generations[-2]
    damaged = newest / name
    content = bytearray(damaged.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    damaged.write_bytes(content)
    pod.attempt = 2
    assert pod.train().exit_code == 0
    notice = next(n for n in pod.events("notice") if n.reason == "CheckpointCorrupt")
    assert notice.warning
    assert f"a00001/{newest.name}/{name}" in notice.message
    recovery = pod.events("recovery")[0]
    assert recovery.to_step == 8
    assert "the checkpoint of step 8 is used instead" in notice.message
    assert before.is_dir()
    assert f"a00001/{newest.name}/{name}" in pod.events("checkpoint")[-1].corrupt_files[0]
    same_bits(pod.newest(), expected.newest())


def test_without_any_sound_checkpoint_training_does_not_start_over_by_itself(tmp_path: Path):
    pod = lost(tmp_path, 8)
    for model in (pod.root / "checkpoints" / pod.uid).rglob("model.safetensors"):
        model.write_bytes(b"\0" * 100)
    pod.attempt = 2
    process = pod.spawn()
    assert process.wait(START_S) == 72
    process.communicate()
    assert pod.events("failure")[0].reason == "NoValidCheckpoint"
