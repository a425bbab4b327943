"""Who owns a checkpoint directory."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from esper_runtime.checkpoint import CheckpointDirError, Volume


def volume(root: Path, run_uid: str = "uid-1", attempt: int = 1) -> Volume:
    return Volume(root, run_uid=run_uid, attempt=attempt)


def test_the_first_run_claims_and_keeps_it(tmp_path: Path):
    for attempt in (1, 1, 2):
        volume(tmp_path, attempt=attempt).claim()
    assert (tmp_path / "claimed-by").read_text() == "uid-1\n"
    assert volume(tmp_path).attempts() == [2, 1]
    assert volume(tmp_path).superseded_by() == 2
    assert volume(tmp_path, attempt=2).superseded_by() is None


def test_another_run_is_refused_with_the_owners_name(tmp_path: Path):
    volume(tmp_path).claim()
    with pytest.raises(CheckpointDirError, match=r"belongs to run uid-1 .* not to uid-2.*subPath"):
        volume(tmp_path, "uid-2").claim()
    assert not (tmp_path / "uid-2").exists()


def test_of_many_that_claim_at_once_one_wins(tmp_path: Path):
    def claim(number: int) -> bool:
        try:
            volume(tmp_path, f"uid-{number}").claim()
        except CheckpointDirError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(32)))
    assert won.count(True) == 1
    assert (tmp_path / "claimed-by").read_text() == f"uid-{won.index(True)}\n"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_missing_root_says_what_to_do(tmp_path: Path):
    with pytest.raises(CheckpointDirError, match="mount the volume there"):
        volume(tmp_path / "nowhere").claim()


def test_an_interrupted_claim_is_named(tmp_path: Path):
    (tmp_path / "claimed-by").touch()
    with pytest.raises(CheckpointDirError, match=r"claimed-by is empty.*remove the file"):
        volume(tmp_path).claim()


def test_without_hard_links_it_is_claimed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    volume(tmp_path).claim()
    with pytest.raises(CheckpointDirError, match="uid-1"):
        volume(tmp_path, "uid-2").claim()


def test_boots_only_rise(tmp_path: Path):
    first = volume(tmp_path)
    first.claim()
    assert [first.count_boot() for _ in range(3)] == [1, 2, 3]
    boots = first.attempt_dir / "boots"
    with boots.open("ab") as file:
        file.write(b"4")  # torn: the newline never came
    assert first.count_boot() == 5
    assert volume(tmp_path).count_boot() == 6
    second = volume(tmp_path, attempt=2)
    second.claim()
    assert second.count_boot() == 1


@pytest.mark.parametrize("uid", ["", "../x", ".hidden", "a/b"])
def test_a_uid_is_one_plain_name(tmp_path: Path, uid: str):
    with pytest.raises(CheckpointDirError, match="no directory name"):
        volume(tmp_path, uid)
