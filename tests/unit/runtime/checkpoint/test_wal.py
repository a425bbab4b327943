"""The write-ahead log."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from esper_leyline.v1.report_pb2 import Counters
from esper_runtime.checkpoint import Wal, WalError, WalState, walstate
from esper_runtime.checkpoint import wal as module
from esper_runtime.checkpoint.wal import Kind


def filled(path: Path) -> WalState:
    wal = Wal(path, clock=lambda: 1000.0, monotonic_ns=lambda: 7)
    wal.append("rollback", cause="NonFiniteLoss", from_step=12, to_step=10, time=1000.5)
    wal.append(Kind.SKIP, positions=[11, 12])
    wal.append(Kind.FAULT, key="NonFiniteLoss@12")
    wal.append(Kind.LEARNING_RATE, scale=0.5)
    wal.append(Kind.RESTART, cause="TrainerKilled", step=12)
    wal.append(Kind.CHECKPOINT_FAILURE, step=20, error="no space")
    wal.append(Kind.REJECTED_COMMAND, reason="stale_command")
    state = wal.append(Kind.REJECTED_SIGNAL, reason="replayed")
    wal.close()
    return state


def test_what_was_appended_is_replayed(tmp_path: Path):
    written = filled(tmp_path / "wal.log")
    wal = Wal(tmp_path / "wal.log")
    assert wal.replay() == written
    assert wal.cut_bytes == 0
    assert written == WalState(
        rollbacks=1, in_place_restarts=1, skipped_batches=2, checkpoint_failures=1, rejected_commands=1,
        rejected_signals=1, fired_faults=frozenset({"NonFiniteLoss@12"}), learning_rate_scale=0.5,
        rollback_times=(1000.5,), skipped_positions=(11, 12),
    )  # fmt: skip
    assert written.counters() == Counters(
        rollbacks=1,
        in_place_restarts=1,
        skipped_batches=2,
        checkpoint_failures=1,
        rejected_commands=1,
        rejected_signals=1,
    )
    wal.close()


def test_one_commit_is_one_write_and_one_fdatasync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wal = Wal(tmp_path / "wal.log")
    wal.replay()
    calls: list[str] = []
    for name in ("pwrite", "write", "fsync", "fdatasync", "ftruncate"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _real=real, _name=name: (calls.append(_name), _real(*args))[1])
    for _ in range(10):
        wal.append(Kind.RESTART)
    assert calls == ["pwrite", "fdatasync"] * 10
    wal.close()


def test_an_empty_log_is_no_state(tmp_path: Path):
    wal = Wal(tmp_path / "wal.log")
    assert wal.replay() == WalState()
    wal.close()


def test_a_failed_append_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = filled(tmp_path / "wal.log")
    size = (tmp_path / "wal.log").stat().st_size
    wal = Wal(tmp_path / "wal.log")
    wal.replay()
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            wal.append(Kind.RESTART)
    assert (tmp_path / "wal.log").stat().st_size == size
    assert os.pwrite is real
    assert wal.state == written
    assert wal.append(Kind.RESTART).in_place_restarts == 2
    assert Wal(tmp_path / "wal.log").replay().in_place_restarts == 2
    wal.close()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("rollback", {}), ("skip", {"positions": 3}), ("learning_rate", {"scale": "x"}), ("fault", {})],
)
def test_a_record_without_its_fields_is_refused(tmp_path: Path, kind: str, fields: dict[str, object]):
    wal = Wal(tmp_path / "wal.log")
    with pytest.raises(WalError, match=kind):
        wal.append(kind, **fields)
    assert wal.state == WalState()
    wal.close()


def test_an_unknown_kind_is_refused(tmp_path: Path):
    wal = Wal(tmp_path / "wal.log")
    with pytest.raises(ValueError, match="party"):
        wal.append("party")
    wal.close()


def test_a_long_log_is_replaced_by_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = filled(tmp_path / "wal.log")
    monkeypatch.setattr(module, "COMPACT_BYTES", 1024)
    wal = Wal(tmp_path / "wal.log")
    assert wal.replay() == written
    assert (tmp_path / "wal.log").stat().st_size < 1024
    wal.append(Kind.RESTART)
    wal.close()
    again = Wal(tmp_path / "wal.log")
    assert again.replay() == written.after(Kind.RESTART, {})
    again.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["wal.log"]


def test_a_log_that_grows_long_is_replaced_by_its_state_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "COMPACT_BYTES", 4096)
    path = tmp_path / "wal.log"
    wal, sizes = Wal(path), []
    for _ in range(100):
        state = wal.append(Kind.RESTART)
        sizes.append(path.stat().st_size)
    wal.close()
    assert max(sizes) < 4096 + 1024
    assert state.in_place_restarts == 100
    again = Wal(path)
    assert again.replay() == state
    again.close()


def test_a_long_log_that_cannot_be_replaced_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "COMPACT_BYTES", 1024)
    wal = Wal(tmp_path / "wal.log")
    refusals = 0

    def refuse(*_: object) -> None:
        nonlocal refusals
        refusals += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    for _ in range(20):
        state = wal.append(Kind.RESTART)
    assert 1 <= refusals <= 6, "not at every append"
    assert [entry.name for entry in tmp_path.iterdir()] == ["wal.log"]
    monkeypatch.undo()
    wal.close()
    again = Wal(tmp_path / "wal.log")
    assert again.replay() == state
    assert state.in_place_restarts == 20
    again.close()


def test_a_new_name_that_is_not_on_the_disk_fails_the_append_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the rename only: until the directory is synced, a crash would bring the old log back."""
    monkeypatch.setattr(module, "COMPACT_BYTES", 1024)
    wal = Wal(tmp_path / "wal.log")
    while (tmp_path / "wal.log").stat().st_size <= 1024 if (tmp_path / "wal.log").exists() else True:
        wal.append(Kind.RESTART)
    known = wal.state

    def refuse(_: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(module, "sync_directory", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                wal.append(Kind.RESTART)
    assert wal.state == known
    state = wal.append(Kind.RESTART)
    assert state.in_place_restarts == known.in_place_restarts + 1
    wal.close()
    again = Wal(tmp_path / "wal.log")
    assert again.replay() == state
    again.close()


@pytest.mark.parametrize("portion", [1, 100, 257])
def test_a_log_that_is_read_in_portions_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portion: int):
    written = filled(tmp_path / "wal.log")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, min(size, portion), at))
    wal = Wal(tmp_path / "wal.log")
    assert wal.replay() == written
    assert wal.cut_bytes == 0
    wal.close()


