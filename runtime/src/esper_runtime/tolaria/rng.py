"""The random states that training depends on, as bytes."""

import ctypes
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy
import torch

_PYTHON = struct.Struct("<625IBd")
_PYTHON_TAIL = struct.Struct("<Bd")
_PYTHON_RAW_BYTES = 2500
"""Of the Mersenne twister in Python's generator: position and key."""
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
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": _python.capture(),
        "numpy": _numpy.capture(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
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


class _Python:
    """Python tells its state as 625 new integers, which costs as much as a small snapshot: read from memory instead.

    Where the words lie in the object is CPython's business, so it is tried once against what `getstate` says, and
    `getstate` is asked every time where that differs.
    """

    def __init__(self) -> None:
        generator: Any = getattr(random, "_inst", None)
        self._address = 0 if generator is None else id(generator) + object.__basicsize__
        self._generator = generator
        if generator is None or self._read() != self._ask():
            self._address = 0

    def capture(self) -> bytes:
        return self._read() if self._address else self._ask()

    def _read(self) -> bytes:
        raw = ctypes.string_at(self._address, _PYTHON_RAW_BYTES)
        gauss = self._generator.gauss_next
        return raw[4:] + raw[:4] + _PYTHON_TAIL.pack(gauss is not None, gauss or 0.0)

    def _ask(self) -> bytes:
        _, words, gauss = random.getstate()
        return _PYTHON.pack(*words, gauss is not None, gauss or 0.0)


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


_python = _Python()
_numpy = _Numpy()


def _bytes_tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
