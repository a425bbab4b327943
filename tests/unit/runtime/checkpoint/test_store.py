"""Generations on the volume."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from esper_leyline.runconfig import ResumeFrom, Retention
from esper_runtime.checkpoint import (
    CheckpointDirError,
    CheckpointError,
    GenerationData,
    NoValidCheckpointError,
    SaveError,
    Store,
    SupersededError,
)
from esper_runtime.checkpoint.files import Source

from tests.support.checkpoints import read_safetensors, same_tensors, training_state

UID = "uid-1"


def store(
    root: Path, *, attempt: int = 1, uid: str = UID, verification: str = "Checksum", **retention: int | str
) -> Store:
    made = Store(root, run_uid=uid, attempt=attempt, retention=Retention(**retention), verification=verification,
                 clock=lambda: 1_700_000_000.25)  # fmt: skip
    made.prepare()
    return made


def numbers(root: Path, attempt: int = 1) -> list[int]:
    return sorted(int(entry.name[4:]) for entry in (root / UID / f"a{attempt:05d}").glob("gen-*"))


def flip(path: Path, offset: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("verification", ["None", "Checksum", "Load"])
def test_what_was_saved_is_loaded_bit_by_bit(tmp_path: Path, verification: str):
    data = training_state(20)
    saved = store(tmp_path, verification=verification).save(data)
    assert (saved.step, saved.epoch, saved.attempt, saved.number) == (20, 2, 1, 1)
    loaded = store(tmp_path).load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, data.tensors)
    assert (loaded.step, loaded.epoch, loaded.attempt, loaded.corrupt) == (20, 2, 1, ())
    assert loaded.state == data.state
    assert loaded.metrics == data.metrics


def test_the_layout_is_the_contracts(tmp_path: Path):
    store(tmp_path).save(training_state(10))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    generation = f"{UID}/a00001/gen-0000000001"
    names = ("model.safetensors", "optimizer.safetensors", "aux.safetensors", "state.json", "manifest.json")
    assert files == {"claimed-by", *(f"{generation}/{name}" for name in names)}
    assert read_safetensors(tmp_path / generation / "model.safetensors").keys() == {"weight", "half", "steps"}


def test_loaded_tensors_are_memory_of_their_own(tmp_path: Path):
    first = store(tmp_path)
    first.save(training_state(10))
    once, twice = first.load_newest(), first.load_newest()
    assert once is not None
    assert twice is not None
    once.tensors["model"]["weight"].zero_()
    assert twice.tensors["model"]["weight"].abs().sum() > 0


def test_an_empty_volume_has_nothing_to_load(tmp_path: Path):
    assert store(tmp_path).load_newest() is None


def test_a_flipped_bit_falls_back_and_names_the_file(tmp_path: Path):
    first = store(tmp_path)
    for step in (10, 20, 30):
        first.save(training_state(step))
    flip(tmp_path / UID / "a00001/gen-0000000003/optimizer.safetensors")
    again = store(tmp_path)
    loaded = again.load_newest()
    assert loaded is not None
    assert loaded.step == 20
    assert len(loaded.corrupt) == 1
    assert loaded.corrupt[0].startswith("a00001/gen-0000000003/optimizer.safetensors: digest mismatch")
    state = again.state()
    assert list(state.corrupt_files) == list(loaded.corrupt)
    assert (state.latest_step, state.latest_verified_step, state.count) == (20, 20, 2)


def test_a_corrupt_one_goes_once_a_newer_one_is_verified(tmp_path: Path):
    first = store(tmp_path)
    for step in (10, 20):
        first.save(training_state(step))
    flip(tmp_path / UID / "a00001/gen-0000000002/model.safetensors")
    again = store(tmp_path)
    again.load_newest()
    assert numbers(tmp_path) == [1, 2]
    again.save(training_state(30))
    assert numbers(tmp_path) == [1, 3]
    assert len(again.state().corrupt_files) == 1


def test_when_none_verifies_that_is_no_fresh_start(tmp_path: Path):
    first = store(tmp_path)
    first.save(training_state(10))
    (tmp_path / UID / "a00001/gen-0000000001/manifest.json").unlink()
    with pytest.raises(NoValidCheckpointError, match=r"none of 1 .*manifest.json: missing") as caught:
        store(tmp_path).load_newest()
    assert caught.value.corrupt == ("a00001/gen-0000000001/manifest.json: missing",)


def test_the_highest_attempt_wins_then_older_ones(tmp_path: Path):
    store(tmp_path).save(training_state(50))
    second = store(tmp_path, attempt=2)
    loaded = second.load_newest()
    assert loaded is not None
    assert (loaded.step, loaded.attempt) == (50, 1)
    saved = second.save(training_state(40))
    assert (saved.attempt, saved.number) == (2, 2)
    again = second.load_newest()
    assert again is not None
    assert (again.step, again.attempt) == (40, 2)
    flip(saved.path / "model.safetensors")
    third = store(tmp_path, attempt=3).load_newest()
    assert third is not None
    assert (third.step, third.attempt) == (50, 1)


def test_a_lower_attempt_can_neither_write_nor_destroy(tmp_path: Path):
    remnant = store(tmp_path, keep_latest=1)
    remnant.save(training_state(10))
    newer = store(tmp_path, attempt=2, keep_latest=1)
    newer.save(training_state(20))
    newer.save(training_state(30))
    with pytest.raises(SupersededError, match="attempt 2 owns"):
        remnant.save(training_state(11))
    assert numbers(tmp_path, 2) == [3]
    assert store(tmp_path).state().latest_step == 30


def test_a_newer_attempt_deletes_what_older_ones_left(tmp_path: Path):
    old = store(tmp_path, keep_latest=5)
    for step in (10, 20):
        old.save(training_state(step, metrics={}))
    newer = store(tmp_path, attempt=2, keep_latest=2)
    newer.save(training_state(30, metrics={}))
    assert (numbers(tmp_path, 1), numbers(tmp_path, 2)) == ([2], [3])


def test_retention_keeps_latest_best_and_milestones(tmp_path: Path):
    first = store(tmp_path, keep_latest=2, keep_best=1, keep_every_steps=30, metric="accuracy", mode="Max")
    for step, accuracy in ((10, 0.1), (20, 0.9), (30, 0.2), (40, 0.3), (50, 0.4), (60, 0.5), (70, 0.6)):
        first.save(training_state(step, metrics={"accuracy": accuracy}))
    assert numbers(tmp_path) == [2, 3, 6, 7]
    state = first.state()
    assert (state.best_step, state.latest_step, state.latest_verified_step, state.count) == (20, 70, 70, 4)
    assert state.last_saved_time.ToMilliseconds() == 1_700_000_000_250
    assert state.total_bytes > 4 * 12_000
    assert state.feasible


def test_a_metric_that_is_no_number_is_never_best(tmp_path: Path):
    first = store(tmp_path)
    first.save(training_state(10, metrics={"loss": float("nan")}))
    assert not first.state().HasField("best_step")
    assert store(tmp_path).state().latest_step == 10


def test_remnants_of_interrupted_saves_are_removed(tmp_path: Path):
    first = store(tmp_path)
    first.save(training_state(10))
    own = tmp_path / UID / "a00001"
    for name in (".tmp-gen-0000000002", ".tmp-deleted-gen-0000000000"):
        shutil.copytree(own / "gen-0000000001", own / name)
    store(tmp_path)
    assert [entry.name for entry in own.iterdir()] == ["gen-0000000001"]


def test_a_newer_attempts_draft_is_not_touched(tmp_path: Path):
    store(tmp_path, attempt=2)
    draft = tmp_path / UID / "a00002/.tmp-gen-0000000001"
    draft.mkdir()
    store(tmp_path)
    assert draft.exists()


def test_a_moved_generation_is_not_believed(tmp_path: Path):
    first = store(tmp_path)
    for step in (10, 20):
        first.save(training_state(step))
    own = tmp_path / UID / "a00001"
    (own / "gen-0000000001").rename(own / "gen-0000000009")
    loaded = store(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.step == 20
    assert "moved or copied here" in loaded.corrupt[0]


def test_another_runs_generation_is_not_believed(tmp_path: Path):
    first = store(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path, uid="other")
    first.save(training_state(10))
    (tmp_path / "b").mkdir()
    mine = store(tmp_path / "b")
    shutil.copytree(tmp_path / "a/other/a00001/gen-0000000001", tmp_path / "b" / UID / "a00001/gen-0000000001")
    with pytest.raises(NoValidCheckpointError, match="belongs to run other"):
        mine.load_newest()


def resume_root(tmp_path: Path) -> Path:
    """A volume with another run's checkpoints, claimed by this run."""
    source = store(tmp_path, uid="old", keep_latest=9)
    for step, loss in ((10, 0.3), (20, 0.1), (30, 0.2)):
        source.save(training_state(step, metrics={"loss": loss}))
    (tmp_path / "claimed-by").write_text(f"{UID}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("choice", "step"), [({}, 30), ({"step": 10}, 10), ({"select": "Best"}, 20), ({"select": "LatestVerified"}, 30)]
)
def test_resume_from_another_run(tmp_path: Path, choice: dict[str, object], step: int):
    loaded = store(resume_root(tmp_path)).load_newest(ResumeFrom(run_uid="old", **choice))
    assert loaded is not None
    assert loaded.step == step
    assert same_tensors(loaded.tensors, training_state(step).tensors)


