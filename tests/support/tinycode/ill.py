"""The tiny workload, poisoned from inside: what a batch, a kernel or an optimizer that has gone wrong would leave.

A poison works at the evaluations from `at` on, counted in this process from 1 and never counted back, so that it does
not come again after a rollback.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tiny
import torch
from esper_runtime.workload import Batch, Workload
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Poison:
    what: str
    """loss, gradient, weight, moment, factor (of the loss and so of its gradient), or norm (of the gradient, with a
    loss that is one higher)."""
    value: str = "nan"
    at: int = 33
    times: int = 1


class _Backward(torch.autograd.Function):
    """Adds nothing to the loss and a number to a parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: float) -> Tensor:
        ctx.shape, ctx.value = parameter.shape, value
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.full(ctx.shape, ctx.value), None


def build(config: Mapping[str, Any]) -> Workload:
    poisons = [Poison(**poison) for poison in config.get("poisons", [])]
    workload = tiny.build({key: value for key, value in config.items() if key != "poisons"})
    evaluations = 0
    optimizers: list[torch.optim.Optimizer] = []
    make = workload.optimizer

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(make(parameters))  # type: ignore[operator]
        return optimizers[-1]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal evaluations
        value = workload.loss(model, batch)
        if model.training:
            evaluations += 1
            for poison in poisons:
                if poison.at <= evaluations < poison.at + poison.times:
                    value = _poisoned(poison, value, model, optimizers[-1])
        return value

    return replace(workload, loss=loss, optimizer=optimizer)


def _poisoned(poison: Poison, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    number = float(poison.value)
    if poison.what in ("loss", "factor"):
        return loss * number
    if poison.what in ("gradient", "norm"):
        higher = loss + 1.0 if poison.what == "norm" else loss
        return higher + _Backward.apply(model.last.weight, number)
    if poison.what == "weight":
        # Of no use to backward, which so stays finite: only the state shows it.
        model.last.bias.data[0] = number
    elif poison.what == "moment":
        for state in optimizer.state.values():
            state["exp_avg_sq"].view(-1)[0] = number
    return loss
