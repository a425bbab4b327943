"""The tiny workload with groups and schedules of its own, and perhaps somebody who sets learning rates beside them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import tiny
import torch
from esper_runtime import schedules
from esper_runtime.workload import Batch, Workload, read_config
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tiny.Config):
    optimizer: str = "sgd"
    epochs: int = 4
    tamper: bool = False
    """A scheduler of torch's beside ours."""
    metric: str = "loss"
    without_head: bool = False
    """The last layer is in no group, and frozen."""


def build(config: Mapping[str, Any]) -> Workload:
    c = read_config(Config, config)
    kept = {field.name: getattr(c, field.name) for field in dataclasses.fields(tiny.Config)}
    workload = tiny.build(kept)
    foreign: list[Any] = []

    def groups(model: nn.Module) -> Iterable[dict[str, Any]]:
        head = {id(parameter) for parameter in model.last.parameters()}
        for parameter in model.last.parameters() if c.without_head else ():
            parameter.requires_grad = False
        yield {
            "name": "body",
            "params": [p for p in model.parameters() if id(p) not in head],
            "schedule": schedules.plateau(factor=0.5, patience=0, threshold=0.9, metric=c.metric, warmup_steps=10),
        }
        if not c.without_head:
            yield {"name": "head", "params": list(model.last.parameters()), "lr": 0.02, "min_lr": 0.005}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = workload.optimizer(parameters)
        if c.tamper:
            foreign.append(torch.optim.lr_scheduler.ExponentialLR(made, gamma=0.5))
        return made

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        for scheduler in foreign if model.training else ():
            for group, rate in zip(scheduler.optimizer.param_groups, (0.3, 0.4), strict=True):
                group["lr"] = rate
        return workload.loss(model, batch)

    return dataclasses.replace(
        workload,
        parameter_groups=groups,
        optimizer=optimizer,
        schedule=schedules.cosine(warmup_steps=5),
        loss=loss,
    )