def test_resume_never_writes_to_its_source(tmp_path: Path):
    root = resume_root(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (root / "old").rglob("*")}
    mine = store(root, keep_latest=1)
    mine.load_newest(ResumeFrom(run_uid="old"))
    mine.save(training_state(40))
    assert {path: path.stat().st_mtime_ns for path in (root / "old").rglob("*")} == before


def test_own_checkpoints_come_before_resume_from(tmp_path: Path):
    mine = store(resume_root(tmp_path))
    mine.save(training_state(5))
    loaded = mine.load_newest(ResumeFrom(run_uid="old"))
    assert loaded is not None
    assert loaded.step == 5


def test_resume_from_what_is_not_there_says_so(tmp_path: Path):
    mine = store(resume_root(tmp_path))
    with pytest.raises(NoValidCheckpointError, match=r"resumeFrom: run old has no valid checkpoint at step 11"):
        mine.load_newest(ResumeFrom(run_uid="old", step=11))
    with pytest.raises(NoValidCheckpointError, match="run nobody"):
        mine.load_newest(ResumeFrom(run_uid="nobody"))


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = store(tmp_path)
    first.save(training_state(10))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SaveError, match=r"step 20 was not saved: .*No space left") as caught:
            first.save(training_state(20))
    assert caught.value.errno == 28
    assert [entry.name for entry in (tmp_path / UID / "a00001").iterdir()] == ["gen-0000000001"]
    state = first.state()
    assert "step 20" in state.last_error
    assert not state.feasible
    assert state.latest_verified_step == 10
    first.save(training_state(30))
    assert first.state().last_error == ""


