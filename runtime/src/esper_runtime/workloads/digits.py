"""Handwritten digits (scikit-learn's, 1,797 images of 8 x 8, inside the package) and a small convolutional network.

A fifth of the images is held out. The defaults reach about 0.99 on it; size and augmentation are such that the whole
training is some two minutes of real compute on two cores. Smaller values of `epochs` and `width` make it a smoke test.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from esper_runtime.workload import Batch, Workload, accuracy, read_config

HELD_OUT = 360
_PIXEL_MAX = 16.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of runtime.config."""

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    width: int = 64
    """Channels of the first convolution; the second has twice as many."""
    hidden: int = 256
    dropout: float = 0.25
    augment: bool = True
    """Shift images by up to a pixel and add noise."""
    seed: int = 0


class Network(nn.Module):
    """Two convolutions, two fully connected layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, config.width, 3, padding=1),
            nn.BatchNorm2d(config.width),
            nn.ReLU(),
            nn.Conv2d(config.width, 2 * config.width, 3, padding=1),
            nn.BatchNorm2d(2 * config.width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(2 * config.width * 16, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images))
        return scores


def build(config: Mapping[str, Any]) -> Workload:
    """Entrypoint `esper_runtime.workloads.digits:build`."""
    c = read_config(Config, config)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / _PIXEL_MAX
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(c.seed))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return Workload(
        model=Network(c),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=c.learning_rate, weight_decay=c.weight_decay),
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        train=(images[train], labels[train]),
        validation=(images[held_out], labels[held_out]),
        validation_batch_size=HELD_OUT,
        metrics=accuracy,
        goals={"accuracy": 0.95},
        transform=augment if c.augment else None,
        epochs=c.epochs,
        batch_size=c.batch_size,
        seed=c.seed,
    )


def augment(batch: Batch) -> Batch:
    """Moves the whole batch by up to one pixel each way and adds noise."""
    images, labels = batch
    down, right = torch.randint(0, 3, (2,)).tolist()
    shifted = pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
    return shifted + 0.05 * torch.randn_like(shifted), labels
