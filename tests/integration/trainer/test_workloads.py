"""The workloads that ship with the runtime, trained by the real trainer at a size of seconds."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers import Pod, same_bits

SMALL = {
    "chars": {"layers": 2, "width": 32, "heads": 2, "context": 16, "max_chars": 8_000, "batch_size": 16, "epochs": 2,
              "dropout": 0.1, "warmup_steps": 5},
    "regression": {"samples": 1000, "width": 16, "batch_size": 32, "epochs": 3},
}  # fmt: skip
NAN = {"kind": "NonFiniteLoss", "step": 23}


def pod(root: Path, name: str, **parts: Any) -> Pod:
    made = Pod(root).configure(entrypoint=f"esper_runtime.workloads.{name}:build", **parts)
    made.document["config"] = SMALL[name]
    made.write_config()
    return made


@pytest.mark.parametrize("name", SMALL)
def test_a_shipped_workload_learns_and_ends_after_a_nan_as_if_it_had_never_been(tmp_path: Path, name: str):
    faulty = pod(tmp_path / "faulty", name, faultInjection=[NAN])
    assert faulty.train().exit_code == 0
    assert [recovery.to_step for recovery in faulty.events("recovery")] == [20]
    losses = [{metric.name: metric.value for metric in epoch.metrics} for epoch in faulty.events("epoch")]
    assert losses[-1]["train_loss"] < losses[0]["train_loss"]
    undisturbed = pod(tmp_path / "undisturbed", name)
    assert undisturbed.skipping(NAN["step"] - 1).exit_code == 0
    same_bits(faulty.newest(), undisturbed.newest())


def test_goals_that_are_missed_are_told_upper_bounds_too(tmp_path: Path):
    run = pod(tmp_path, "regression")
    assert run.train().exit_code == 0
    said = [notice.message for notice in run.events("notice") if notice.reason == "Complete"]
    assert len(said) == 2
    assert said[0].startswith("goal missed: mae is ")
    assert said[0].endswith(", wanted <= 0.05")
    assert said[1].startswith("goal missed: r2 is ")
    assert said[1].endswith(", wanted >= 0.99")
