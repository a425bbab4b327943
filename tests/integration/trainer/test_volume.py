"""A checkpoint volume that fills up or turns read-only under a training run: it trains on, says so, and recovers."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.trainers import PAUSED, Pod, Turns, same_bits
from tests.support.waiting import PATIENT_S

CONFIG = {"epochs": 4}
CHECKPOINTS = {"everySteps": 4, "memory": {"everySteps": 5}}


def mount(directory: Path, *options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(directory)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """mount(directory, options); what is still mounted at the end is unmounted."""
    made: list[Path] = []

    def make(directory: Path, *options: str) -> None:
        mount(directory, *options)
        made.append(directory)

    yield make
    for directory in reversed(made):
        subprocess.run(["umount", "--lazy", str(directory)], check=False, capture_output=True)


def degradations(pod: Pod) -> list[tuple[bool, str]]:
    return [(d.degraded, d.reason) for d in pod.events("degradation") if d.component == "checkpoint"]


class Trouble:
    """A run in turns, with the volume spoilt between two of them."""

    def __init__(self, root: Path, **options: object) -> None:
        self.pod = Pod(root).configure(config=CONFIG, checkpoint=CHECKPOINTS, **options)
        self.parts, self.state = self.pod.assemble()
        self._turns = Turns(self.parts, self.state)

    def train(self, steps: int) -> None:
        assert self._turns.run(steps) is PAUSED
        self.parts.checkpoints.wait()

    def to_the_end(self) -> None:
        assert self._turns.run(10**9).exit_code == 0
        self.parts.checkpoints.close(PATIENT_S)


def undisturbed(tmp_path: Path) -> Pod:
    pod = Pod(tmp_path / "undisturbed").configure(config=CONFIG, checkpoint=CHECKPOINTS)
    assert pod.train().exit_code == 0
    return pod


def test_a_full_volume_is_told_and_training_goes_on(tmp_path: Path, mounted: Callable[..., None]):
    (tmp_path / "full" / "checkpoints").mkdir(parents=True)
    mounted(tmp_path / "full" / "checkpoints", "-o", "size=2m")
    run = Trouble(tmp_path / "full")
    run.train(10)
    before = run.pod.newest()
    ballast = tmp_path / "full" / "checkpoints" / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(4_000_000))
    run.train(10)
    assert run.state.step == 20
    assert degradations(run.pod)[-1] == (True, "CheckpointVolumeFull")
    message = run.pod.events("degradation")[-1].message
    assert "No space left" in message
    assert "enlarge the volume or lower checkpoint.retention" in message
    assert run.pod.events("checkpoint")[-1].last_error
    failures = run.pod.counters().checkpoint_failures
    assert failures >= 1
    assert run.pod.newest().step == before.step, "the old checkpoint is intact"
    ballast.unlink()
    run.train(10)
    assert degradations(run.pod)[-1] == (False, "CheckpointSaved")
    assert run.pod.events("checkpoint")[-1].last_error == ""
    run.to_the_end()
    assert run.pod.counters().checkpoint_failures == failures
    same_bits(run.pod.newest(), undisturbed(tmp_path).newest())


def test_a_read_only_volume_is_told_and_training_goes_on(tmp_path: Path, mounted: Callable[..., None]):
    run = Trouble(tmp_path / "frozen")
    run.train(10)
    attempt = tmp_path / "frozen" / "checkpoints" / run.pod.uid / "a00001"
    mounted(attempt, "-o", "ro")
    run.train(10)
    assert run.state.step == 20
    assert degradations(run.pod)[-1] == (True, "CheckpointFailed")
    assert "Read-only file system" in run.pod.events("degradation")[-1].message
    subprocess.run(["umount", str(attempt)], check=True)
    run.train(10)
    assert degradations(run.pod)[-1] == (False, "CheckpointSaved")
    run.to_the_end()
    same_bits(run.pod.newest(), undisturbed(tmp_path).newest())


def test_a_rollback_while_the_volume_is_full_is_not_forgotten(tmp_path: Path, mounted: Callable[..., None]):
    """The log of the run lies on that volume too: what it missed is in it once there is room again."""
    (tmp_path / "full" / "checkpoints").mkdir(parents=True)
    mounted(tmp_path / "full" / "checkpoints", "-o", "size=2m")
    run = Trouble(tmp_path / "full", health={"nonFiniteAction": "Rollback"})
    run.train(10)
    ballast = tmp_path / "full" / "checkpoints" / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(4_000_000))
    for _ in range(100):  # the log's last page has room for some records
        run.parts.rollbacks.scale_learning_rate(run.state, 0.999, "to fill the log")
    run.state.update.optimizer.param_groups[0]["params"][0].data[0] = float("nan")
    run.train(10)
    assert run.pod.counters().rollbacks >= 1
    scale = run.state.learning_rate_scale
    ballast.unlink()
    run.to_the_end()
    counters = run.pod.counters()
    run.pod.attempt = 2
    parts, state = run.pod.assemble()
    assert state.learning_rate_scale == scale
    assert parts.rollbacks._facts.counters() == counters
