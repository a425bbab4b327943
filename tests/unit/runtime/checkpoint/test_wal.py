"""The write-ahead log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from esper_leyline.v1.report_pb2 import Counters
from esper_runtime.checkpoint import Wal, WalError, WalState
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


def test_only_the_newest_times_and_positions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
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


def test_importing_it_brings_no_torch():
    code = "import sys; import esper_runtime.checkpoint.wal, esper_runtime.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
