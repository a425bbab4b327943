"""Workloads of the benches: digits and chars as shipped, perceptrons of any size, and a state of any size."""

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
    "adamw-still": lambda parameters: torch.optim.AdamW(parameters, lr=1e-9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}
"""adamw-still does all of the work and goes nowhere: no epoch is better or worse than another."""
REPEATS = {"chars": 8}
MANY_REPEATS = 250
"""Of the data, so that no epoch ends while the steps are timed."""
LAYER_ELEMENTS = 1 << 20
COPIES = 3
"""Of a parameter in AdamW's state: itself and its two moments."""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "digits"
    """digits, chars, the width of a perceptron's two hidden layers, or "state"."""
    optimizer: str = "adamw"
    threads: int = 1
    seed: int = 0
    steps: int = 0
    """Of an epoch; 0: so many that none ends while steps are timed."""
    validation: bool = False
    state_bytes: int = 0
    """Of model "state": parameters and AdamW's moments together."""


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    load = _state(c.state_bytes) if c.model == "state" else _model(c.model)
    wanted = c.steps * load.batch_size
    return dataclasses.replace(
        load,
        optimizer=OPTIMIZERS[c.optimizer],
        train=_first(load.train, wanted) if wanted else _repeated(load.train, REPEATS.get(c.model, MANY_REPEATS)),
        validation=load.validation if c.validation else None,
        epochs=100_000 if c.steps else 100,
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


def _first(data: Any, samples: int) -> Any:
    """As often over as it takes."""
    if isinstance(data, Tensor):
        return _repeated(data, -(-samples // len(data)))[:samples].clone()
    return tuple(_first(part, samples) for part in data)


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
        validation=base.validation,
        epochs=100,
        batch_size=32,
    )


def _state(size: int) -> Workload:
    """Layers of 4 MiB and a rest; a step costs little more than the optimizer."""
    layers = nn.ParameterList(torch.randn(elements) for elements in layers_of(size // COPIES // 4))
    return Workload(
        model=layers,
        optimizer=OPTIMIZERS["adamw"],
        loss=lambda model, batch: batch.mean() + sum(layer.square().mean() for layer in model),
        train=torch.zeros(32, 1),
        epochs=100,
        batch_size=1,
    )


def layers_of(elements: int) -> list[int]:
    whole, rest = divmod(elements, LAYER_ELEMENTS)
    return [LAYER_ELEMENTS] * whole + ([rest] if rest else [])
