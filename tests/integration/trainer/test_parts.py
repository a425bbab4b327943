"""A run whose checkpoints and model are in parts, because a file may hold no more, trains as any other."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from esper_runtime.checkpoint import Store
from esper_runtime.cli.export import verify
from esper_runtime.tolaria import assemble

from tests.support.checkpoints import TINY, read_safetensors
from tests.support.trainers import PAUSED, Pod, Turns, close, same_bits

pytestmark = pytest.mark.timeout(400)
CHECKPOINTS: dict[str, Any] = {"everySteps": 8, "memory": {"everySteps": 5}, "retention": {"keepLatest": 10}}


def pod_at(root: Path) -> Pod:
    return Pod(root).configure(config={"epochs": 3}, checkpoint=CHECKPOINTS)


def export_of(pod: Pod) -> Path:
    return pod.root / "checkpoints" / pod.uid / "export"


def test_lost_with_a_damaged_part_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = pod_at(tmp_path / "undisturbed")
    assert expected.train().exit_code == 0
    monkeypatch.setattr(assemble, "Store", functools.partial(Store, max_file_bytes=TINY))
    pod = pod_at(tmp_path / "parts")
    parts, state = pod.assemble()
    assert Turns(parts, state).run(20) is PAUSED
    close(parts)
    del parts, state
    for name in ("shm", "run"):
        shutil.rmtree(pod.root / name)
        (pod.root / name).mkdir()
    newest = sorted((pod.root / "checkpoints" / pod.uid / "a00001").glob("gen-*"))[-1]
    lost = sorted(newest.glob("optimizer-*-of-*.safetensors"))[-1]
    lost.unlink()
    pod.attempt = 2
    assert pod.train().exit_code == 0
    assert f"{newest.name}/{lost.name}: missing" in pod.events("checkpoint")[0].corrupt_files[0]
    assert pod.events("recovery")[0].to_step == 8
    same_bits(pod.newest(), expected.newest())
    verify(export_of(pod))
    index = json.loads((export_of(pod) / "model.safetensors.index.json").read_text())["weight_map"]
    whole = read_safetensors(export_of(expected) / "model.safetensors")
    assert index.keys() == whole.keys()
    for name, (dtype, shape, raw) in whole.items():
        found = read_safetensors(export_of(pod) / index[name])[name]
        assert (found[0], found[1], found[2].tobytes()) == (dtype, shape, raw.tobytes())
