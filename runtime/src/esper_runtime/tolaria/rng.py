"""The random states that training depends on, as bytes."""

import ctypes
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
_NUMPY_RAW_BYTES = 2500
"""Of the Mersenne twister's state in numpy: key and position."""


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    _numpy.forget()
    numpy.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def capture() -> dict[str, bytes]:
    """States of torch's CPU generator, each CUDA device, numpy's and Python's global generators."""
    _, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": _PYTHON.pack(*words, gauss is not None, gauss or 0.0),
        "numpy": _numpy.capture(),
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
    _numpy.forget()
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, numpy_has_gauss, cached))
    for name, state in states.items():
        device = name.removeprefix("cuda.")
        if device != name and torch.cuda.is_available() and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(_bytes_tensor(state), int(device))


class _Numpy:
    """numpy takes 30 us to tell its state, which most training never changes: asked again only when it has changed.

    Told by the memory that numpy publishes. The second half of a Gaussian pair, which numpy keeps elsewhere, comes
    into being only with a change of that memory, so what was told without one stays true as long as it is the same.
    """

    def __init__(self) -> None:
        self._raw = b""
        self._told = b""

    def capture(self) -> bytes:
        public: Any = numpy.random  # its stubs lack get_bit_generator
        generator = public.get_bit_generator()
        plain = isinstance(generator, numpy.random.MT19937)
        raw = ctypes.string_at(generator.ctypes.state_address, _NUMPY_RAW_BYTES) if plain else b""
        if raw and raw == self._raw:
            return self._told
        legacy: Any = numpy.random.get_state(legacy=False)
        key = legacy["state"]["key"].astype("<u4", copy=False).tobytes()
        self._told = key + _NUMPY_TAIL.pack(legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"])
        self._raw = b"" if legacy["has_gauss"] else raw
        return self._told

    def forget(self) -> None:
        self._raw = b""


_numpy = _Numpy()


def _bytes_tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
