"""Generations whose groups are in several files: every promise of one file holds for all of them."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.phases import RestoreOutcome
from esper_leyline.runconfig import Checkpoint, Retention
from esper_runtime.checkpoint import GenerationData, NoValidCheckpointError, SaveError, Store, Wal, Writer, manifest
from esper_runtime.checkpoint.files import Source
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.cli.export import verify as verify_export
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.facts import Facts

from tests.support.checkpoints import SPLIT_FILES, TINY, read_safetensors, same_tensors, training_state

UID = "uid-1"
NEWEST = f"{UID}/a00001/gen-0000000002"
MODEL = SPLIT_FILES[:3]


def store(root: Path, *, limit: int = TINY, verification: str = "Checksum", keep_latest: int = 9) -> Store:
    made = Store(root, run_uid=UID, attempt=1, retention=Retention(keep_latest=keep_latest), verification=verification,
                 max_file_bytes=limit)  # fmt: skip
    made.prepare()
    return made


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Generations of steps 10 and 20."""
    first = store(tmp_path)
    for step in (10, 20):
        first.save(training_state(step))
    return tmp_path


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.mark.parametrize("verification", ["None", "Checksum", "Load"])
def test_what_was_saved_is_loaded_bit_by_bit(tmp_path: Path, verification: str):
    data = training_state(20)
    saved = store(tmp_path, verification=verification).save(data)
    assert names(saved.path) == sorted(SPLIT_FILES)
    loaded = store(tmp_path).load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, data.tensors)
    assert (loaded.state, loaded.corrupt) == (data.state, ())


def test_each_part_is_a_file_that_any_reader_opens(volume: Path):
    found = [read_safetensors(volume / NEWEST / name) for name in MODEL]
    assert [list(part) for part in found] == [["steps"], ["weight"], ["half"]]
    weight = training_state(20).tensors["model"]["weight"]
    assert found[1]["weight"][2].tobytes() == weight.numpy().tobytes()


def test_the_manifest_has_a_version_of_its_own_only_where_something_is_split(tmp_path: Path):
    first = store(tmp_path)
    whole = store(tmp_path, limit=MAX_FILE_BYTES)
    versions = [json.loads((s.save(training_state(n)).path / manifest.NAME).read_text())["version"]
                for n, s in ((1, first), (2, whole))]  # fmt: skip
    assert versions == [3, 2], "a runtime that does not know parts must not take them for groups"
    one = GenerationData(epoch=0, step=3, tensors={"model": {"w": torch.ones(9 * TINY)}})
    assert json.loads((first.save(one).path / manifest.NAME).read_text())["version"] == 2


def test_both_layouts_may_lie_on_one_volume(tmp_path: Path):
    for step, limit in ((10, TINY), (20, MAX_FILE_BYTES), (30, TINY)):
        store(tmp_path, limit=limit).save(training_state(step))
    for number, step in ((3, 30), (2, 20), (1, 10)):
        loaded = store(tmp_path).load_newest()
        assert loaded is not None
        assert (loaded.step, same_tensors(loaded.tensors, training_state(step).tensors)) == (step, True)
        shutil.rmtree(tmp_path / UID / f"a00001/gen-{number:010d}")


def swap(directory: Path) -> None:
    one, other = (directory / name for name in SPLIT_FILES[3:5])
    assert one.stat().st_size == other.stat().st_size, "only the digests can tell"
    one.rename(directory / "aside")
    other.rename(one)
    (directory / "aside").rename(other)


def spoil_last(directory: Path) -> None:
    raw = bytearray((directory / MODEL[2]).read_bytes())
    raw[-1] ^= 1
    (directory / MODEL[2]).write_bytes(raw)


