"""Saves as transactions, what an interrupted one leaves to the next start, ages, suspects, and older manifests."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from esper_leyline.runconfig import ResumeFrom, Retention
from esper_runtime.checkpoint import NoValidCheckpointError, SaveError, Store, Wal
from esper_runtime.checkpoint import store as module
from esper_runtime.checkpoint.transactions import Fate, Transactions
from esper_runtime.checkpoint.wal import Kind, read_log

from tests.support.checkpoints import same_tensors, training_state

UID = "uid-1"


class Clocks:
    """A wall clock and a monotonic one."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1_700_000_000.0, 50.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def opened(root: Path, *, attempt: int = 1, clocks: Clocks | None = None, **retention: int) -> tuple[Store, Wal]:
    at = clocks or Clocks()
    store = Store(root, run_uid=UID, attempt=attempt, retention=Retention(**{"keep_best": 0, **retention}),
                  clock=lambda: at.wall, monotonic=lambda: at.monotonic)  # fmt: skip
    store.prepare()
    wal = Wal(store.volume.wal_file)
    wal.replay()
    store.keep_log(wal)
    return store, wal


def fates(transactions: Transactions) -> list[tuple[int, int, Fate]]:
    return [(each.step, each.number, each.fate) for each in transactions.recent]


def numbers(root: Path, attempt: int = 1) -> list[int]:
    return sorted(int(entry.name[4:]) for entry in (root / UID / f"a{attempt:05d}").glob("gen-*"))


@pytest.mark.row("T17")
def test_a_save_is_begun_written_and_committed_before_anything_older_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, wal = opened(tmp_path, keep_latest=1)
    store.context = {"device": "cpu", "code": "abc"}
    order: list[str] = []
    real_append, real_write, real_remove = wal.append, module.write, module.remove_tree
    monkeypatch.setattr(wal, "append", lambda kind, **f: (order.append(str(kind)), real_append(kind, **f))[1])
    monkeypatch.setattr(module, "write", lambda *a: (order.append("files"), real_write(*a))[1])
    monkeypatch.setattr(module, "remove_tree", lambda path: (order.append("delete"), real_remove(path)))
    store.save(training_state(10))
    store.save(training_state(20))
    assert order == ["begin", "files", "commit", "begin", "files", "commit", "delete"]
    assert fates(wal.transactions) == [(10, 1, Fate.COMMITTED), (20, 2, Fate.COMMITTED)]
    assert wal.transactions.recent[-1].files == 4
    assert wal.transactions.context["device"] == "cpu"
    assert wal.transactions.context["durability"] in ("o_dsync", "fsync", "unknown")
    wal.close()


def test_what_runs_is_told_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, wal = opened(tmp_path)
    told = []
    real = wal.append
    monkeypatch.setattr(wal, "append", lambda kind, **f: (told.append("context" in f), real(kind, **f))[1])
    for step in (10, 20):
        store.save(training_state(step))
    assert told == [True, False, False, False]
    wal.close()


def test_a_failed_save_is_aborted_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, wal = opened(tmp_path)
    store.save(training_state(10))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SaveError):
            store.save(training_state(20))
    assert fates(wal.transactions) == [(10, 1, Fate.COMMITTED), (20, 2, Fate.ABORTED)]
    assert "No space left" in wal.transactions.recent[-1].error
    wal.close()


def test_a_save_that_cannot_be_begun_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, wal = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(SaveError, match="Input/output") as caught:
            store.save(training_state(10))
    assert caught.value.errno == errno.EIO
    assert (numbers(tmp_path), wal.transactions.last) == ([], 0)
    wal.close()


def test_a_directory_that_cannot_be_synced_after_the_rename_takes_the_checkpoint_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, wal = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_directory", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(SaveError):
            store.save(training_state(10))
    assert numbers(tmp_path) == []
    assert fates(wal.transactions) == [(10, 1, Fate.ABORTED)]
    wal.close()


