"""SIGKILL before and after every system call of a start and two saves on the volume: what is left is always sound."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_runtime.checkpoint import Store
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.transactions import Fate
from esper_runtime.checkpoint.wal import read_log

from tests.support.checkpoints import same_tensors, training_state
from tests.support.mortal import ELEMENTS, UID, start
from tests.support.shim import Shim, build

EVERY = {MAX_FILE_BYTES: int(os.environ.get("ESPER_TEST_KILL_EVERY", "1"))}
"""Every how manieth point; 1: all of them. In parts the calls are the same, only more, so each third will do."""


@pytest.fixture(params=[MAX_FILE_BYTES, 65_536], ids=["whole", "in parts"])
def limit(request: pytest.FixtureRequest) -> int:
    """Of a file; in parts, the state is in six files of tensors instead of three."""
    return int(request.param)


@pytest.fixture
def mortal(tmp_path: Path, limit: int) -> Iterator["subprocess.Popen[str]"]:
    shim = Shim(build(tmp_path), tmp_path / "volumes", tmp_path / "control")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.mortal", str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, **shim.environment},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def ask(mortal: "subprocess.Popen[str]", root: Path, point: int) -> list[str]:
    assert mortal.stdin is not None
    assert mortal.stdout is not None
    mortal.stdin.write(f"{root} {point}\n")
    mortal.stdin.flush()
    return mortal.stdout.readline().split()


def check(root: Path, point: int) -> tuple[int, str]:
    """What is on the volume is one of the allowed states; the step to go on from, and how the last save stands."""
    loaded = Store(root, run_uid=UID, attempt=1).load_newest()
    assert loaded is not None, point
    assert loaded.corrupt == (), point
    assert loaded.step in (20, 30, 40), point
    assert same_tensors(loaded.tensors, training_state(loaded.step, elements=ELEMENTS).tensors), point
    log = read_log(root / UID / "wal.log")
    transactions = log.transactions
    assert log.torn_bytes == 0, point
    assert transactions.newest is not None
    assert loaded.step >= transactions.newest.step, "what was committed is there"
    open_ = transactions.open
    if loaded.step > transactions.newest.step:
        assert open_ is not None, "what is not committed has at least begun"
        assert open_.step == loaded.step, point
    return loaded.step, "open" if open_ is not None else "ended"


def go_on(root: Path, point: int, step: int, limit: int) -> None:
    """The next start ends what was open, and saves again."""
    store, wal = start(root, keep_latest=9, limit=limit)
    assert wal.transactions.open is None, point
    assert all(each.fate in (Fate.COMMITTED, Fate.ABORTED) for each in wal.transactions.recent), point
    assert wal.transactions.newest is not None
    assert wal.transactions.newest.step == step, "what is on the volume is committed now"
    assert not list((root / UID).rglob(".tmp-*")), point
    store.save(training_state(50, elements=ELEMENTS))
    wal.close()
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 50


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.row("T17")
def test_a_kill_at_every_call_leaves_a_valid_checkpoint_and_an_honest_log(
    tmp_path: Path, mortal: "subprocess.Popen[str]", limit: int
):
    volumes = tmp_path / "volumes"
    template = volumes / "template"
    template.mkdir(parents=True)
    store, wal = start(template, limit=limit)
    for step in (10, 20):
        saved = store.save(training_state(step, elements=ELEMENTS))
    assert saved.files == (4 if limit == MAX_FILE_BYTES else 7)
    wal.close()
    shutil.copytree(template, volumes / "whole")
    word, passed = ask(mortal, volumes / "whole", 0)
    assert word == "ended"
    total = int(passed)
    seen: Counter[str] = Counter()
    every = EVERY.get(limit, 3 * EVERY[MAX_FILE_BYTES])
    for point in range(1, total + 1, every):
        root = volumes / "killed"
        shutil.copytree(template, root)
        assert ask(mortal, root, point) == ["killed"], point
        step, how = check(root, point)
        go_on(root, point, step, limit)
        shutil.rmtree(root)
        seen[f"step {step}, {how}"] += 1
    print(f"{seen.total()} kills at {total} points of a start and two saves: {dict(seen)}")
    assert total >= 200
    if every == 1:
        assert set(seen) == {f"step {step}, {how}" for step in (20, 30, 40) for how in ("open", "ended")}, seen
