"""A workload that a test can watch: a pause in every step, next to no computing. Its text goes into a ConfigMap."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from esper_runtime.workload import Batch, Workload, accuracy, read_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = 1000
    steps_per_epoch: int = 20
    pause_s: float = 0.02
    seed: int = 1


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    random = torch.Generator().manual_seed(c.seed)
    inputs = torch.randn(c.steps_per_epoch * BATCH, 4, generator=random)
    labels = torch.randint(2, (len(inputs),), generator=random)  # nothing to learn: the loss stays where it is

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        time.sleep(c.pause_s)
        return cross_entropy(model(batch[0]), batch[1])

    return Workload(
        model=nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        loss=loss,
        train=(inputs, labels),
        validation=(inputs[:32], labels[:32]),
        metrics=accuracy,
        epochs=c.epochs,
        batch_size=BATCH,
        seed=c.seed,
        threads=1,
    )


def wrong_type(config: Mapping[str, Any]) -> int:
    return 3


def raises(config: Mapping[str, Any]) -> Workload:
    raise FileNotFoundError("no data below /data/train: mount the volume")
