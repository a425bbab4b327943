"""Small training states and an independent reader of safetensors, for tests of checkpoints."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from esper_runtime.checkpoint import GenerationData

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

TINY = 4096
"""A limit under which each tensor of training_state has a file of its own."""
SPLIT_FILES = (
    "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "aux.safetensors", "state.json",
    "manifest.json",
)  # fmt: skip
"""Of training_state under that limit."""


def training_state(step: int, *, elements: int = 1000, metrics: dict[str, float] | None = None) -> GenerationData:
    """A state in which every byte depends on `step`."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(elements, generator=generator)
    return GenerationData(
        epoch=step // 10,
        step=step,
        tensors={
            "model": {"weight": weights, "half": weights[:9].bfloat16(), "steps": torch.tensor(step)},
            "optimizer": {"exp_avg": weights * 0.5, "exp_avg_sq": weights.square()},
            "aux": {"rng": generator.get_state()},
        },
        state={"position": step, "loader": {"epoch": step // 10}},
        metrics={"loss": 1.0 / (1 + step)} if metrics is None else metrics,
    )


def same_tensors(left: Any, right: Any) -> bool:
    """Bitwise equality of {stem: {name: tensor}}."""
    if left.keys() != right.keys():
        return False
    for stem in left:
        if left[stem].keys() != right[stem].keys():
            return False
        for name, tensor in left[stem].items():
            other = right[stem][name]
            if tensor.dtype != other.dtype or not torch.equal(tensor, other):
                return False
    return True


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], npt.NDArray[np.uint8]]]:
    """By the letter of the format, sharing no code with the writer: name -> dtype, shape, bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert raw[8:9] == b"{"
    header.pop("__metadata__", None)
    body = raw[8 + length :]
    covered = 0
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == covered, "holes are not allowed"
        assert end - begin == int(np.prod(entry["shape"], dtype=np.int64)) * ITEM_SIZES[entry["dtype"]]
        covered = end
        found[name] = (entry["dtype"], entry["shape"], np.frombuffer(body[begin:end], dtype=np.uint8))
    assert covered == len(body), "the data must cover the whole buffer"
    return found