def test_a_volume_that_withholds_the_end_of_the_log_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path / "wal.log")
    before = (tmp_path / "wal.log").read_bytes()
    pread = os.pread
    with monkeypatch.context() as broken:
        broken.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, max(0, min(size, 600 - at)), at))
        with pytest.raises(OSError, match=f"only 600 of {len(before)} bytes can be read"):
            Wal(tmp_path / "wal.log").replay()
    assert (tmp_path / "wal.log").read_bytes() == before


def test_only_the_newest_times_and_positions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(walstate, "MAX_REMEMBERED", 3)
    wal = Wal(tmp_path / "wal.log")
    for time in range(5):
        wal.append(Kind.ROLLBACK, cause="x", time=time)
    state = wal.append(Kind.SKIP, positions=[1, 2, 3, 4])
    assert state.rollback_times == (2.0, 3.0, 4.0)
    assert state.skipped_positions == (2, 3, 4)
    assert (state.rollbacks, state.skipped_batches) == (5, 4)
    wal.close()


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path):
    wal = Wal(tmp_path / "wal.log")
    wal.append(Kind.RESTART)
    code = "import sys, pathlib; from esper_runtime.checkpoint import Wal; Wal(pathlib.Path(sys.argv[1])).replay()"
    command = [sys.executable, "-c", code, str(tmp_path / "wal.log")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "is being written by another process" in refused.stderr
    wal.close()
    assert subprocess.run(command, check=False).returncode == 0


def test_what_is_cut_off_is_kept_beside(tmp_path: Path):
    filled(tmp_path / "wal.log")
    with (tmp_path / "wal.log").open("ab") as file:
        file.write(b"torn")
    wal = Wal(tmp_path / "wal.log")
    wal.replay()
    assert wal.cut_bytes == 4
    assert (tmp_path / "wal.log.cut").read_bytes() == b"torn"
    wal.close()


def test_a_long_log_is_still_locked_after_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path / "wal.log")
    monkeypatch.setattr(module, "COMPACT_BYTES", 1024)
    wal = Wal(tmp_path / "wal.log")
    wal.replay()
    code = "import sys, pathlib; from esper_runtime.checkpoint import Wal; Wal(pathlib.Path(sys.argv[1])).replay()"
    refused = subprocess.run([sys.executable, "-c", code, str(wal.path)], capture_output=True, text=True)
    assert "is being written by another process" in refused.stderr
    wal.close()


