"""The user's side of Esper: what to train. The only module that user code needs to import.

A run names an entrypoint `package.module:function`. Tolaria calls it once with `spec.runtime.config` and trains what
it returns; checkpoints, snapshots, rollback, halting and reports come by themselves. A complete example:

    from collections.abc import Mapping
    from dataclasses import dataclass
    from typing import Any

    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    from esper_runtime.workload import Workload, accuracy, read_config


    @dataclass(frozen=True)
    class Config:
        epochs: int = 10
        batch_size: int = 32
        learning_rate: float = 1e-3
        seed: int = 0


    def build(config: Mapping[str, Any]) -> Workload:
        c = read_config(Config, config)
        points = torch.randn(2000, 2, generator=torch.Generator().manual_seed(c.seed))
        labels = (points.prod(dim=1) > 0).long()
        return Workload(
            model=nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2)),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=c.learning_rate),
            loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
            train=(points[:1600], labels[:1600]),
            validation=(points[1600:], labels[1600:]),
            metrics=accuracy,
            epochs=c.epochs,
            batch_size=c.batch_size,
            seed=c.seed,
        )

What must hold for a resumed run to continue bit for bit: randomness comes from torch, numpy or `random` (their states
are saved), and state that training changes lives in the model's parameters and buffers.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from esper_leyline.reasons import RunReason
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_runtime.schedules import Schedule, as_schedule

__all__ = ["Batch", "ConfigError", "Data", "Goal", "Precision", "Sums", "Workload", "accuracy", "read_config"]

Batch = Any
"""What the data yields: the same structure as in-memory data, or what torch's default_collate makes of samples."""
Data = Any
"""In-memory tensors of equal length (a tensor, a tuple or a mapping of tensors), a map-style dataset, or, for training,
a torch IterableDataset."""
Precision = Literal["float32", "bfloat16", "float16"]
Sums = Mapping[str, tuple[float, int]]
"""Metric name -> (sum over the samples of one batch, number of samples)."""
Goal = float | tuple[Literal[">=", "<="], float]
"""A least value, or a relation and a value."""
C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Everything Tolaria needs to train. Build it under the global seeds that Tolaria has already set."""

    model: nn.Module
    optimizer: Callable[[Any], Optimizer]
    """Called once with `model.parameters()`, or with what `parameter_groups` returns."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """Scalar loss, the mean over the batch. Tolaria runs backward and the optimizer itself."""
    train: Data
    epochs: int
    batch_size: int
    validation: Data | None = None
    """Held-out data, evaluated after every epoch."""
    metrics: Callable[[nn.Module, Batch], Sums] | None = None
    """Evaluated on validation batches beside the loss, without gradients; see `accuracy`."""
    goals: Mapping[str, Goal] = dataclasses.field(default_factory=dict)
    """Metric -> least value that the finished model should reach, or ("<=", greatest) for what should be small; a run
    that misses one says so."""
    transform: Callable[[Batch], Batch] | None = None
    """Applied to each training batch, such as augmentation."""
    parameter_groups: Callable[[nn.Module], Iterable[dict[str, Any]]] | None = None
    """Optimizer groups with options of their own: torch's, and "name", "schedule", "min_lr", "max_lr" of Esper."""
    schedule: Schedule | Callable[[int, int], float] | None = None
    """Of every group without one of its own: one of esper_runtime.schedules, or a pure function (step from 0, planned
    steps) -> factor on the group's learning rate, so that a rollback replays it."""
    clip_gradient_norm: float | None = None
    """Upper bound on the L2 norm of all gradients together."""
    accumulation_steps: int = 1
    """Batches per step: their gradients are averaged before the optimizer moves. The last step of an epoch averages
    over what is left."""
    precision: Precision = "float32"
    """Of the forward pass: bfloat16 and float16 run it under autocast, float16 with a gradient scaler."""
    compile: str = "off"
    """off, or a mode of torch.compile for the loss function: default, reduce-overhead, max-autotune …"""
    tf32: bool = True
    """Lets float32 products use TF32 on GPUs that have it."""
    deterministic: bool = False
    """Only algorithms of torch that give the same bits every time; an operation without one fails."""
    cuda_graphs: bool = False
    """Replays forward and backward as one CUDA graph, where shapes are fixed."""
    prefetch: bool | Literal["auto"] = "auto"
    """Copies the next batch to the GPU while the current one computes; auto = on a GPU, for a dataset."""
    pin_memory: bool | Literal["auto"] = "auto"
    """Batches of a dataset in pinned memory; auto = on a GPU."""
    num_workers: int = 0
    """Processes that read the training dataset. They are started afresh, so the dataset must be importable."""
    collate: Callable[[list[Any]], Batch] | None = None
    """Samples of a dataset -> batch; torch's default_collate otherwise."""
    steps_per_epoch: int | None = None
    """Of an IterableDataset: an epoch ends after so many steps, and the stream goes on in the next one. Without it an
    epoch is one pass."""
    shuffle: bool = True
    drop_last: bool = False
    validation_batch_size: int | None = None
    seed: int = 0
    """Of the order of the data. Tolaria seeds torch, numpy and random with config["seed"] before `build`."""
    device: str = "auto"
    """auto = a GPU when there is one, else the CPU; or a torch device."""
    threads: int | None = None
    """CPU threads of torch; the default follows the container's CPU limit."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"Workload.model is {type(self.model).__name__}; give a torch.nn.Module")
        for name in ("optimizer", "loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Workload.{name} is not callable; give a function")
        if self.parameter_groups is not None and not callable(self.parameter_groups):
            raise TypeError("Workload.parameter_groups is not callable; give a function of the model")
        as_schedule(self.schedule, field="Workload.schedule")
        for name, least in {"epochs": 1, "batch_size": 1, "accumulation_steps": 1, "num_workers": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Workload.{name} is {value!r}; give an integer of at least {least}")
        if self.clip_gradient_norm is not None and not self.clip_gradient_norm > 0:
            raise ValueError(f"Workload.clip_gradient_norm is {self.clip_gradient_norm!r}; give a positive number")
        self._check_features()
        for name, goal in self.goals.items():
            relation_of(name, goal)

    def _check_features(self) -> None:
        """ValueError for a feature that does not exist or does not go with another."""
        if self.precision not in typing.get_args(Precision):
            known = ", ".join(typing.get_args(Precision))
            raise ValueError(f"Workload.precision is {self.precision!r}; give one of {known}")
        if not isinstance(self.compile, str):
            raise ValueError(f'Workload.compile is {self.compile!r}; give "off" or a mode of torch.compile')
        for name in ("prefetch", "pin_memory"):
            if getattr(self, name) not in (True, False, "auto"):
                raise ValueError(f'Workload.{name} is {getattr(self, name)!r}; give True, False or "auto"')
        if self.steps_per_epoch is not None and (not isinstance(self.steps_per_epoch, int) or self.steps_per_epoch < 1):
            raise ValueError(f"Workload.steps_per_epoch is {self.steps_per_epoch!r}; give an integer of at least 1")
        if self.cuda_graphs and (self.compile != "off" or self.precision == "float16" or self.accumulation_steps > 1):
            raise ValueError(
                "Workload.cuda_graphs goes with neither compile, nor float16, nor accumulation_steps: choose one "
                '(compile="reduce-overhead" makes CUDA graphs by itself)'
            )


def relation_of(name: str, goal: Goal) -> tuple[str, float]:
    """A goal as (">=" or "<=", value). ValueError for anything else."""
    relation, value = goal if isinstance(goal, tuple) and len(goal) == 2 else (">=", goal)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if relation not in (">=", "<=") or not number:
        raise ValueError(f'Workload.goals[{name!r}] is {goal!r}; give a least value, or ("<=", greatest value)')
    assert isinstance(value, (int, float))
    return relation, float(value)


def accuracy(model: nn.Module, batch: Batch) -> Sums:
    """Share of right classes, for batches (inputs, labels) and models that return one score per class."""
    inputs, labels = batch
    right = model(inputs).argmax(dim=1) == labels
    return {"accuracy": (float(right.sum()), len(labels))}


class ConfigError(ValueError):
    """spec.runtime.config cannot be used; the message names the key and the remedy."""

    def __init__(self, message: str, *, key: str, reason: RunReason) -> None:
        super().__init__(message)
        self.key = key
        self.reason = reason


def read_config(kind: type[C], config: Mapping[str, Any]) -> C:
    """`config` as an instance of the dataclass `kind`, checked against its annotations.

    Annotations may be bool, int, float, str, lists and dicts of them, Literal and `| None`; an integer is a float too.
    ConfigError for an unknown key, a missing one, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in config:
        if key not in fields:
            raise ConfigError(
                f"runtime.config.{key} is unknown to this workload; known keys: {', '.join(sorted(fields))}",
                key=key,
                reason=RunReason.UNKNOWN_CONFIG_KEY,
            )
    values = {key: _checked(f"runtime.config.{key}", hints[key], value) for key, value in config.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise ConfigError(
                f"runtime.config.{name} is missing; give a value of type {_name(hints[name])}",
                key=name,
                reason=RunReason.INVALID_SPEC,
            )
    return kind(**values)


def _checked(where: str, hint: Any, value: Any) -> Any:
    if not _fits(hint, value):
        raise ConfigError(
            f"{where} is {value!r}; give a value of type {_name(hint)}",
            key=where.rsplit(".", 1)[1],
            reason=RunReason.INVALID_SPEC,
        )
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], element) for element in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(arguments[1], element) for element in value.values())
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, type(None) if hint is None else hint)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_args(hint):
        return str(hint)
    return getattr(hint, "__name__", None) or str(hint)


def resolve_device(name: str) -> torch.device:
    """The torch device that `Workload.device` means on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
