"""Copies in host memory that is used again."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from esper_runtime.checkpoint import GenerationData, Store, host
from esper_runtime.checkpoint.errors import AbandonedError
from esper_runtime.checkpoint.files import CHUNK, Disk, write_memory
from esper_runtime.checkpoint.generation import read, write
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.manifest import Manifest
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.tensors import FormatError, parse
from torch import Tensor

from tests.support.checkpoints import TINY, same_tensors, training_state


def header() -> Manifest:
    return Manifest(
        run_uid="uid", attempt=1, number=1, parent=None, step=1, epoch=0, created=0.0, torch="", direct_io=True,
        verification="None", metrics={}, files={},
    )  # fmt: skip


def addresses(images: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    return {f"{stem}/{name}": tensor.data_ptr() for stem, part in images.items() for name, tensor in part.items()}


@pytest.mark.parametrize("limit", [MAX_FILE_BYTES, TINY])
def test_a_copy_is_written_as_the_same_files_that_tensors_are(tmp_path: Path, limit: int):
    data = training_state(7, elements=CHUNK // 2)  # some files of several chunks
    images, _ = HostCopies(limit=limit).take(data.tensors)
    files = []
    for name, tensors in (("plain", data.tensors), ("copied", images)):
        (tmp_path / name).mkdir()
        made = GenerationData(epoch=0, step=7, tensors=tensors)
        manifest = write(tmp_path / name, made, header(), Disk(), limit)
        files.append(manifest.files)
        loaded, _ = read(tmp_path / name, manifest, name, Disk())
        assert same_tensors(loaded, data.tensors)
    assert files[0] == files[1]
    assert len(files[0]) == (4 if limit == MAX_FILE_BYTES else 7)


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


@pytest.mark.parametrize("lent", ["model", "model-00001-of-00003", "model-00003-of-00003"])
def test_another_number_of_files_leaves_no_memory_behind(lent: str):
    copies = HostCopies(slots=1, limit=1)
    for names in ("abc", "a", "ab", "abc", "abcd"):
        tensors = {name: torch.full((9,), float(number)) for number, name in enumerate(names, start=len(names))}
        loan = copies.lend(lent, 1)
        images, release = copies.take({"model": tensors})
        del loan  # comes back when there is other memory, or no file of that name any more
        assert same_tensors(images, {"model": tensors})
        release()
        again, release = copies.take({"model": tensors})
        assert addresses(again) == addresses(images)
        release()
        assert len(copies._slots[0].images) == len(names)


def test_no_memory_for_one_of_several_files_leaves_nothing_half_laid_out(monkeypatch: pytest.MonkeyPatch):
    copies = HostCopies(slots=1, limit=1)
    known = {"a": torch.full((9000,), 7.0), "b": torch.full((9,), 8.0)}
    other = {"a": torch.full((5,), 1.0), "b": torch.full((9000,), 2.0)}  # the first has memory, the second needs more
    copies.take({"model": known})[1]()

    def scarce(size: int) -> Any:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(host, "aligned_buffer", scarce)
        with pytest.raises(OSError, match="Cannot allocate"):
            copies.take({"model": other})
    for tensors in (known, other):
        images, release = copies.take({"model": tensors})
        files = images["model"].files
        written = {name: tensor for image in files for name, tensor in parse(image.memory[: image.size]).items()}
        assert same_tensors({"model": written}, {"model": tensors})
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
    [image] = images["model"].files
    seen = []
    real = files._write_at
    monkeypatch.setattr(
        files, "_write_at", lambda d, data, *rest: (seen.append(data.ctypes.data), real(d, data, *rest))
    )
    write_memory(tmp_path / "file", image.memory, size=image.size, disk=Disk())
    start = image.memory.ctypes.data
    assert sorted(seen) == list(range(start, start + image.size, CHUNK))


# Lent to a load


def prepared(directory: Path, copies: HostCopies, limit: int = MAX_FILE_BYTES) -> Store:
    store = Store(directory, run_uid="uid", attempt=1, verification="None", max_file_bytes=limit)
    store.prepare()
    store.room = copies.lend
    return store


@pytest.mark.parametrize("limit", [MAX_FILE_BYTES, TINY])
def test_a_load_uses_the_memory_of_a_copy_and_the_next_copy_has_it_again(tmp_path: Path, limit: int):
    copies = HostCopies(limit=limit)
    store = prepared(tmp_path, copies, limit)
    data = training_state(7, elements=CHUNK // 8)
    images, release = copies.take(data.tensors)
    store.save(GenerationData(epoch=0, step=7, tensors=images))
    copied = addresses(images)
    release()
    del images
    loaded = store.load_newest()
    assert loaded is not None
    assert same_tensors(loaded.tensors, data.tensors)
    assert addresses(loaded.tensors) == copied
    assert copies.free()
    other, release = copies.take(training_state(8, elements=CHUNK // 8).tensors)
    assert not set(addresses(other).values()) & set(copied.values())
    assert same_tensors(loaded.tensors, data.tensors)
    del loaded
    third, _ = copies.take(training_state(9, elements=CHUNK // 8).tensors)
    assert same_tensors(other, training_state(8, elements=CHUNK // 8).tensors)
    assert same_tensors(third, training_state(9, elements=CHUNK // 8).tensors)


def test_memory_that_came_back_makes_a_whole_file(tmp_path: Path):
    copies = HostCopies(slots=1)
    images, release = copies.take(training_state(1).tensors)
    before = addresses(images)
    release()
    del images
    loan = copies.lend("model", 4097)
    loan[:] = 255
    del loan
    images, _ = copies.take(training_state(2).tensors)
    assert addresses(images) == before
    (tmp_path / "gen").mkdir()
    manifest = write(tmp_path / "gen", GenerationData(epoch=0, step=2, tensors=images), header(), Disk())
    assert same_tensors(read(tmp_path / "gen", manifest, "gen", Disk())[0], training_state(2).tensors)


def test_memory_stays_lent_as_long_as_anything_refers_to_it():
    copies = HostCopies(slots=1)
    images, release = copies.take(training_state(1).tensors)
    start = images["model"].files[0].memory.ctypes.data
    release()
    del images
    holders: list[Any] = [copies.lend("model", 1)]
    assert holders[0].ctypes.data == start
    derivations: list[Callable[[Any], Any]] = [
        lambda array: array[5:],
        lambda array: array.data,
        lambda view: np.frombuffer(view, dtype=np.uint8),
        lambda array: torch.from_numpy(array[3:]),
        lambda tensor: tensor.view(torch.float32)[1:].reshape(1, -1),
    ]
    for derived in derivations:
        holders.append(derived(holders[-1]))
        del holders[0]
        images, release = copies.take(training_state(2).tensors)
        assert images["model"].files[0].memory.ctypes.data != start
        release()
        del images


def test_memory_of_a_copy_in_use_or_too_small_is_never_lent():
    copies = HostCopies(slots=1)
    images, release = copies.take(training_state(1).tensors)
    [image] = images["model"].files
    start, length = image.memory.ctypes.data, len(image.memory)
    assert copies.lend("model", 1).ctypes.data != start
    release()
    assert len(copies.lend("model", length + 1)) > length
    assert copies.lend("state.json", 1).ctypes.data != start
    assert copies.lend("model", length).ctypes.data == start


def test_an_abandoned_load_writes_into_no_memory_that_a_copy_has_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copies, elements = HostCopies(slots=1), CHUNK
    store = prepared(tmp_path, copies)
    images, release = copies.take(training_state(1, elements=elements).tensors)
    store.save(GenerationData(epoch=0, step=1, tensors=images))
    release()
    del images
    go, reading, abandoned, real = threading.Event(), threading.Semaphore(0), threading.Event(), os.preadv

    def waiting(*arguments: Any) -> int:
        reading.release()
        assert go.wait(60)
        return real(*arguments)

    def load() -> None:
        with pytest.raises(AbandonedError):
            store.load_newest(stop=abandoned.is_set)

    monkeypatch.setattr(os, "preadv", waiting)
    loader = threading.Thread(target=load)
    loader.start()
    assert reading.acquire(timeout=60)
    assert reading.acquire(timeout=60)
    abandoned.set()
    images, release = copies.take(training_state(2, elements=elements).tensors)
    go.set()
    loader.join(60)
    assert same_tensors(images, training_state(2, elements=elements).tensors)
    release()


def test_a_generation_that_does_not_verify_gives_its_memory_to_the_next_try(tmp_path: Path):
    copies = HostCopies(slots=1)
    store = prepared(tmp_path, copies)
    for step in (1, 2):
        images, release = copies.take(training_state(step, elements=CHUNK // 8).tensors)
        generation = store.save(GenerationData(epoch=0, step=step, tensors=images))
        copied = addresses(images)
        release()
        del images
    with (generation.path / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert same_tensors(loaded.tensors, training_state(1, elements=CHUNK // 8).tensors)
    assert addresses(loaded.tensors) == copied
