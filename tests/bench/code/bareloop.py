"""The loop that a PyTorch user writes: benchload's model and data, and nothing else of Esper."""

from collections.abc import Iterator
from typing import Any

import benchload
import torch


def steps_of(config: dict[str, Any]) -> Iterator[None]:
    """One step a turn, for one epoch."""
    torch.manual_seed(0)
    load = benchload.build(config)
    torch.set_num_threads(load.threads or 1)
    model = load.model.train()
    optimizer = load.optimizer(model.parameters())
    inputs, labels = load.train
    total = 0.0
    for indices in torch.randperm(len(inputs)).split(load.batch_size):
        optimizer.zero_grad()
        loss = load.loss(model, (inputs[indices], labels[indices]))
        loss.backward()
        optimizer.step()
        total += loss.item()
        yield