DAMAGES: list[tuple[Callable[[Path], Any], str, str]] = [
    (lambda d: (d / MODEL[1]).unlink(), MODEL[1], "missing"),
    (lambda d: shutil.copy(d / MODEL[0], d / "model-00004-of-00003.safetensors"), "model-00004-of-00003.safetensors",
     "not in the manifest"),
    (lambda d: shutil.copy(d / MODEL[0], d / "model.safetensors"), "model.safetensors", "not in the manifest"),
    (swap, SPLIT_FILES[3], "digest mismatch"),
    (spoil_last, MODEL[2], "digest mismatch"),
    (lambda d: os.truncate(d / MODEL[1], 4100), MODEL[1], "has 4100 bytes instead of"),
    (lambda d: shutil.copy(d.with_name("gen-0000000001") / MODEL[1], d / MODEL[1]), MODEL[1], "digest mismatch"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_parts_that_are_not_all_right_are_named_and_nothing_of_them_is_used(
    volume: Path, damage: Callable[[Path], Any], name: str, words: str
):
    damage(volume / NEWEST)
    again = store(volume)
    loaded = again.load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, training_state(10).tensors)
    assert len(loaded.corrupt) == 1
    assert loaded.corrupt[0].startswith(f"a00001/gen-0000000002/{name}: {words}")
    assert list(again.state().corrupt_files) == list(loaded.corrupt)


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_where_no_other_is_left_that_is_a_failure_of_integrity(
    volume: Path, damage: Callable[[Path], Any], name: str, words: str
):
    damage(volume / NEWEST)
    shutil.rmtree(volume / UID / "a00001/gen-0000000001")
    kept = Store(volume, run_uid=UID, attempt=1)
    with pytest.raises(NoValidCheckpointError, match=f"{name}: {words}"):
        kept.load_newest()
    facts = Facts(Wal(volume / "wal.log"), run_seconds=lambda: 0.0)
    events: Any = None
    checkpoints = Checkpoints(kept, Writer(kept), config=Checkpoint(), facts=facts, events=events, beat=lambda: None)
    assert checkpoints.load_newest() == (RestoreOutcome.INTEGRITY_FAILED, None)
    checkpoints.close(10.0)


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """As a writer with an error of its own would leave it: whole, but not true."""
    found = manifest.read(directory, run_uid=UID, attempt=1, where="")
    files = dict(found.files)
    change(files)
    object.__setattr__(found, "files", files)
    (directory / manifest.NAME).write_bytes(found.render())


def test_a_manifest_that_lists_not_all_parts_is_not_believed(volume: Path):
    rewrite_manifest(volume / NEWEST, lambda files: files.pop(MODEL[1]))
    loaded = store(volume).load_newest()
    assert loaded is not None
    assert loaded.corrupt == (
        f"a00001/gen-0000000002/{MODEL[1]}: not in the manifest, which has 2 other parts of model",
    )


def test_a_tensor_in_two_parts_is_refused(volume: Path):
    shutil.copy(volume / NEWEST / MODEL[0], volume / NEWEST / MODEL[1])
    rewrite_manifest(volume / NEWEST, lambda files: files.update({MODEL[1]: files[MODEL[0]]}))
    loaded = store(volume).load_newest()
    assert loaded is not None
    assert loaded.corrupt == (
        f"a00001/gen-0000000002/{MODEL[1]}: tensor steps is in another file of the group too",
    )  # fmt: skip


@pytest.mark.parametrize("copied", [False, True])
def test_every_file_is_synced_once_and_all_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
):
    first = store(tmp_path)
    data = training_state(10)
    if copied:
        tensors, _ = HostCopies(limit=TINY).take(data.tensors)
        data = GenerationData(epoch=1, step=10, tensors=tensors, state=data.state, metrics=data.metrics)
    calls = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (calls.append(os.readlink(f"/proc/self/fd/{descriptor}")), real(descriptor))
    )
    first.save(data)
    assert [Path(call).name for call in calls] == [*SPLIT_FILES, ".tmp-gen-0000000001", "a00001"]


@pytest.mark.parametrize("file", SPLIT_FILES)
def test_a_write_that_fails_at_any_part_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    first = store(tmp_path)
    first.save(training_state(10))
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == file:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            first.save(training_state(20))
    assert names(tmp_path / UID / "a00001") == ["gen-0000000001"]
    loaded = first.load_newest()
    assert loaded is not None
    assert loaded.step == 10


def test_a_part_that_reads_back_wrong_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from esper_runtime.checkpoint import generation

    first = store(tmp_path)
    real = generation.digest_files

    def rotten(sources: Sequence[Source], **rest: Any) -> object:
        spoil_last(sources[0].path.parent)
        return real(sources, **rest)

    monkeypatch.setattr(generation, "digest_files", rotten)
    with pytest.raises(SaveError, match=f"read back wrong: .*{MODEL[2]}: digest mismatch"):
        first.save(training_state(10))
    assert names(tmp_path / UID / "a00001") == []


def test_retention_counts_and_deletes_all_parts(tmp_path: Path):
    first = store(tmp_path, keep_latest=1)
    for step in (10, 20, 30):
        saved = first.save(training_state(step, metrics={}))
    assert names(tmp_path / UID / "a00001") == ["gen-0000000003"]
    on_disk = sum(path.stat().st_size for path in saved.path.iterdir() if path.name != manifest.NAME)
    assert (saved.size_bytes, saved.files) == (on_disk, len(SPLIT_FILES) - 1)
    state = first.state()
    assert (state.count, state.total_bytes, state.feasible) == (1, on_disk, True)


def test_the_volume_is_judged_by_the_bytes_of_all_parts(tmp_path: Path):
    first = store(tmp_path)
    saved = first.save(training_state(10))
    assert first.obstacles == {}
    first.deadline_s = 1e-9
    first.save(training_state(20))
    assert f"would read {saved.size_bytes / 2**20:.1f} MiB" in first.obstacles["read"]


def test_a_draft_of_parts_is_removed_by_the_next_start(volume: Path):
    own = volume / UID / "a00001"
    shutil.copytree(volume / NEWEST, own / ".tmp-gen-0000000003")
    (own / ".tmp-gen-0000000003/manifest.json").unlink()
    store(volume)
    assert names(own) == ["gen-0000000001", "gen-0000000002"]


# Export


def test_a_large_model_is_exported_in_parts_with_an_index(tmp_path: Path):
    tensors = dict(training_state(10).tensors["model"])
    path = store(tmp_path).export(tensors, {"step": 10})
    assert names(path) == [*MODEL, "model.json", "model.safetensors.index.json"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {"steps": MODEL[0], "weight": MODEL[1], "half": MODEL[2]}
    for name, file in index["weight_map"].items():
        raw = tensors[name].view(-1).view(torch.uint8).numpy().tobytes()
        assert read_safetensors(path / file)[name][2].tobytes() == raw
    description = json.loads((path / "model.json").read_text())
    assert (description["file"], sorted(description["files"])) == ("model.safetensors.index.json", [*MODEL])
    verify_export(path)


def test_an_export_in_one_file_replaces_one_in_parts(tmp_path: Path):
    tensors = dict(training_state(10).tensors["model"])
    store(tmp_path).export(tensors, {})
    path = store(tmp_path, limit=MAX_FILE_BYTES).export(tensors, {})
    assert names(path) == ["model.json", "model.safetensors"]
