"""Workloads of the benches: digits as shipped, and perceptrons of any size, each with data for many steps per epoch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_runtime.workload import Workload, read_config
from esper_runtime.workloads import digits
from torch import nn
from torch.nn.functional import cross_entropy

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}
REPEATS = 250
"""Of digits' images, so that no epoch ends while the steps are timed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "digits"
    """digits, or the width of a perceptron's two hidden layers."""
    optimizer: str = "adamw"
    threads: int = 1
    seed: int = 0


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    load = digits.build({}) if c.model == "digits" else _perceptron(int(c.model))
    inputs, labels = load.train
    return dataclasses.replace(
        load,
        optimizer=OPTIMIZERS[c.optimizer],
        train=(inputs.repeat(REPEATS, *[1] * (inputs.ndim - 1)), labels.repeat(REPEATS)),
        validation=None,
        epochs=100,
        threads=c.threads,
    )


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
