"""SIGKILL at any instant of a save: there is always a verified generation, and no committed one is lost."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_runtime.checkpoint import Store
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES

from tests.support.checkpoints import same_tensors, training_state
from tests.support.waiting import until_sync

KILLS = int(os.environ.get("ESPER_TEST_KILLS", "40"))
ELEMENTS = 300_000
"""3.6 MB a save: most of its time goes to writing, syncing and reading back."""


@pytest.fixture(params=[MAX_FILE_BYTES, 1_000_000], ids=["whole", "in parts"])
def saver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.saver", str(tmp_path), str(request.param)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def read_line(saver: subprocess.Popen[str]) -> list[str]:
    assert saver.stdout is not None
    return saver.stdout.readline().split()


def kill_after(saver: subprocess.Popen[str], delay_s: float) -> tuple[int, int]:
    """Starts a child, kills it `delay_s` after its restore; gives the step it restored and the last it committed."""
    assert saver.stdin is not None
    assert saver.stdout is not None
    saver.stdin.write(f"{ELEMENTS}\n")
    saver.stdin.flush()
    word, step, pid = read_line(saver)
    assert word == "restored"
    time.sleep(delay_s)  # the instant of the kill is what is drawn at random
    os.kill(int(pid), signal.SIGKILL)
    until_sync(lambda: not Path(f"/proc/{pid}").exists(), 10, "the killed saver is gone")
    os.set_blocking(saver.stdout.fileno(), False)
    try:
        said = (os.read(saver.stdout.fileno(), 65536) if ready(saver) else b"").decode().split()
    finally:
        os.set_blocking(saver.stdout.fileno(), True)
    saved = [int(number) for word, number in zip(said[::2], said[1::2], strict=True) if word == "saved"]
    return int(step), saved[-1] if saved else int(step)


def ready(saver: subprocess.Popen[str]) -> bool:
    waiting = select.poll()  # select.select knows no descriptor above 1023
    waiting.register(saver.stdout, select.POLLIN)  # type: ignore[arg-type]
    return bool(waiting.poll(0))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_save_may_be_killed_at_any_instant(tmp_path: Path, saver: subprocess.Popen[str]):
    rng = random.Random(KILLS)
    committed = inside = 0
    for _ in range(KILLS):
        restored, last = kill_after(saver, rng.uniform(0.0, 0.15))
        assert restored >= committed, "a committed generation was lost"
        inside += any(entry.name.startswith(".tmp-gen") for entry in (tmp_path / "uid-1/a00001").iterdir())
        committed = max(committed, last)
        loaded = Store(tmp_path, run_uid="uid-1", attempt=1).load_newest()
        if loaded is None:
            assert committed == 0
            continue
        assert loaded.corrupt == ()
        assert loaded.step >= committed
        assert same_tensors(loaded.tensors, training_state(loaded.step, elements=ELEMENTS).tensors)
    print(f"{KILLS} kills, {inside} of them inside a save; {committed} generations committed")
    assert inside > 0, "no kill met a save: the instants are badly chosen"
    assert committed > 0
