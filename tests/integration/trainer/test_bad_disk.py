"""A real trainer on a volume whose calls fail or crawl, behind a shim in its C library: it trains on and says so."""

import errno
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_runtime.checkpoint.wal import read_log

from tests.support.shim import Shim, build
from tests.support.trainers import Pod
from tests.support.waiting import until_sync

CHECKPOINTS = {"everySteps": 40, "memory": {"everySteps": 5}}
WAIT_S = 120.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pod, Shim]]:
    """A trainer that has saved at least once, and would train for ever."""
    pod = Pod(tmp_path / "pod").configure(config={"epochs": 1_000_000}, checkpoint=CHECKPOINTS)
    pod.document["config"]["losses"] = ""
    pod.write_config()
    shim = Shim(build(tmp_path), pod.root / "checkpoints", tmp_path / "control")
    for name, value in shim.environment.items():
        monkeypatch.setenv(name, value)
    process = pod.spawn()
    for name in shim.environment:
        monkeypatch.delenv(name)
    try:
        until_sync(lambda: pod.saved_step() > 0, WAIT_S, "the first checkpoint")
        yield pod, shim
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT_S)
        assert process.returncode == 143, said[-2000:]
    finally:
        process.kill()
        process.wait()


def trains_on(pod: Pod, steps: int = 50) -> None:
    def step() -> int:
        beat = pod.heartbeat()
        return 0 if beat is None else beat.step

    goal = step() + steps
    until_sync(lambda: step() >= goal, WAIT_S, "training goes on")


def degradations(pod: Pod) -> list[tuple[bool, str]]:
    return [(d.degraded, d.reason) for d in pod.events("degradation") if d.component == "checkpoint"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([("write", errno.EIO, 0)], "CheckpointFailed"),
        ([("sync", errno.EIO, 0)], "CheckpointFailed"),
        ([("open", errno.EROFS, 0), ("name", errno.EROFS, 0), ("write", errno.EROFS, 0)], "CheckpointFailed"),
        ([("write", errno.ENOSPC, 0), ("size", errno.ENOSPC, 0)], "CheckpointVolumeFull"),
    ],
    ids=["EIO", "EIO at fsync", "read-only", "ENOSPC"],
)
def test_a_failing_volume_is_told_and_training_goes_on(
    run: tuple[Pod, Shim], faults: list[tuple[str, int, int]], reason: str
):
    pod, shim = run
    shim.inject(*faults)
    began = time.monotonic()
    until_sync(lambda: (True, reason) in degradations(pod), WAIT_S, "the condition")
    print(f"{faults}: told after {time.monotonic() - began:.2f} s")
    trains_on(pod)
    kept = pod.newest()
    assert kept.corrupt == (), "the old checkpoint is intact"
    shim.inject()
    until_sync(lambda: degradations(pod)[-1] == (False, "CheckpointSaved"), WAIT_S, "it is told that it works again")
    assert pod.newest().step > kept.step
    assert pod.counters().checkpoint_failures >= 1
    log = read_log(pod.root / "checkpoints" / pod.uid / "wal.log")
    assert log.state.checkpoint_failures == pod.counters().checkpoint_failures, "the log has made up for what it missed"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_crawling_volume_holds_nobody_up(run: tuple[Pod, Shim]):
    pod, shim = run
    shim.inject(("sync", 0, 1500))
    begun = len(pod.events("checkpoint"))
    trains_on(pod, 80)  # two cadences: a save that begins now takes longer than ten seconds
    until_sync(lambda: len(pod.events("checkpoint")) >= begun + 2, WAIT_S, "two slow saves")
    state = pod.events("checkpoint")[-1]
    assert state.last_error == ""
    assert not state.feasible
    assert any("saves are left out" in n.message for n in pod.events("notice") if n.reason == "CheckpointInfeasible")
    shim.inject()
