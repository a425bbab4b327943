"""A workload that raises where `config.where` says: build, optimizer, data, loss, metrics, transform or import."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_runtime.workload import Batch, Sums, Workload, read_config
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Config:
    where: str
    workers: int = 0


class Samples(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, *, broken: bool) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.broken and index == 7:
            read_image(index)
        return torch.full((4,), float(index)), torch.tensor(1.0)


def read_image(index: int) -> None:
    raise FileNotFoundError(f"image {index} is not there")


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    if c.where == "build":
        json.loads("{not json")
    broken = c.where

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if broken == "loss":
            return torch.mm(model(batch[0]), torch.zeros(3, 3)).mean()
        return model(batch[0]).square().mean()

    def metrics(model: nn.Module, batch: Batch) -> Sums:
        return {"x": (1.0 / (0 if broken == "metrics" else 1), 1)}

    def transform(batch: Batch) -> Batch:
        return batch[5] if broken == "transform" else batch

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=-1.0 if broken == "optimizer" else 0.1)

    return Workload(
        model=nn.Linear(4, 2),
        optimizer=optimizer,
        loss=loss,
        train=Samples(broken=broken == "data"),
        validation=(torch.zeros(8, 4), torch.zeros(8)),
        metrics=metrics,
        transform=transform,
        epochs=1,
        batch_size=8,
        num_workers=c.workers,
        threads=1,
    )
