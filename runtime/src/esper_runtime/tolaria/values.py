"""An optimizer's state as named tensors and JSON: no pickle, and readable by anybody.

A state value is a tensor, a number, a flag, None, or a list or mapping of those. `pack` takes the tensors out and
leaves their names; `unpack` puts them back.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR = "tensor"
_LIST = "list"
_MAP = "map"
_VALUE = "value"


def pack(name: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A JSON skeleton of `value`; its tensors are added to `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, (list, tuple)):
        return {_LIST: [pack(f"{name}.{index}", element, tensors) for index, element in enumerate(value)]}
    if isinstance(value, Mapping):
        return {_MAP: {str(key): pack(f"{name}.{key}", element, tensors) for key, element in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {_VALUE: value}
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}; only tensors, numbers and lists can be saved")


def unpack(skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` took apart. KeyError when a tensor is missing."""
    if _TENSOR in skeleton:
        return tensors[skeleton[_TENSOR]]
    if _LIST in skeleton:
        return [unpack(element, tensors) for element in skeleton[_LIST]]
    if _MAP in skeleton:
        return {key: unpack(element, tensors) for key, element in skeleton[_MAP].items()}
    return skeleton[_VALUE]
