"""Mixed precision: the loss under autocast, and for float16 a gradient scaler whose state is part of the run's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_runtime.workload import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def under_autocast(call: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """`call` with autocast around it; as it is for float32."""
    dtype = _DTYPES.get(precision)
    if dtype is None:
        return call

    def mixed(*arguments: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return call(*arguments)

    return mixed


class Scaler:
    """torch's GradScaler, used once per step: scale each loss, unscale the gradients once, then settle or forget."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        """`options` are those of torch.amp.GradScaler."""
        self._scaler = torch.amp.GradScaler(device.type, **options)
        self._initial = self.capture()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Of the gradients that the optimizer sees. Once between two calls of `settle` or `forget`."""
        self._scaler.unscale_(optimizer)

    @property
    def scales(self) -> bool:
        """Whether an overflow may be the scale's own doing: at a scale of 1 or less it is the model's."""
        return self._scaler.get_scale() > 1.0

    def settle(self) -> None:
        """The gradients are used, or left out because they overflowed: moves the scale accordingly."""
        self._scaler.update()

    def forget(self) -> None:
        """The gradients are given up for a reason of ours: the scale stays."""
        self._scaler.update(new_scale=self._scaler.get_scale())

    # A state that snapshots and checkpoints carry

    def capture(self) -> dict[str, Any]:
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._scaler.load_state_dict(dict(saved) or self._initial)
