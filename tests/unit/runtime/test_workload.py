import sys
import types
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from esper_runtime import workload
from esper_runtime.workload import ConfigError, Workload, accuracy, read_config
from torch import nn


@dataclass(frozen=True)
class Config:
    epochs: int
    rate: float = 0.1
    name: str = "x"
    flag: bool = False
    sizes: list[int] = field(default_factory=list)
    mode: Literal["a", "b"] = "a"
    limit: int | None = None


def test_values_and_defaults():
    assert read_config(Config, {"epochs": 3, "rate": 1, "sizes": [1, 2], "limit": None}) == Config(3, 1.0, sizes=[1, 2])


@pytest.mark.parametrize(
    ("config", "reason", "words"),
    [
        (
            {"epoch": 1},
            "UnknownConfigKey",
            "runtime.config.epoch is unknown to this workload; known keys: epochs, flag,",
        ),
        ({}, "InvalidSpec", "runtime.config.epochs is missing; give a value of type int"),
        ({"epochs": "3"}, "InvalidSpec", "runtime.config.epochs is '3'; give a value of type int"),
        ({"epochs": True}, "InvalidSpec", "runtime.config.epochs is True"),
        ({"epochs": 1, "rate": "fast"}, "InvalidSpec", "type float"),
        ({"epochs": 1, "flag": 1}, "InvalidSpec", "type bool"),
        ({"epochs": 1, "sizes": [1, "2"]}, "InvalidSpec", "list"),
        ({"epochs": 1, "mode": "c"}, "InvalidSpec", "one of 'a', 'b'"),
        ({"epochs": 1, "limit": 1.5}, "InvalidSpec", "int | None"),
    ],
)
def test_config_error_names_key_and_remedy(config: dict[str, object], reason: str, words: str):
    with pytest.raises(ConfigError) as error:
        read_config(Config, config)
    assert error.value.reason == reason
    assert words in str(error.value)


def test_example_of_the_docstring_works_and_is_in_the_reference_page(request: pytest.FixtureRequest):
    text = workload.__doc__ or ""
    start = text.index("    from collections.abc")
    end = text.index("What must hold")
    example = "\n".join(line.removeprefix("    ") for line in text[start:end].strip("\n").splitlines())
    assert len([line for line in example.strip().splitlines() if line.strip()]) <= 30
    page = request.config.rootpath / "docs" / "reference" / "workload.md"
    assert example.strip() in page.read_text()
    module = types.ModuleType("example")
    sys.modules["example"] = module
    try:
        exec(compile(example, "example.py", "exec"), module.__dict__)
        built = module.build({"epochs": 2})
    finally:
        del sys.modules["example"]
    assert isinstance(built, Workload)
    assert built.loss(built.model, (built.train[0][:4], built.train[1][:4])).ndim == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": 3}, TypeError, "Workload.model is int"),
        ({"loss": 3}, TypeError, "Workload.loss is not callable"),
        ({"epochs": 0}, ValueError, "Workload.epochs is 0"),
        ({"batch_size": 1.5}, ValueError, "Workload.batch_size is 1.5"),
        ({"clip_gradient_norm": 0.0}, ValueError, "positive"),
    ],
)
def test_workload_refuses_what_cannot_train(change: dict[str, object], error: type[Exception], words: str):
    good: dict[str, object] = {
        "model": nn.Linear(1, 1),
        "optimizer": torch.optim.SGD,
        "loss": lambda model, batch: None,
        "train": torch.zeros(2),
        "epochs": 1,
        "batch_size": 1,
    }
    with pytest.raises(error, match=words):
        Workload(**{**good, **change})  # type: ignore[arg-type]


def test_accuracy_counts_right_answers():
    batch = (torch.eye(3), torch.tensor([0, 1, 0]))
    assert accuracy(nn.Identity(), batch) == {"accuracy": (2.0, 3)}
