"""A workload whose pace and bad luck are files in a directory. Its text goes into a ConfigMap.

Each step pauses until a file `hurry` is there; a file `nan` makes one training loss NaN and is gone then. What is
trained is the same at any pace.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from esper_runtime.workload import Batch, Workload, accuracy, read_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    directory: str
    epochs: int
    steps_per_epoch: int = 20
    pause_s: float = 0.1
    seed: int = 1


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    random = torch.Generator().manual_seed(c.seed)
    inputs = torch.randn(c.steps_per_epoch * BATCH, 4, generator=random)
    labels = torch.randint(2, (len(inputs),), generator=random)
    hurry, nan = Path(c.directory, "hurry"), Path(c.directory, "nan")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not hurry.exists():
            time.sleep(c.pause_s)
        found = cross_entropy(model(batch[0]), batch[1])
        if model.training and nan.exists():
            nan.unlink()
            return found * float("nan")
        return found

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
