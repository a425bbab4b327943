"""Workloads of the benches: digits and chars as shipped, and perceptrons of any size, with many steps per epoch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_runtime.workload import Workload, read_config
from esper_runtime.workloads import chars, digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}
REPEATS = {"chars": 8}
MANY_REPEATS = 250
"""Of the data, so that no epoch ends while the steps are timed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "digits"
    """digits, chars, or the width of a perceptron's two hidden layers."""
    optimizer: str = "adamw"
    threads: int = 1
    seed: int = 0


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    load = _model(c.model)
    repeats = REPEATS.get(c.model, MANY_REPEATS)
    return dataclasses.replace(
        load,
        optimizer=OPTIMIZERS[c.optimizer],
        train=_repeated(load.train, repeats),
        validation=None,
        epochs=100,
        threads=c.threads,
        parameter_groups=None,
        schedule=None,
        clip_gradient_norm=None,
    )


def _model(name: str) -> Workload:
    if name == "digits":
        return digits.build({})
    return chars.build({}) if name == "chars" else _perceptron(int(name))


def _repeated(data: Any, repeats: int) -> Any:
    if isinstance(data, Tensor):
        return data.repeat(repeats, *[1] * (data.ndim - 1))
    return tuple(_repeated(part, repeats) for part in data)


def _perceptron(width: int) -> Workload:
    base = digits.build({})
    inputs, labels = base.train
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    return Workload(
        model=model,
        optimizer=OPTIMIZERS["adamw"],
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=(inputs, labels),
        epochs=100,
        batch_size=32,
    )
