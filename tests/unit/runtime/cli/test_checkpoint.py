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

from tests.support.checkpoints import read_safetensors, training_state

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


def test_it_needs_no_torch(volume: Path):
    code = (
        "import sys; from esper_runtime.cli.main import app\n"
        "for words in (['ls'], ['verify'], ['show'], ['export']):\n"
        "    more = [sys.argv[2]] if words == ['export'] else []\n"
        "    app(['checkpoint', *words, sys.argv[1], *more], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(volume), str(volume.parent / "out")], capture_output=True)
    assert done.returncode == 0, done.stderr
