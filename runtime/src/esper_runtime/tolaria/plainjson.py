"""A dataset's own state as JSON and back, exactly: no pickle, and readable by anybody.

JSON has neither tuples, bytes, tensors, infinities nor keys other than strings; those become objects with one key that
begins with `~`.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def encode(value: Any) -> Any:
    """TypeError names a type that cannot be saved."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"~float": repr(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"~bytes": _text(bytes(value))}
    if isinstance(value, Tensor):
        flat = value.detach().to("cpu").contiguous()
        raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"~tensor": [str(flat.dtype).removeprefix("torch."), list(flat.shape), _text(raw)]}
    if isinstance(value, numpy.generic):
        return encode(value.item())
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return {"~array": [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if isinstance(value, list):
        return [encode(element) for element in value]
    if isinstance(value, tuple):
        return {"~tuple": [encode(element) for element in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("~") for key in value):
            return {key: encode(element) for key, element in value.items()}
        return {"~map": [[encode(key), encode(element)] for key, element in value.items()]}
    raise TypeError(
        f"the dataset's state has a value of type {type(value).__name__}; only numbers, text, bytes, tensors, numeric "
        "arrays and lists, tuples and mappings of them can be saved"
    )


def decode(value: Any) -> Any:
    """What `encode` was given; numpy's scalars are Python's."""
    if isinstance(value, list):
        return [decode(element) for element in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("~"):
        return {key: decode(element) for key, element in value.items()}
    ((kind, body),) = value.items()
    return _DECODERS[kind](body)


def _tensor(body: Any) -> Tensor:
    name, shape, text = body
    dtype = getattr(torch, name)
    raw = bytearray(base64.b64decode(text))
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape)


def _array(body: Any) -> Any:
    dtype, shape, text = body
    return numpy.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).reshape(shape)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


_DECODERS: dict[str, Any] = {
    "~float": float,
    "~bytes": base64.b64decode,
    "~tensor": _tensor,
    "~array": _array,
    "~tuple": lambda body: tuple(decode(element) for element in body),
    "~map": lambda body: {decode(key): decode(element) for key, element in body},
}
