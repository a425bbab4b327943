"""A snapshot is valid at every instant: processes are killed while they write without pause."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from esper_runtime.tolaria.snapshot import Snapshots

from tests.support.waiting import until_sync

KILLS = 40
"""Per number of slots."""
pytestmark = pytest.mark.timeout(300)


@pytest.mark.row("T17")
@pytest.mark.parametrize("slots", [2, 3, 6])
def test_after_every_kill_a_whole_good_snapshot_is_there(tmp_path: Path, slots: int):
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.support.snapshot_writer", str(tmp_path), str(slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    generator = random.Random(4)
    newest, torn = 0, 0
    try:
        for _ in range(KILLS):
            print(newest + 1, file=writer.stdin, flush=True)
            child = int(writer.stdout.readline())
            moved = newest + generator.randint(1, 5)
            until_sync(lambda least=moved: newest_step(tmp_path) >= least, 30.0, "snapshots taken")
            spin(generator.randint(0, 3000))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            newest, whole = check(tmp_path, at_least=moved - 1)
            torn += newest > slots and whole < slots
    finally:
        writer.kill()
        writer.communicate()
    assert torn, "no kill hit a snapshot that was being written: the test proves nothing"


def newest_step(directory: Path) -> int:
    held = Snapshots(directory, identity="kill").held()
    return held[0].step if held else 0


def spin(turns: int) -> None:
    """A delay finer than a sleep, so that kills spread over a whole snapshot."""
    for _ in range(turns):
        os.getpid()


def check(directory: Path, *, at_least: int) -> tuple[int, int]:
    """(step of the newest valid snapshot, number of valid ones); everything valid is whole."""
    snapshots = Snapshots(directory, identity="kill")
    valid = []
    for held in snapshots.held():
        content = snapshots.restore(held, {})
        if content is None:
            continue
        valid.append(held)
        assert content.meta == {"n": held.step}
        assert content.blobs["rng"] == str(held.step).encode() * 50
        for tensor in content.tensors.values():
            assert torch.equal(tensor, torch.full_like(tensor, float(held.step)))
    assert valid
    assert valid[0].step >= at_least
    assert any(held.good for held in valid) or valid[0].step <= 2
    return valid[0].step, len(valid)
