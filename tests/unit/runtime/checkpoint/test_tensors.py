"""The safetensors writer and reader."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from esper_runtime.checkpoint.files import ALIGN, Disk, write_file
from esper_runtime.checkpoint.tensors import DTYPES, FormatError, Layout, parse

from tests.support.checkpoints import read_safetensors


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    layout = Layout(tensors, {"format": "pt"})
    write_file(path, layout.parts(), size=layout.size, disk=Disk())
    return path


def every_dtype() -> dict[str, torch.Tensor]:
    pattern = torch.arange(48, dtype=torch.uint8)
    tensors = {}
    for dtype, name in DTYPES.items():
        raw = pattern % 2 if dtype == torch.bool else pattern
        view = torch.view_as_complex(raw.view(torch.float32).reshape(-1, 2)) if dtype.is_complex else raw.view(dtype)
        tensors[name.lower()] = view.clone()
    return tensors


def as_bytes(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        if not tensor.is_complex()
        else bytes(torch.view_as_real(tensor).contiguous().reshape(-1).view(torch.uint8).numpy())
    )


def test_an_independent_reader_finds_every_dtype(tmp_path: Path):
    tensors = every_dtype()
    found = read_safetensors(written(tmp_path / "all.safetensors", tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype, shape, raw = found[name]
        assert dtype == DTYPES[tensor.dtype]
        assert shape == list(tensor.shape)
        assert raw.tobytes() == as_bytes(tensor), name


def test_the_safetensors_package_reads_it(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    tensors = every_dtype()
    loaded = safetensors.load_file(written(tmp_path / "all.safetensors", tensors))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert as_bytes(loaded[name]) == as_bytes(tensor), name


def test_round_trip_of_odd_shapes(tmp_path: Path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "sliced": torch.arange(20)[::3],
        "odd": torch.arange(7, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "Ümläut/ключ": torch.ones(2),
    }
    loaded = parse(np.fromfile(written(tmp_path / "odd", tensors), dtype=np.uint8))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].shape == tensor.shape


def test_data_starts_at_a_page(tmp_path: Path):
    raw = written(tmp_path / "file", {"a": torch.ones(3)}).read_bytes()
    assert (8 + struct.unpack("<Q", raw[:8])[0]) % ALIGN == 0


def test_no_tensors_are_a_file_too(tmp_path: Path):
    assert parse(np.fromfile(written(tmp_path / "none", {}), dtype=np.uint8)) == {}


def test_a_foreign_file_with_misaligned_tensors_loads():
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    raw = struct.pack("<Q", len(header)) + header + b"\x07" + np.array([1.5, -2.0], dtype="<f4").tobytes()
    loaded = parse(np.frombuffer(bytearray(raw), dtype=np.uint8))
    assert loaded["float"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "bad entry"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fit"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not fit"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "does not fit"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}, "bad entry"),
        ({"dtype": "F32", "shape": [1]}, "bad entry"),
        (7, "bad entry"),
    ],
)
def test_an_entry_that_lies_is_refused_by_name(entry: object, words: str):
    header = json.dumps({"w": entry}).encode()
    raw = struct.pack("<Q", len(header)) + header + b"\0" * 4
    with pytest.raises(FormatError, match=f"tensor w: .*{words}"):
        parse(np.frombuffer(bytearray(raw), dtype=np.uint8))


@pytest.mark.parametrize(
    "raw", [b"", b"1234567", b"\xff" * 16, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"]
)
def test_what_is_no_safetensors_file_is_refused(raw: bytes):
    with pytest.raises(FormatError):
        parse(np.frombuffer(bytearray(raw), dtype=np.uint8))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_a_tensor_without_a_place_in_the_format_is_refused_by_name(tensor: torch.Tensor, words: str):
    with pytest.raises(FormatError, match=f"tensor w .*{words}"):
        Layout({"w": tensor})
