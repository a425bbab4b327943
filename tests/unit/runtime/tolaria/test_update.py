"""The flat path must give the bits of a plain torch loop, for every class and option it is used with."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from esper_runtime.tolaria.update import Path, Update
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

STEPS = 12

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "sgd-momentum": partial(SGD, lr=0.1, momentum=0.9),
    "sgd-nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "sgd-foreach": partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(Adam, lr=0.01),
    "adam-amsgrad": partial(Adam, lr=0.01, amsgrad=True, weight_decay=1e-2),
    "adam-foreach": partial(Adam, lr=0.01, foreach=True, maximize=True),
    "adamw": partial(AdamW, lr=0.01),
    "adamw-amsgrad": partial(AdamW, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw-capturable": partial(AdamW, lr=0.01, foreach=True),
    "adamw-tensor-lr": lambda parameters: AdamW(parameters, lr=torch.tensor(0.01)),
    "rmsprop": partial(RMSprop, lr=0.01),
    "rmsprop-all": partial(RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": partial(Adagrad, lr=0.05),
    "adagrad-all": partial(Adagrad, lr=0.05, lr_decay=0.1, weight_decay=1e-2, initial_accumulator_value=0.1),
    "adadelta": partial(Adadelta, lr=1.0, weight_decay=1e-2),
    "adamax": partial(Adamax, lr=0.01, weight_decay=1e-2),
    "nadam": partial(NAdam, lr=0.01),
    "nadam-decoupled": partial(NAdam, lr=0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "radam": partial(RAdam, lr=0.01),
    "radam-decoupled": partial(RAdam, lr=0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "asgd": partial(ASGD, lr=0.05, t0=4, weight_decay=1e-2),
    "rprop": partial(Rprop, lr=0.01),
}


class Net(nn.Module):
    """Odd sizes, a 0-dim parameter, a tied weight, batch statistics and channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.inner = nn.Linear(7, 7)
        self.outer = nn.Linear(7, 7)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(7, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)) * self.scale
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(hidden)))))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(9, 3, 5, 5, generator=generator), torch.randint(0, 5, (9,), generator=generator))
        for _ in range(STEPS)
    ]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plain(model: nn.Module, optimizer: Optimizer) -> None:
    for images, labels in batches():
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


def ours(model: nn.Module, update: Update, *, start: int = 0, end: int = STEPS) -> None:
    for images, labels in batches()[start:end]:
        update.prepare()
        cross_entropy(model(images), labels).backward()
        update.collect()
        assert update.squared_norm() < float("inf")
        update.apply(lambda: torch.tensor(0.0))


def same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_update_gives_the_bits_of_a_plain_loop(name: str):
    expected, model = net(), net()
    plain(expected, OPTIMIZERS[name](expected.parameters()))
    update = Update(model, OPTIMIZERS[name](model.parameters()))
    assert update.path is Path.FLAT
    ours(model, update)
    assert update.path is Path.FLAT
    same_bits(model, expected)
