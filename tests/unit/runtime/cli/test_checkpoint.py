"""`esper checkpoint` on a directory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint import Store, Wal
from esper_runtime.cli.export import verify as verify_export
from esper_runtime.cli.main import app, guarded

from tests.support.checkpoints import SPLIT_FILES, TINY, read_safetensors, training_state

UID = "uid-1"


@pytest.fixture
def esper(capsys):
    """Runs `esper checkpoint ...`; (exit code, stdout, stderr)."""

    def call(*words):
        try:
            code = guarded(lambda: app(["checkpoint", *map(str, words)], standalone_mode=False))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Steps 10, 20 and 30, of which 20 has the least loss; 30 is suspect."""
    store = Store(tmp_path / "volume", run_uid=UID, attempt=1, retention=Retention(keep_latest=9))
    store.volume.root.mkdir()
    store.prepare()
    wal = Wal(store.volume.wal_file)
    wal.replay()
    store.keep_log(wal)
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3)):
        data = training_state(step, metrics={"loss": loss})
        object.__setattr__(data, "suspect", step == 30)
        store.save(data)
    wal.close()
    return tmp_path / "volume"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Steps 10 and 20, in parts."""
    root = tmp_path / "split"
    root.mkdir()
    store = Store(root, run_uid=UID, attempt=1, max_file_bytes=TINY)
    store.prepare()
    for step in (10, 20):
        store.save(training_state(step))
    return root


def generation(volume: Path, number: int) -> Path:
    return volume / UID / "a00001" / f"gen-{number:010d}"


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("below", ["", UID])
def test_ls_tells_each_checkpoint_newest_first(esper, volume: Path, below: str):
    code, out, _ = esper("ls", volume / below)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["STEP", "EPOCH", "GENERATION", "SIZE", "AGE", "SAVED", "STATE", "METRICS"]
    assert [line.split()[0] for line in lines[1:]] == ["30", "20", "10"]
    assert [("suspect" in line, "good" in line) for line in lines[1:]] == [(True, False), (False, True), (False, True)]
    assert "loss 0.1" in lines[2]
    assert "Checksum" in lines[2]


def test_ls_shows_what_sizes_and_manifests_give_away(esper, volume: Path):
    (generation(volume, 1) / "aux.safetensors").write_bytes(b"")
    (generation(volume, 2) / "manifest.json").unlink()
    rows = json.loads(esper("ls", volume, "-o", "json")[1])
    assert [row["state"] for row in rows] == ["suspect", "corrupt", "corrupt"]
    assert rows[1]["problem"].endswith("manifest.json: missing")
    assert rows[2]["problem"].startswith("aux.safetensors: has 0 bytes")


def test_verify_reads_every_byte_and_names_the_file(esper, volume: Path):
    code, out, _ = esper("verify", volume)
    assert (code, out.count("good ")) == (0, 3)
    flip(generation(volume, 2) / "optimizer.safetensors")
    code, out, err = esper("verify", volume)
    assert code == 1
    assert "corrupt  a00001/gen-0000000002/optimizer.safetensors: digest mismatch" in out
    assert out.count("good ") == 2
    assert "1 of 3 checkpoints are damaged" in err
    assert esper("verify", volume, "--step", 10)[0] == 0


def test_show_has_the_manifest_and_the_transactions(esper, volume: Path):
    code, out, _ = esper("show", volume, "-o", "json")
    assert code == 0
    shown = json.loads(out)
    assert shown["checkpoint"]["step"] == 20, "the newest good one"
    assert shown["checkpoint"]["durability"] in ("o_dsync", "fsync", "unknown")
    log = shown["log"]
    assert (log["records"], log["tornBytes"]) == (6, 0)
    assert [(t["step"], t["fate"]) for t in log["transactions"]["recent"]] == [
        (10, "committed"), (20, "committed"), (30, "committed"),
    ]  # fmt: skip
    assert log["transactions"]["open"] is False
    assert esper("show", volume, "--step", 30)[1].startswith("checkpoint:")


def test_show_says_when_a_copy_has_no_log(esper, volume: Path):
    (volume / UID / "wal.log").unlink()
    assert "the copy has only checkpoints" in esper("show", volume, "-o", "json")[1]


@pytest.mark.parametrize(
    ("words", "step"),
    [((), 20), (("--step", "10"), 10), (("--best",), 20), (("--best", "--highest"), 10), (("--step", "30"), 30)],
)
def test_export_copies_the_model_of_the_chosen_one(esper, volume: Path, tmp_path: Path, words, step: int):
    out = tmp_path / "out"
    code, said, _ = esper("export", volume, out, *words)
    assert code == 0
    assert said.split() == [str(out / "model.json"), str(out / "model.safetensors")]
    verify_export(out)
    assert json.loads((out / "model.json").read_text())["step"] == step
    expected = training_state(step).tensors["model"]["weight"].numpy().tobytes()
    assert read_safetensors(out / "model.safetensors")["weight"][2].tobytes() == expected
    assert sorted(entry.name for entry in out.iterdir()) == ["model.json", "model.safetensors"]


def test_a_damaged_model_is_not_exported(esper, volume: Path, tmp_path: Path):
    flip(generation(volume, 2) / "model.safetensors")
    code, _, err = esper("export", volume, tmp_path / "out")
    assert code == 1
    assert "is damaged" in err
    assert "--step" in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls", "nowhere"), "is no directory: give a checkpoint volume"),
        (("ls", "empty"), "holds no run"),
        (("show", "two"), "holds 2 runs (uid-1, uid-2): give the directory of one"),
        (("export", "volume", "out", "--step", "11"), "no checkpoint of step 11: `esper checkpoint ls"),
        (("export", "volume", "out", "--best", "--metric", "f1"), "has the metric f1"),
        (("verify", "volume", "--step", "11"), "no checkpoint to verify"),
    ],
)
def test_errors_name_the_remedy(esper, volume: Path, tmp_path: Path, words, said: str):
    (tmp_path / "empty").mkdir()
    for uid in ("uid-1", "uid-2"):
        shutil.copytree(volume / UID, tmp_path / "two" / uid)
    code, _, err = esper(words[0], *(tmp_path / w if w in ("nowhere", "empty", "two", "volume", "out") else w
                                     for w in words[1:]))  # fmt: skip
    assert code == 1
    assert said in err


@pytest.mark.parametrize("which", ["volume", "split"])
def test_it_needs_no_torch(which: str, request: pytest.FixtureRequest):
    volume: Path = request.getfixturevalue(which)
    code = (
        "import sys; from esper_runtime.cli.main import app\n"
        "for words in (['ls'], ['verify'], ['show'], ['export']):\n"
        "    more = [sys.argv[2]] if words == ['export'] else []\n"
        "    app(['checkpoint', *words, sys.argv[1], *more], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(volume), str(volume.parent / "out")], capture_output=True)
    assert done.returncode == 0, done.stderr


# In parts


def test_all_parts_are_listed_verified_and_shown(esper, split: Path):
    rows = json.loads(esper("ls", split, "-o", "json")[1])
    on_disk = sum((generation(split, 2) / name).stat().st_size for name in SPLIT_FILES[:-1])
    assert [(row["state"], row["files"], row["sizeBytes"]) for row in rows] == [("good", 7, on_disk)] * 2
    assert esper("verify", split)[0] == 0
    shown = json.loads(esper("show", split, "-o", "json")[1])["checkpoint"]
    assert sorted(shown["files"]) == sorted(SPLIT_FILES[:-1])


@pytest.mark.parametrize(
    ("spoil", "name", "why"),
    [
        (lambda d: (d / SPLIT_FILES[1]).unlink(), SPLIT_FILES[1], "missing"),
        (lambda d: shutil.copy(d / SPLIT_FILES[1], d / "model-00004-of-00004.safetensors"),
         "model-00004-of-00004.safetensors", "not in the manifest"),
    ],
)  # fmt: skip
def test_a_part_too_few_or_too_many_is_named_by_ls_verify_and_export(esper, split: Path, spoil, name: str, why: str):
    spoil(generation(split, 2))
    rows = json.loads(esper("ls", split, "-o", "json")[1])
    assert (rows[0]["state"], rows[0]["problem"]) == ("corrupt", f"{name}: {why}")
    code, out, _ = esper("verify", split)
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("corrupt")] == [
        f"corrupt  a00001/gen-0000000002/{name}: {why}"
    ]
    code, _, err = esper("export", split, split.parent / "out", "--step", 20)
    assert code == 1
    assert name in err
    assert "--step" in err


def test_swapped_parts_are_named_by_verify(esper, split: Path):
    one, other = (generation(split, 2) / name for name in SPLIT_FILES[3:5])
    one.rename(other.with_name("aside"))
    other.rename(one)
    other.with_name("aside").rename(other)
    code, out, _ = esper("verify", split)
    assert code == 1
    for name in SPLIT_FILES[3:5]:
        assert f"corrupt  a00001/gen-0000000002/{name}: digest mismatch" in out


def test_a_model_in_parts_is_exported_with_an_index(esper, split: Path, volume: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert esper("export", volume, out)[0] == 0
    code, said, _ = esper("export", split, out)
    assert code == 0
    files = [*SPLIT_FILES[:3], "model.json", "model.safetensors.index.json"]
    assert said.split() == [str(out / name) for name in files]
    assert sorted(entry.name for entry in out.iterdir()) == files, "the model in one file that was there is gone"
    verify_export(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    wanted = training_state(20).tensors["model"]
    assert index["weight_map"].keys() == wanted.keys()
    for name, file in index["weight_map"].items():
        assert read_safetensors(out / file)[name][1] == list(wanted[name].shape)
    expected = wanted["weight"].numpy().tobytes()
    assert read_safetensors(out / index["weight_map"]["weight"])["weight"][2].tobytes() == expected
    assert esper("export", volume, out)[0] == 0
    assert sorted(entry.name for entry in out.iterdir()) == ["model.json", "model.safetensors"]


def test_a_damaged_part_is_not_exported_and_what_was_there_stays(esper, split: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert esper("export", split, out, "--step", 10)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flip(generation(split, 2) / SPLIT_FILES[2])
    code, _, err = esper("export", split, out, "--step", 20)
    assert code == 1
    assert f"{SPLIT_FILES[2]} is damaged" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