def test_bytes_that_read_back_wrong_are_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from esper_runtime.checkpoint import generation

    first = store(tmp_path)
    first.save(training_state(10))
    real = generation.digest_files

    def rotten(sources: Sequence[Source], **rest: object) -> object:
        for source in sources:
            if source.path.name == "optimizer.safetensors":
                flip(source.path)
        return real(sources, **rest)

    monkeypatch.setattr(generation, "digest_files", rotten)
    with pytest.raises(SaveError, match=r"read back wrong: .*optimizer.safetensors: digest mismatch"):
        first.save(training_state(20))
    assert numbers(tmp_path) == [1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GenerationData(epoch=0, step=1, tensors={"../x": {}}), "file stem"),
        (GenerationData(epoch=0, step=1, tensors={"model": {"w": torch.ones(1, dtype=torch.complex128)}}), "tensor w"),
        (GenerationData(epoch=0, step=1, tensors={}, state={"ewma": float("nan")}), "state is not JSON"),
        (GenerationData(epoch=0, step=1, tensors={}, state={"x": object()}), "state is not JSON"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, data: GenerationData, words: str):
    first = store(tmp_path)
    with pytest.raises(SaveError, match=words):
        first.save(data)
    assert numbers(tmp_path) == []


def test_unknown_verification_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="known are None, Checksum, Load"):
        Store(tmp_path, run_uid=UID, attempt=1, verification="Hope")


def test_a_foreign_volume_is_refused(tmp_path: Path):
    store(tmp_path)
    with pytest.raises(CheckpointDirError, match=UID):
        store(tmp_path, uid="uid-2")


def test_export_is_whole_and_replaced_whole(tmp_path: Path):
    first = store(tmp_path)
    for value in (1.0, 2.0):
        path = first.export({"w": torch.full((3,), value)}, {"accuracy": value})
        assert path == tmp_path / UID / "export"
        assert sorted(entry.name for entry in path.iterdir()) == ["model.json", "model.safetensors"]
        assert f'"accuracy": {value}' in (path / "model.json").read_text()
        raw = read_safetensors(path / "model.safetensors")["w"][2]
        assert raw.view("<f4").tolist() == [value] * 3
    assert sorted(entry.name for entry in (tmp_path / UID).iterdir()) == ["a00001", "export"]


@pytest.mark.row("T17")
def test_one_save_is_one_manifest_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file once, the directory, its parent: nothing is synced twice."""
    first = store(tmp_path)
    calls = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (calls.append(os.readlink(f"/proc/self/fd/{descriptor}")), real(descriptor))
    )
    first.save(training_state(10))
    names = [Path(call).name for call in calls]
    assert names == [
        "model.safetensors", "optimizer.safetensors", "aux.safetensors", "state.json", "manifest.json",
        ".tmp-gen-0000000001", "a00001",
    ]  # fmt: skip


def test_a_model_that_no_file_can_hold_is_a_failed_export_that_leaves_the_earlier_one(tmp_path: Path):
    first = store(tmp_path)
    first.export({"w": torch.ones(3)}, {})
    with pytest.raises(SaveError, match=r"the model was not exported: .*complex128"):
        first.export({"w": torch.ones(3, dtype=torch.complex128)}, {})
    assert sorted(entry.name for entry in (tmp_path / UID).iterdir()) == ["a00001", "export"]
