"""Names of the files of a split group, and where tensors are parted."""

import json
from pathlib import Path

import pytest
import torch
from esper_runtime.checkpoint import shards
from esper_runtime.checkpoint.files import ALIGN, Disk, write_file
from esper_runtime.checkpoint.tensors import Layout, split
from torch import Tensor

WHOLE = ["aux.safetensors", "model.safetensors", "state.json"]
THREE = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def parted(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    return [list(json.loads(layout.header[8:])) for layout in split(tensors, limit)]


def test_the_limit_of_the_layout_is_a_gigabyte():
    assert shards.MAX_FILE_BYTES == 10**9


def test_one_file_has_the_groups_name_and_several_are_counted():
    assert list(shards.names("model", 1)) == ["model.safetensors"]
    assert list(shards.names("model", 3)) == THREE
    assert list(shards.stems("optimizer", 100_000))[-1] == "optimizer-100000-of-100000"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.safetensors", "model"),
        ("model-00002-of-00003.safetensors", "model"),
        ("model-00002-of-00003", "model"),
        ("my_model-00002-of-00003", "my_model"),
        ("state.json", "state.json"),
    ],
)
def test_the_group_of_a_file(name: str, group: str):
    assert shards.group_of(name) == group


@pytest.mark.parametrize(
    ("listed", "present", "found"),
    [
        (WHOLE, WHOLE, []),
        ([*THREE, "state.json"], [*THREE, "state.json", "manifest.json"], []),
        (THREE, THREE[1:], []),  # what is not there at all is found when it is read
        (WHOLE, [*WHOLE, "notes.txt", "._model.safetensors", "model.safetensors.index.json"], []),
        (WHOLE, [*WHOLE, THREE[0]], [(THREE[0], "not in the manifest")]),
        (
            THREE,
            [*THREE, "model-00004-of-00003.safetensors"],
            [("model-00004-of-00003.safetensors", "not in the manifest")],
        ),
        ([THREE[0], THREE[2]], THREE[:1], [(THREE[1], "not in the manifest, which has 2 other parts of model")]),
        (
            [*THREE, "model-00004-of-00003.safetensors"],
            [],
            [("model-00004-of-00003.safetensors", "model has only 3 parts")],
        ),
        (
            ["model.safetensors", *THREE],
            [],
            [(THREE[0], f"does not belong to the other parts of model: {THREE[1]}, {THREE[2]}, model.safetensors")],
        ),
    ],
)
def test_what_names_alone_give_away(listed: list[str], present: list[str], found: list[tuple[str, str]]):
    assert list(shards.misfits(listed, present)) == found


def test_a_number_of_parts_that_nobody_has_costs_no_time():
    listed = ["model-00001-of-99999999999999.safetensors"]
    assert [name for name, _ in shards.misfits(listed, [])] == ["model-00002-of-99999999999999.safetensors"]


def test_the_header_counts_too_and_the_limit_itself_is_allowed():
    tensors = {"a": torch.zeros(ALIGN // 4), "b": torch.zeros(ALIGN // 4)}
    assert parted(tensors, 3 * ALIGN) == [["a", "b"]]
    assert parted(tensors, 3 * ALIGN - 1) == [["a"], ["b"]]


def test_a_header_that_just_fits_its_page_is_no_reason_to_part():
    seen = set()
    for length in range(3700, 4100):
        tensors = {"a" * length: torch.zeros(ALIGN // 8), "b": torch.zeros(ALIGN // 8)}
        fits = Layout(tensors).size <= 2 * ALIGN
        assert (len(split(tensors, 2 * ALIGN)) == 1) is fits, length
        seen.add(fits)
    assert seen == {True, False}


def test_a_tensor_larger_than_the_limit_is_alone_and_whole():
    tensors = {"a": torch.zeros(9), "b": torch.zeros(9 * ALIGN), "c": torch.zeros(9), "d": torch.zeros(9)}
    assert parted(tensors, 2 * ALIGN) == [["a"], ["b"], ["c", "d"]]


@pytest.mark.parametrize("tensors", [{}, {"only": torch.zeros(9 * ALIGN)}])
def test_nothing_and_a_single_tensor_are_one_file(tensors: dict[str, Tensor]):
    [layout] = split(tensors, 1)
    assert layout.header == Layout(tensors).header


def test_an_index_says_where_each_tensor_lies(tmp_path: Path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int64), "c": torch.zeros(0)}
    layouts = split(tensors, 1, {"format": "pt"})
    headers = {}
    for name, layout in zip(shards.names("model", 3), layouts, strict=True):
        write_file(tmp_path / name, layout.parts(), size=layout.size, disk=Disk())
        headers[name] = shards.header_of(tmp_path / name)
        assert headers[name] == layout.header
    assert json.loads(shards.index(headers)) == {
        "metadata": {"total_size": 64},
        "weight_map": {"b": THREE[0], "a": THREE[1], "c": THREE[2]},
    }
