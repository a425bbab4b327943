"""Copies in host memory that is used again."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from esper_runtime.checkpoint import GenerationData
from esper_runtime.checkpoint.files import CHUNK, Disk, write_memory
from esper_runtime.checkpoint.generation import read, write
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.manifest import Manifest
from esper_runtime.checkpoint.tensors import FormatError
from torch import Tensor

from tests.support.checkpoints import same_tensors, training_state


def header() -> Manifest:
    return Manifest(
        run_uid="uid", attempt=1, number=1, parent=None, step=1, epoch=0, created=0.0, torch="", direct_io=True,
        verification="None", metrics={}, files={},
    )  # fmt: skip


def addresses(images: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    return {f"{stem}/{name}": tensor.data_ptr() for stem, part in images.items() for name, tensor in part.items()}


def test_a_copy_is_written_as_the_same_file_that_tensors_are(tmp_path: Path):
    data = training_state(7, elements=CHUNK // 2)  # some files of several chunks
    images, _ = HostCopies().take(data.tensors)
    files = []
    for name, tensors in (("plain", data.tensors), ("copied", images)):
        (tmp_path / name).mkdir()
        made = GenerationData(epoch=0, step=7, tensors=tensors)
        manifest = write(tmp_path / name, made, header(), Disk())
        files.append(manifest.files)
        loaded, _ = read(tmp_path / name, manifest, name, Disk())
        assert same_tensors(loaded, data.tensors)
    assert files[0] == files[1]


def test_memory_is_used_again_and_never_while_it_is_in_use():
    copies = HostCopies()
    one, release_one = copies.take(training_state(1).tensors)
    two, release_two = copies.take(training_state(2).tensors)
    assert not copies.free()
    assert not set(addresses(one).values()) & set(addresses(two).values())
    assert same_tensors(one, training_state(1).tensors)
    before = addresses(one)
    release_one()
    assert copies.free()
    three, _ = copies.take(training_state(3).tensors)
    assert addresses(three) == before
    assert same_tensors(three, training_state(3).tensors)
    assert same_tensors(two, training_state(2).tensors)
    release_two()


def test_a_state_of_another_shape_gets_memory_that_fits():
    copies = HostCopies(slots=1)
    for elements in (1000, 50_000, 10):
        data = training_state(elements, elements=elements)
        images, release = copies.take(data.tensors)
        assert same_tensors(images, data.tensors)
        release()


def test_a_later_change_of_the_live_tensor_does_not_reach_the_copy():
    live = torch.ones(3, 4).t()  # not contiguous
    images, _ = HostCopies().take({"model": {"w": live}})
    live.zero_()
    assert images["model"]["w"].sum() == 12
    assert images["model"]["w"].shape == (4, 3)


def test_a_tensor_without_a_place_leaves_the_memory_free():
    copies = HostCopies(slots=1)
    with pytest.raises(FormatError, match="tensor w"):
        copies.take({"model": {"w": torch.ones(1, dtype=torch.complex128)}})
    assert copies.free()


def test_memory_is_written_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from esper_runtime.checkpoint import files

    images, _ = HostCopies().take({"model": {"w": torch.ones(3 * CHUNK)}})
    image = images["model"]
    seen = []
    real = files._write_at
    monkeypatch.setattr(
        files, "_write_at", lambda d, data, *rest: (seen.append(data.ctypes.data), real(d, data, *rest))
    )
    write_memory(tmp_path / "file", image.memory, size=image.size, disk=Disk())
    start = image.memory.ctypes.data
    assert sorted(seen) == list(range(start, start + image.size, CHUNK))
