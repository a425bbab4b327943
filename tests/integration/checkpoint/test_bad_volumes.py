"""Real full and read-only filesystems."""

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_runtime.checkpoint import CheckpointDirError, SaveError, Store, Wal, WalState
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.wal import Kind

from tests.support.checkpoints import same_tensors, training_state

ELEMENTS = 30_000
"""360 kB a save."""


def mount(directory: Path, *options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(directory)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one megabyte."""
    volume = tmp_path / "small"
    volume.mkdir()
    mount(volume, "-o", "size=1m")
    yield volume
    subprocess.run(["umount", str(volume)], check=True)


def store(root: Path, **rest: object) -> Store:
    made = Store(root, run_uid="uid-1", attempt=1, **rest)
    made.prepare()
    return made


@pytest.mark.parametrize("limit", [MAX_FILE_BYTES, 65_536])
def test_a_full_volume_keeps_what_it_has(small: Path, limit: int):
    first = store(small, max_file_bytes=limit)
    first.save(training_state(10, elements=ELEMENTS))
    ballast = small / "ballast"
    ballast.write_bytes(bytes(400_000))
    with pytest.raises(SaveError, match="No space left") as caught:
        first.save(training_state(20, elements=ELEMENTS))
    assert caught.value.errno == errno.ENOSPC
    assert [entry.name for entry in (small / "uid-1/a00001").iterdir()] == ["gen-0000000001"]
    assert first.state().last_error
    assert first.state().feasible is False
    loaded = store(small).load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, training_state(10, elements=ELEMENTS).tensors)
    ballast.unlink()
    assert first.save(training_state(30, elements=ELEMENTS)).step == 30
    assert first.state().last_error == ""


def test_a_run_can_start_again_on_a_volume_without_a_free_byte(small: Path):
    first = store(small)
    assert first.volume.count_boot() == 1
    first.save(training_state(10, elements=ELEMENTS))
    wal = Wal(first.volume.wal_file)
    wal.append(Kind.RESTART)
    fill(small)
    again = store(small)
    assert again.volume.count_boot() == 2
    loaded = again.load_newest()
    assert loaded is not None
    assert loaded.step == 10
    before = append_until_full(wal)
    assert wal.state == before
    assert before.in_place_restarts < 100
    wal.close()
    reader = Wal(first.volume.wal_file)
    assert reader.replay() == before
    assert reader.cut_bytes == 0
    reader.close()


def append_until_full(wal: Wal) -> WalState:
    """State after the last append that found room: the log's last page has some."""
    state = wal.state
    for _ in range(100):
        try:
            state = wal.append(Kind.RESTART)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
    return state


def fill(volume: Path) -> None:
    with (volume / "ballast").open("wb", buffering=0) as file:
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert os.statvfs(volume).f_bavail == 0


def test_a_read_only_volume_is_refused_with_the_reason(tmp_path: Path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mount(volume)
    try:
        store(volume).save(training_state(10))
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
        with pytest.raises(CheckpointDirError, match="read-only"):
            store(volume)
        loaded = Store(volume, run_uid="uid-1", attempt=1).load_newest()
        assert loaded is not None
        assert loaded.step == 10
    finally:
        subprocess.run(["umount", str(volume)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else_is_refused_with_the_reason(tmp_path: Path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointDirError, match="fsGroup"):
        store(tmp_path)
    tmp_path.chmod(0o755)


@pytest.fixture
def largest_file() -> Iterator[int]:
    """A file size limit of this process, as some quotas act."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_met_in_the_middle_of_a_save_leaves_nothing(tmp_path: Path, largest_file: int):
    first = store(tmp_path)
    first.save(training_state(10))
    with pytest.raises(SaveError) as caught:
        first.save(training_state(20, elements=largest_file))
    assert caught.value.errno == errno.EFBIG
    assert [entry.name for entry in (tmp_path / "uid-1/a00001").iterdir()] == ["gen-0000000001"]
    loaded = first.load_newest()
    assert loaded is not None
    assert loaded.step == 10


def test_a_state_larger_than_the_largest_file_is_saved_in_parts(tmp_path: Path, largest_file: int):
    data = training_state(10, elements=15_000)  # 120 kB of moments
    with pytest.raises(SaveError):
        store(tmp_path).save(data)
    saved = store(tmp_path, max_file_bytes=largest_file).save(data)
    assert (saved.files, saved.size_bytes > largest_file) == (5, True)
    loaded = store(tmp_path).load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, data.tensors)
