"""Whatever tensors and limit: every tensor is in one file, in order, within the limit, and comes back bitwise."""

import json
import shutil
import struct
from math import prod
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from esper_runtime.checkpoint import GenerationData
from esper_runtime.checkpoint.files import Disk
from esper_runtime.checkpoint.generation import read, write
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.manifest import Manifest
from esper_runtime.checkpoint.tensors import DTYPES
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from tests.support.checkpoints import read_safetensors

ALIGN = 4096
HEADER = Manifest(
    run_uid="uid", attempt=1, number=1, parent=None, step=1, epoch=0, created=0.0, torch="", direct_io=False,
    verification="None", metrics={}, files={},
)  # fmt: skip


def tensor_of(seed: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        tensor_of,
        st.integers(0, 2**31),
        st.sampled_from(sorted(DTYPES, key=str)),
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 30, 64]), max_size=3),
    ),
    max_size=12,
)
LIMITS = st.one_of(st.integers(1, 3 * ALIGN), st.integers(1, 600_000), st.just(10**9))


def raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes((torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8).numpy())


def names_of(group: str, count: int) -> list[str]:
    if count == 1:
        return [f"{group}.safetensors"]
    return [f"{group}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def check_files(directory: Path, files: dict[str, int], tensors: dict[str, Tensor], limit: int) -> None:
    parts = {name: read_safetensors(directory / name) for name in names_of("model", len(files))}
    assert parts.keys() == files.keys()
    found = [name for part in parts.values() for name in part]
    assert len(found) == len(set(found)), "no tensor twice"
    sizes = {name: tensor.element_size() for name, tensor in tensors.items()}
    assert found == sorted(tensors, key=lambda name: (-sizes[name], name)), "every tensor, in the order of one file"
    for name, part in parts.items():
        size = (directory / name).stat().st_size
        assert size == files[name]
        assert size <= limit or len(part) <= 1
        (length,) = struct.unpack("<Q", (directory / name).read_bytes()[:8])
        assert (8 + length) % ALIGN == 0
        assert json.loads((directory / name).read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    for one, other in zip(list(parts)[:-1], list(parts)[1:], strict=True):
        room = limit - files[one]
        first = next(iter(parts[other]))
        assert tensors[first].nbytes + ALIGN > room, "a part is ended only by what no longer fits"


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS, limit=LIMITS)
def test_any_tensors_under_any_limit(tmp_path: Path, tensors: dict[str, Tensor], limit: int):
    copies, _ = HostCopies(slots=1, limit=limit).take({"model": tensors})
    manifests = []
    for place, content in (("plain", tensors), ("copied", copies["model"])):
        directory = tmp_path / place
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        data = GenerationData(epoch=0, step=1, tensors={"model": content})
        manifest = write(directory, data, HEADER, Disk(), limit)
        manifests.append(manifest)
        sizes = {name: digest.size for name, digest in manifest.files.items() if name != "state.json"}
        check_files(directory, sizes, tensors, limit)
        assert manifest.version == (3 if len(sizes) > 1 else 2)
        loaded, _ = read(directory, manifest, place, Disk())
        assert loaded["model"].keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = loaded["model"][name]
            assert (other.dtype, other.shape, raw(other)) == (tensor.dtype, tensor.shape, raw(tensor)), name
    assert manifests[0].files == manifests[1].files, "copies are written as the same bytes"