def test_without_its_commit_a_checkpoint_is_there_but_nothing_older_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, wal = opened(tmp_path, keep_latest=1)
    store.save(training_state(10))
    real = wal.append

    def refuse_commit(kind: Kind, **fields: object) -> object:
        if kind is Kind.COMMIT:
            raise OSError(5, "Input/output error")
        return real(kind, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(wal, "append", refuse_commit)
        assert store.save(training_state(20)).step == 20
    assert numbers(tmp_path) == [1, 2]
    store.save(training_state(30))
    assert fates(wal.transactions) == [(10, 1, Fate.COMMITTED), (20, 2, Fate.COMMITTED), (30, 3, Fate.COMMITTED)]
    assert numbers(tmp_path) == [3]
    wal.close()


@pytest.mark.parametrize("whole", [True, False])
def test_the_next_start_ends_what_was_interrupted(tmp_path: Path, whole: bool):
    store, wal = opened(tmp_path)
    store.save(training_state(10))
    wal.append(Kind.BEGIN, txn=2, attempt=1, number=2, step=20, epoch=2)
    wal.close()
    if whole:  # renamed, and killed before COMMIT
        other, _ = opened(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path)
        other.save(training_state(19))
        other.save(training_state(20))
        (tmp_path / "other" / UID / "a00001/gen-0000000002").rename(tmp_path / UID / "a00001/gen-0000000002")
    again, log = opened(tmp_path, attempt=2)
    fate = Fate.COMMITTED if whole else Fate.ABORTED
    assert fates(log.transactions) == [(10, 1, Fate.COMMITTED), (20, 2, fate)]
    assert log.transactions.open is None
    again.save(training_state(30))
    assert fates(log.transactions)[-1] == (30, 3 if whole else 2, Fate.COMMITTED)
    log.close()
    assert read_log(log.path).transactions.last == 3


def test_the_log_has_room_for_the_end_before_a_save_begins(tmp_path: Path):
    store, wal = opened(tmp_path)
    wal.append(Kind.RESTART)
    store.save(training_state(10))
    reserved = wal.path.stat().st_blocks * 512
    assert reserved >= 64 * 1024 > wal.path.stat().st_size
    wal.close()


# Ages


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_jump_of_the_wall_clock_ages_nothing(tmp_path: Path, jump: float):
    """Row 10 of the goals."""
    clocks = Clocks()
    store, wal = opened(tmp_path, clocks=clocks, keep_latest=9, max_age_seconds=1800)
    store.save(training_state(10))
    clocks.pass_(600)
    store.save(training_state(20))
    clocks.wall += jump
    clocks.pass_(600)
    store.save(training_state(30))
    assert numbers(tmp_path) == [1, 2, 3]
    clocks.pass_(1500)
    store.save(training_state(40))
    assert numbers(tmp_path) == [3, 4], "those that really are older go"
    wal.close()


def test_after_a_restart_ages_never_run_backwards(tmp_path: Path):
    clocks = Clocks()
    store, wal = opened(tmp_path, clocks=clocks, keep_latest=9, max_age_seconds=1800)
    store.save(training_state(10))
    wal.close()
    clocks.wall -= 7200
    clocks.monotonic = 0.0
    store, wal = opened(tmp_path, clocks=clocks, keep_latest=9, max_age_seconds=1800)
    clocks.pass_(1801)
    store.save(training_state(20))
    assert numbers(tmp_path) == [2]
    wal.close()


# What to go back to


def test_a_rollback_takes_the_newest_good_one_before_the_step(tmp_path: Path):
    store, wal = opened(tmp_path, keep_latest=9)
    for step in (10, 20, 30, 40):
        store.save(replace(training_state(step), suspect=step == 20))
    for before, found in ((99, 40), (40, 30), (30, 10), (11, 10)):
        loaded = store.load_newest(before_step=before)
        assert loaded is not None
        assert loaded.step == found
    assert store.load_newest(before_step=10) is None
    best = store.load(ResumeFrom(run_uid=UID, select="Best"), before_step=30)
    assert best.step == 10
    wal.close()


def test_a_start_takes_a_suspect_one_only_when_nothing_good_is_left(tmp_path: Path):
    store, wal = opened(tmp_path, keep_latest=9)
    store.save(training_state(10))
    store.save(replace(training_state(20), suspect=True))
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 10
    (tmp_path / UID / "a00001/gen-0000000001/state.json").write_bytes(b"{}")
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 20
    with pytest.raises(NoValidCheckpointError, match=r"state\.json"):
        store.load_newest(before_step=99)
    wal.close()


def test_a_state_that_is_not_sound_is_suspect(tmp_path: Path):
    store, wal = opened(tmp_path)
    assert store.save(replace(training_state(10), sound=lambda: False)).suspect
    assert not store.save(training_state(20)).suspect
    wal.close()


def test_checkpoints_of_the_release_before_are_read(tmp_path: Path):
    store, wal = opened(tmp_path)
    store.save(training_state(10))
    path = tmp_path / UID / "a00001/gen-0000000001/manifest.json"
    document = json.loads(path.read_text())
    for name in ("aged_at", "suspect", "durability", "txn", "context", "manifest_xxh3_128"):
        del document[name]
    document["version"] = 1

    def text(value: object) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()

    path.write_bytes(text({**document, "manifest_xxh3_128": xxhash.xxh3_128_hexdigest(text(document))}))
    loaded = store.load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, training_state(10).tensors)
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 4'))
    with pytest.raises(NoValidCheckpointError, match="has version 4"):
        store.load_newest()
    wal.close()


def test_the_manifest_says_how_it_was_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, wal = opened(tmp_path)
    flags: dict[str, int] = {}
    real = os.open

    def noting(path: object, flag: int, *rest: int, **more: int) -> int:
        flags[Path(str(path)).name] = flag
        return real(path, flag, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", noting)
    store.save(training_state(10))
    assert store.probe is not None
    manifest = json.loads((tmp_path / UID / "a00001/gen-0000000001/manifest.json").read_text())
    assert manifest["durability"] == store.probe.mode
    assert (flags["manifest.json"] & os.O_DSYNC == os.O_DSYNC) == store._disk.dsync
    assert flags["state.json"] & os.O_DSYNC != os.O_DSYNC
    wal.close()


# Feasible


def test_feasible_follows_what_the_volume_has_shown(tmp_path: Path):
    clocks = Clocks()
    store, wal = opened(tmp_path, clocks=clocks)
    assert not store.state().HasField("feasible")
    store.save(training_state(10))
    assert store.state().feasible
    store._reads.add(1, 1.0)  # a byte a second
    store.save(training_state(20))
    assert not store.state().feasible
    assert "more than rollback.fullDeadlineSeconds (12 s)" in store.obstacles["read"]
    store.deadline_s = 1e9
    store.save(training_state(30))
    assert store.state().feasible
    wal.close()
