"""A workload of a few milliseconds per step that writes down the bits of every training loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from esper_runtime.workload import Batch, Workload, accuracy, read_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=5e-2, momentum=0.9),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=3),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = 2
    batch_size: int = 16
    samples: int = 256
    optimizer: str = "adamw"
    losses: str = ""
    """File for the losses, one hexadecimal float per evaluation."""
    rare_head: bool = False
    """A parameter that gets a gradient in every third batch alone."""
    masked: bool = False
    """A buffer of minus infinities, as attention has."""
    width: int = 33
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = 3


class Net(nn.Module):
    def __init__(self, *, rare_head: bool, masked: bool, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(width, 4)
        self.rare = nn.Linear(width, 4) if rare_head else None
        if masked:
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(inputs))))
        scores = self.last(hidden)
        if self.rare is not None and float(inputs[0, 0]) > 0.5:
            scores = scores + self.rare(hidden)
        return scores


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    generator = torch.Generator().manual_seed(c.seed)
    inputs = torch.randn(c.samples, 8, generator=generator)
    labels = (inputs[:, :2] > 0).long() @ torch.tensor([1, 2])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = cross_entropy(model(batch[0]), batch[1])
        if c.losses and model.training:
            with open(c.losses, "a", encoding="ascii") as file:
                file.write(f"{value.item().hex()}\n")
        return value

    return Workload(
        model=Net(rare_head=c.rare_head, masked=c.masked, width=c.width),
        optimizer=OPTIMIZERS[c.optimizer],
        loss=loss,
        train=(inputs, labels),
        validation=(inputs[:64], labels[:64]),
        metrics=accuracy,
        epochs=c.epochs,
        batch_size=c.batch_size,
        seed=c.seed,
        threads=1,
        precision=c.precision,
    )


def not_a_workload(config: Mapping[str, Any]) -> int:
    return 3


def raises(config: Mapping[str, Any]) -> Workload:
    return _deeper(config["nothing here"])


def _deeper(value: Any) -> Workload:
    raise AssertionError(value)
