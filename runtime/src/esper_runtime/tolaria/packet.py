"""What Tamiyo is told at a boundary. Only what was measured: a field that is absent is unknown.

What describes a boundary itself (its own time, Tamiyo's, that of the command) is known only after it, so a packet
carries the values of the one before.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from esper_leyline.v1.common_pb2 import OptimizerFamily
from esper_leyline.v1.telemetry_pb2 import HardwareContext, SystemStatePacket, TrainingMetrics

from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.state import EpochSums, TrainState

EWMA_WEIGHT: Final = 0.2
GIB: Final = 1024.0**3
_FAMILIES: Final = {
    torch.optim.SGD: OptimizerFamily.OPTIMIZER_FAMILY_SGD,
    torch.optim.Adam: OptimizerFamily.OPTIMIZER_FAMILY_ADAM,
    torch.optim.AdamW: OptimizerFamily.OPTIMIZER_FAMILY_ADAMW,
}
_GAUGES: Final = {
    "gradient_norm": "tolaria.grad.norm_l2",
    "step_latency_ms": "tolaria.train.step_ms",
    "input_wait_ms": "tolaria.train.input_wait_ms",
    "h2d_copy_ms": "tolaria.train.h2d_copy_ms",
}
"""Fields that are gauges of the epoch that ended; absent as long as nobody has set them."""


class Trend:
    """Exponentially weighted mean and variance, corrected for their start: the first value is its own mean."""

    def __init__(self, weight: float = EWMA_WEIGHT) -> None:
        self._weight = weight
        self.clear()

    def clear(self) -> None:
        self._share = 0.0
        self._mean = 0.0
        self._square = 0.0
        self._last: float | None = None
        self.delta: float | None = None
        """From the value before; None for the first."""

    def add(self, value: float) -> None:
        """Values that are not finite leave no trace."""
        if not math.isfinite(value):
            return
        self.delta = None if self._last is None else value - self._last
        self._last = value
        self._share += self._weight * (1.0 - self._share)
        self._mean += self._weight * (value - self._mean)
        self._square += self._weight * (value * value - self._square)

    @property
    def mean(self) -> float | None:
        return self._mean / self._share if self._share else None

    @property
    def deviation(self) -> float | None:
        """Square root of the variance."""
        mean = self.mean
        return None if mean is None else math.sqrt(max(0.0, self._square / self._share - mean * mean))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedEpoch:
    """An epoch that has just ended."""

    number: int
    """From 1."""
    took_s: float
    sums: EpochSums
    metrics: Mapping[str, float]
    """train_loss, validation_loss, validation_accuracy and what else the workload measures."""
    whole: bool
    """All of it was trained by this process, so its time is that of the whole."""


@dataclass(kw_only=True)
class Packets:
    """Assembles packets; remembers the trend of the losses and the times of the last boundary."""

    experiment: str
    epochs: int
    device: torch.device
    metrics: Metrics
    last: dict[str, float] = field(default_factory=dict)
    """hook_latency_ms, tamiyo_latency_ms, kasmina_apply_ms of the boundary before; empty before the first."""

    def __post_init__(self) -> None:
        self._losses = Trend()
        self._norms = Trend()

    def capture(self) -> dict[str, Any]:
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """A state from elsewhere: the trend so far is of another course of training."""
        self._losses.clear()
        self._norms.clear()

    def assemble(self, state: TrainState, closed: ClosedEpoch) -> SystemStatePacket:
        packet = SystemStatePacket(
            current_epoch=closed.number,
            global_step=state.step,
            timestamp_ns=time.time_ns(),
            source_subsystem="tolaria",
            experiment_name=self.experiment,
            hardware_context=hardware(self.device),
        )
        for name, value in closed.metrics.items():
            if name == "train_loss":
                packet.training_loss = value
            elif name == "validation_loss":
                packet.validation_loss = value
            elif name == "validation_accuracy":
                packet.validation_accuracy = value
        packet.metrics_struct.CopyFrom(self._training(state, closed))
        return packet

    def _training(self, state: TrainState, closed: ClosedEpoch) -> TrainingMetrics:
        found: dict[str, float | None] = {
            "optimizer_lr": state.update.learning_rate,
            "epoch_latency_ms": closed.took_s * 1e3 if closed.whole else None,
            "loss": state.loss,
            "accuracy": closed.metrics.get("validation_accuracy"),
            "optimizer_momentum": _momentum(state.update.optimizer),
            **{name: self.metrics.value(gauge) for name, gauge in _GAUGES.items()},
            **self._trends(closed),
            **self.last,
        }
        if closed.whole and closed.took_s > 0:
            found["samples_per_s"] = closed.sums.samples / closed.took_s
        training = TrainingMetrics(
            epochs_total=self.epochs,
            optimizer_family=_FAMILIES.get(type(state.update.optimizer), OptimizerFamily.OPTIMIZER_FAMILY_OTHER),
        )
        for name, value in found.items():
            if value is not None and math.isfinite(value):
                setattr(training, name, value)
        return training

    def _trends(self, closed: ClosedEpoch) -> dict[str, float | None]:
        """Of epochs: a boundary is told how losses go from one to the next."""
        loss, norm = closed.metrics.get("train_loss"), self.metrics.value("tolaria.grad.norm_l2")
        if loss is not None:
            self._losses.add(loss)
        if norm is not None:
            self._norms.add(norm)
        deviation = self._norms.deviation
        return {
            "loss_delta": self._losses.delta,
            "loss_ewma": self._losses.mean,
            "loss_volatility": self._losses.deviation,
            "grad_norm_ewma": self._norms.mean,
            "grad_var": None if deviation is None else deviation**2,
        }


def _momentum(optimizer: torch.optim.Optimizer) -> float | None:
    """Of the first group; None where there is none."""
    momentum = optimizer.param_groups[0].get("momentum")
    return float(momentum) if isinstance(momentum, (int, float)) and momentum else None


def hardware(device: torch.device) -> HardwareContext:
    """Of the device that training really uses. A CPU's memory is its container's business, so it is left out."""
    if device.type != "cuda":
        return HardwareContext(device_type=device.type, device_id=str(device.index or 0))
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return HardwareContext(
        device_type=device.type,
        device_id=str(getattr(properties, "uuid", device.index or 0)),
        total_memory_gb=total / GIB,
        available_memory_gb=free / GIB,
        compute_capability=10 * properties.major + properties.minor,
    )
