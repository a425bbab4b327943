"""Regression on a table: how much pressure a fluid loses in a pipe, from six properties of both.

The data is synthetic. Samples are drawn from `seed`; the target follows the Darcy-Weisbach equation, with 64 / Re as
friction factor of laminar flow and Haaland's formula above a Reynolds number of 2,300, and normal noise on its decimal
logarithm. A perfect model has a mean absolute error of about 0.8 times `noise`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from esper_runtime.schedules import linear
from esper_runtime.workload import Batch, Sums, Workload, read_config

RANGES = {
    "velocity": (0.1, 10.0),
    "diameter": (0.01, 1.0),
    "length": (1.0, 1000.0),
    "density": (700.0, 1300.0),
    "viscosity": (1e-4, 1e-1),
    "roughness": (1e-6, 1e-3),
}
"""Inputs in SI units (m/s, m, m, kg/m3, Pa s, m), drawn evenly on a logarithmic scale."""
TURBULENT = 2300.0
"""Reynolds number."""
HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of runtime.config. `samples: 500, width: 16, epochs: 1` is a smoke test."""

    samples: int = 20_000
    noise: float = 0.02
    """Standard deviation, in decades of pressure."""
    width: int = 64
    layers: int = 2
    batch_size: int = 128
    epochs: int = 30
    learning_rate: float = 3e-3
    seed: int = 0


def build(config: Mapping[str, Any]) -> Workload:
    """Entrypoint `esper_runtime.workloads.regression:build`."""
    c = read_config(Config, config)
    inputs, decades = pressure_losses(c.samples, noise=c.noise, seed=c.seed)
    held_out = max(1, round(c.samples * HELD_OUT))
    train, validation = (inputs[held_out:], decades[held_out:]), (inputs[:held_out], decades[:held_out])
    return Workload(
        model=Network(c, scale=Scale.of(*train)),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=c.learning_rate),
        schedule=linear(),
        loss=lambda model, batch: mse_loss(model(batch[0]), batch[1]),
        train=train,
        validation=validation,
        validation_batch_size=1024,
        metrics=measure_against(float(validation[1].var(correction=0))),
        goals={"mae": ("<=", 0.05), "r2": 0.99},
        epochs=c.epochs,
        batch_size=c.batch_size,
        seed=c.seed,
    )


def pressure_losses(samples: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(samples, 6) decimal logarithms of the inputs, in the order of RANGES; (samples,) those of the loss in Pa."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor(list(RANGES.values()), dtype=torch.float64).log10()
    shares = torch.rand(samples, len(RANGES), dtype=torch.float64, generator=generator)
    inputs = bounds[:, 0] + shares * (bounds[:, 1] - bounds[:, 0])
    velocity, diameter, length, density, viscosity, roughness = (10**inputs).unbind(dim=1)
    reynolds = density * velocity * diameter / viscosity
    haaland = (-1.8 * ((roughness / diameter / 3.7) ** 1.11 + 6.9 / reynolds).log10()) ** -2
    friction = torch.where(reynolds < TURBULENT, 64 / reynolds, haaland)
    loss = friction * length / diameter * density * velocity**2 / 2
    disturbed = loss.log10() + noise * torch.randn(samples, dtype=torch.float64, generator=generator)
    return inputs.float(), disturbed.float()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Means and deviations of the training data, part of the model: it takes and gives physical values."""

    input_mean: Tensor
    input_deviation: Tensor
    target_mean: Tensor
    target_deviation: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "Scale":
        return cls(
            input_mean=inputs.mean(dim=0),
            input_deviation=inputs.std(dim=0),
            target_mean=targets.mean(),
            target_deviation=targets.std(),
        )


class Network(nn.Module):
    """A perceptron between two changes of scale, which are buffers: exported with the weights."""

    def __init__(self, config: Config, *, scale: Scale) -> None:
        super().__init__()
        for name in ("input_mean", "input_deviation", "target_mean", "target_deviation"):
            self.register_buffer(name, getattr(scale, name))
        sizes = [len(RANGES), *[config.width] * config.layers]
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(sizes[-1], 1))

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = (inputs - self.get_buffer("input_mean")) / self.get_buffer("input_deviation")
        found: Tensor = self.layers(scaled).squeeze(dim=1)
        return found * self.get_buffer("target_deviation") + self.get_buffer("target_mean")


def measure_against(variance: float) -> Callable[[nn.Module, Batch], Sums]:
    """Metrics of held-out data with this variance: mean absolute and squared error in decades, and R2.

    R2 = 1 - mean squared error / variance is itself a mean over samples, so it can be given as a sum and a count.
    """

    def measure(model: nn.Module, batch: Batch) -> Sums:
        inputs, wanted = batch
        error = (model(inputs) - wanted).double()
        count, squared = len(wanted), float((error**2).sum())
        return {
            "mae": (float(error.abs().sum()), count),
            "mse": (squared, count),
            "r2": (count - squared / variance, count),
        }

    return measure
