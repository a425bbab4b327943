"""The tiny workload with one oddity, chosen by config["odd"]; what is drawn at import is part of some of them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy
import tiny
import torch
from esper_runtime.workload import Batch, Workload
from torch import Tensor, nn
from torch.utils.data import IterableDataset

DRAWN_AT_IMPORT = torch.from_numpy(numpy.random.randn(64, 8).astype("float32"))
MARKED = 10
"""Sample whose batch is the odd one."""
SCORES = (0.9, 0.1, 0.5, 0.5, 0.5)


class Huge(torch.autograd.Function):
    """Zero, with a gradient that is finite and drives a parameter to infinity."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.shape = parameter.shape
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.full(ctx.shape, 3e38)


class Once(IterableDataset[tuple[Tensor, Tensor]]):
    """Around a generator, which can be read a single time."""

    def __init__(self) -> None:
        self.samples = ((torch.randn(8), torch.tensor(1)) for _ in range(40))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.samples


def build(config: Mapping[str, Any]) -> Workload:
    rest = {key: value for key, value in config.items() if key != "odd"}
    match config["odd"]:
        case "nan sample":
            load = tiny.build(rest)
            inputs = load.train[0].clone()
            inputs[MARKED] = float("nan")
            return replace(load, train=(inputs, *load.train[1:]))
        case "infinite metric":
            return replace(tiny.build(rest), metrics=lambda model, batch: {"perplexity": (float("inf"), 1)})
        case "huge gradient":
            return _huge(rest)
        case "worse epoch":
            return _worse(rest)
        case "read once":
            return replace(tiny.build(rest), train=Once(), validation=None, epochs=10, batch_size=4)
        case _:
            load = tiny.build(rest)
            return replace(load, train=(DRAWN_AT_IMPORT, load.train[1][:64]))


def _huge(config: Mapping[str, Any]) -> Workload:
    load = tiny.build(config)
    mark = load.train[0][MARKED, 0]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = load.loss(model, batch)
        if model.training and bool((batch[0][:, 0] == mark).any()):
            value = value + Huge.apply(model.last.bias)
        return value

    return replace(load, loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=2.0))


def _worse(config: Mapping[str, Any]) -> Workload:
    """Its score is best after the first epoch and bad after the second."""
    calls = iter(range(1_000_000))

    def score(model: nn.Module, batch: Batch) -> dict[str, tuple[float, int]]:
        return {"score": (SCORES[min(next(calls) // 4, len(SCORES) - 1)], 1)}

    return replace(tiny.build(config), metrics=score)