@pytest.mark.skipif(shutil.which("strace") is None, reason="counts system calls with strace, which is not here")
def test_the_kernel_sees_one_write_and_one_fdatasync_per_append(tmp_path: Path):
    """P8, counted outside the process."""
    code = (
        "import sys, pathlib; from esper_runtime.checkpoint import Wal; wal = Wal(pathlib.Path(sys.argv[1])); "
        "wal.replay(); [wal.append('restart') for _ in range(20)]; wal.close()"
    )
    traced = ["strace", "-f", "-o", str(tmp_path / "calls"), "-e", "trace=fdatasync,fsync,pwrite64,ftruncate,sync"]
    done = subprocess.run([*traced, sys.executable, "-c", code, str(tmp_path / "wal.log")], capture_output=True)
    if b"ptrace" in done.stderr.lower():
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr
    calls = re.findall(r"^\d+ +(\w+)\(", (tmp_path / "calls").read_text(), re.M)
    assert calls == ["fsync", *["pwrite64", "fdatasync"] * 20], "fsync: of the directory that got the new file"


class Syncs:
    """fdatasync as a disk that answers when it is told to, and each thread as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = {name: threading.Event() for name in ("one", "two")}
        self.go = {name: threading.Event() for name in ("one", "two")}
        self.errors: dict[str, OSError] = {}
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        name = threading.current_thread().name
        if name in self.go:
            self.begun[name].set()
            assert self.go[name].wait(30)
            if name in self.errors:
                raise self.errors[name]
        self._real(descriptor)


def append_beside(wal: Wal, name: str, outcomes: dict[str, object]) -> threading.Thread:
    def append() -> None:
        try:
            outcomes[name] = wal.append(Kind.FAULT, key=name)
        except OSError as error:
            outcomes[name] = error

    thread = threading.Thread(target=append, name=name)
    thread.start()
    return thread


def test_two_threads_sync_at_the_same_time_and_each_answers_for_what_lies_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wal = Wal(tmp_path / "wal.log")
    wal.replay()
    syncs, outcomes = Syncs(monkeypatch), {}
    one = append_beside(wal, "one", outcomes)
    assert syncs.begun["one"].wait(30)
    two = append_beside(wal, "two", outcomes)
    assert syncs.begun["two"].wait(30), "the second waits for the disk, not for the first"
    syncs.go["two"].set()
    two.join(0.05)
    assert "two" not in outcomes, "its record lies behind one whose sync may still fail"
    syncs.go["one"].set()
    one.join(30)
    two.join(30)
    assert isinstance(outcomes["two"], WalState)
    assert outcomes["two"].fired_faults == {"one", "two"}
    wal.close()
    assert Wal(wal.path).replay() == outcomes["two"]


@pytest.mark.parametrize("failing", ["one", "two"])
def test_when_the_sync_of_one_thread_fails_neither_record_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    wal = Wal(tmp_path / "wal.log")
    before = wal.append(Kind.RESTART)
    size = wal.path.stat().st_size
    syncs, outcomes = Syncs(monkeypatch), {}
    syncs.errors[failing] = OSError(5, "Input/output error")
    threads = [append_beside(wal, "one", outcomes)]
    assert syncs.begun["one"].wait(30)
    threads.append(append_beside(wal, "two", outcomes))
    assert syncs.begun["two"].wait(30)
    for name, thread in zip(("two", "one"), reversed(threads), strict=True):
        syncs.go[name].set()
        thread.join(0.05)
    for thread in threads:
        thread.join(30)
    assert all(isinstance(outcome, OSError) for outcome in outcomes.values())
    assert wal.state == before
    assert wal.path.stat().st_size == size
    after = wal.append(Kind.RESTART)
    assert after.in_place_restarts == 2
    wal.close()
    reader = Wal(wal.path)
    assert reader.replay() == after
    assert reader.cut_bytes == 0
    reader.close()


def test_nothing_is_lost_between_threads(tmp_path: Path):
    wal = Wal(tmp_path / "wal.log")
    threads = [
        threading.Thread(target=lambda n=n: [wal.append(Kind.FAULT, key=f"{n}.{i}") for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(wal.state.fired_faults) == 200
    wal.close()
    assert Wal(wal.path).replay() == wal.state


def test_importing_it_brings_no_torch():
    code = "import sys; import esper_runtime.checkpoint.wal, esper_runtime.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
