"""Training that is odd in one way, and ends well or with the right words all the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from esper_leyline.exitcodes import ExitCode

from tests.support.trainers import PAUSED, Pod, Turns, close

DRAWS = """
import os, sys
from pathlib import Path
from esper_leyline.runconfig import parse
from esper_runtime.tolaria import trainer
from esper_runtime.tolaria.assemble import build, lay_out
from esper_runtime.tolaria.place import Place
if sys.argv[1] == "spare":
    assert trainer.warm() == ""
place = Place.read(os.environ)
built = build(lay_out(place, parse(place.config_file.read_text())))
print(built.workload.train[0].sum().item(), next(built.workload.model.parameters()).sum().item())
"""


def odd(root: Path, kind: str, *, config: dict[str, Any] | None = None, **sections: Any) -> Pod:
    return Pod(root).configure(entrypoint="odd:build", config={"odd": kind, "losses": "", **(config or {})}, **sections)


def test_an_ignored_nan_leaves_no_trace_in_the_model_or_its_checkpoints(tmp_path: Path):
    """The forward pass of the step that is left out has moved the statistics of a BatchNorm."""
    pod = odd(
        tmp_path,
        "nan sample",
        config={"optimizer": "sgd"},
        health={"nonFiniteAction": "Ignore"},
        checkpoint={"everySteps": 7, "memory": {"everySteps": 5}, "retention": {"keepLatest": 50}},
    )
    assert pod.train().exit_code == ExitCode.COMPLETE
    newest = pod.newest()
    assert newest.step == 32
    assert all(bool(torch.isfinite(value).all()) for value in newest.tensors["model"].values())


def test_what_a_module_draws_when_imported_is_the_same_in_a_spare(tmp_path: Path):
    pod = odd(tmp_path, "drawn at import")
    environment = {**os.environ, **pod.environment(), "OMP_NUM_THREADS": "1"}
    said = {
        how: subprocess.run(
            [sys.executable, "-c", DRAWS, how], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for how in ("cold", "spare")
    }
    assert said["cold"] == said["spare"]


def test_weights_that_an_earlier_step_broke_are_not_blamed_on_the_batch_that_shows_it(tmp_path: Path):
    pod = odd(
        tmp_path,
        "huge gradient",
        health={"lossSpike": {"action": "Ignore"}},
        checkpoint={"memory": {"everySteps": 10}},
        rollback={"maxRollbacks": 3},
    )
    parts, state = pod.assemble()
    try:
        assert Turns(parts, state).run(10_000).exit_code == ExitCode.COMPLETE
    finally:
        close(parts)
    assert pod.counters().rollbacks == 2, "once per epoch"


def test_a_pod_after_the_rollback_goes_on_from_where_it_led(tmp_path: Path):
    sections: dict[str, Any] = {
        "health": {"validation": {"action": "Rollback"}, "lossSpike": {"action": "Ignore"}},
        "checkpoint": {
            "everySteps": 5,
            "retention": {"metric": "score", "mode": "Max"},
            "memory": {"everySteps": 10},
        },
    }
    pod = odd(tmp_path, "worse epoch", config={"epochs": 4}, **sections)
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    poll = turns._control.poll
    turns._control = SimpleNamespace(poll=lambda: poll() or (PAUSED if pod.events("recovery") else None))
    assert turns.run(10_000) is PAUSED
    led = state.step
    assert led == 16
    parts.checkpoints.wait()
    close(parts)
    for name in ("run", "shm"):
        shutil.rmtree(pod.root / name)
    again = Pod(tmp_path, incarnation=2)
    again.document = pod.document
    again.write_config()
    parts, state = again.assemble()
    close(parts)
    assert state.step == led, "not from a checkpoint of the steps that were given up"


def test_a_metric_that_is_infinite_does_not_keep_the_model(tmp_path: Path):
    pod = odd(tmp_path, "infinite metric")
    assert pod.train().exit_code == ExitCode.COMPLETE
    assert (tmp_path / "checkpoints" / pod.uid / "export" / "model.safetensors").exists()


def test_a_stop_while_the_finished_model_is_measured_saves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best epoch's weights are in place then, beside the last step's optimizer."""
    checkpoint = {"everySteps": 1000, "retention": {"metric": "score", "mode": "Max"}, "memory": {"everySteps": 5}}
    pod = odd(tmp_path, "worse epoch", checkpoint=checkpoint)
    parts, state = pod.assemble()
    evaluate = type(parts.finish)._evaluate

    def drained(finish: Any, metrics: dict[str, float]) -> Any:
        parts.control._terminate = True
        return evaluate(finish, metrics)

    monkeypatch.setattr(type(parts.finish), "_evaluate", drained)
    last: dict[str, torch.Tensor] = {}
    take_best = type(parts.finish)._take_best

    def noted(finish: Any, state: Any) -> Any:
        last.update({name: value.detach().clone() for name, value in state.model.named_parameters()})
        return take_best(finish, state)

    monkeypatch.setattr(type(parts.finish), "_take_best", noted)
    try:
        assert Turns(parts, state).run(10_000).exit_code == ExitCode.DRAINED
    finally:
        close(parts)
    saved = pod.newest().tensors["model"]
    assert all(torch.equal(saved[name], value) for name, value in last.items())


def test_data_that_can_be_read_once_is_not_taken_for_ten_epochs(tmp_path: Path):
    with pytest.raises(ValueError, match="no batch in epoch 2"):
        odd(tmp_path, "read once").train()
