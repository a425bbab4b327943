"""The random states that training depends on, as bytes."""

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy
import torch

_PYTHON = struct.Struct("<625IBd")
_NUMPY = struct.Struct("<624IIId")
_NUMPY_TAIL = struct.Struct("<IId")
"""The part of it behind the key, which numpy holds as those very bytes."""


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def capture() -> dict[str, bytes]:
    """States of torch's CPU generator, each CUDA device, numpy's and Python's global generators."""
    _, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    key = legacy["state"]["key"].astype("<u4", copy=False).tobytes()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": _PYTHON.pack(*words, gauss is not None, gauss or 0.0),
        "numpy": key + _NUMPY_TAIL.pack(legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state.numpy().tobytes()
    return states


def restore(states: Mapping[str, bytes]) -> None:
    """Puts back what `capture` took. CUDA states of devices that are absent here are left out."""
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    *words, has_gauss, gauss = _PYTHON.unpack(states["python"])
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *key, position, numpy_has_gauss, cached = _NUMPY.unpack(states["numpy"])
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, numpy_has_gauss, cached))
    for name, state in states.items():
        device = name.removeprefix("cuda.")
        if device != name and torch.cuda.is_available() and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(_bytes_tensor(state), int(device))


def _bytes_tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
