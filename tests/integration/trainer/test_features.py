"""Every kind of data and every feature, in the real trainer: interrupted, rolled back, and still the same bits."""

import math
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.exitcodes import ExitCode

from tests.support.trainers import PAUSED, Pod, Turns, same_bits
from tests.support.waiting import PATIENT_S

pytestmark = pytest.mark.timeout(240)
STEP = 12
CASES: dict[str, dict[str, Any]] = {
    "in memory": {},
    "map-style": {"data": "map", "noisy": True},
    "map-style, 2 workers": {"data": "map", "workers": 2, "noisy": True},
    "stream": {"data": "stream"},
    "stream without a state": {"data": "plainstream"},
    "stream, 2 workers": {"data": "stream", "workers": 2},
    "stream without a state, 2 workers": {"data": "plainstream", "workers": 2},
    "stream in fixed epochs": {"data": "stream", "steps_per_epoch": 15},
    "accumulation": {"accumulation_steps": 3, "samples": 170},
    "accumulation over a stream": {"data": "stream", "accumulation_steps": 2, "samples": 130},
    "accumulation, lbfgs": {"accumulation_steps": 2, "samples": 130, "optimizer": "lbfgs"},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "float16, accumulation": {"precision": "float16", "accumulation_steps": 2, "samples": 130},
}


def pod_of(root: Path, config: dict[str, Any], **parts: Any) -> Pod:
    config = {"read": str(root / "read"), **config}
    return Pod(root).configure(entrypoint="featured:build", config=config, **parts)


def read(pod: Pod) -> list[str]:
    """First samples of the training batches, in order."""
    return (pod.root / "read").read_text().split()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_interrupted_and_resumed_from_memory_it_ends_with_the_same_bits(tmp_path: Path, config: dict[str, Any]):
    """Steps after the last snapshot, which was at step 10, are made again, with the very same batches."""
    undisturbed = pod_of(tmp_path / "undisturbed", config)
    assert undisturbed.train().exit_code == ExitCode.COMPLETE
    pod = pod_of(tmp_path / "interrupted", config)
    parts, state = pod.assemble()
    assert Turns(parts, state).run(STEP) is PAUSED
    parts.checkpoints.close(PATIENT_S)
    parts.epoch_end.handshake.close()
    del parts, state
    seen = len(pod.losses())
    pod.trainer_start = 2
    assert pod.train().exit_code == ExitCode.COMPLETE
    assert pod.events("recovery")[0].to_step == 10
    after = len(pod.losses()) - seen
    assert pod.losses()[-after:] == undisturbed.losses()[-after:]
    assert read(pod)[-after:] == read(undisturbed)[-after:]
    assert pod.losses()[:seen] == undisturbed.losses()[:seen]
    same_bits(pod.newest(), undisturbed.newest())


@pytest.mark.parametrize("case", ["map-style, 2 workers", "stream", "stream, 2 workers", "float16"])
def test_resumed_from_the_volume_it_ends_with_the_same_bits(tmp_path: Path, case: str):
    undisturbed = pod_of(tmp_path / "undisturbed", CASES[case])
    assert undisturbed.train().exit_code == ExitCode.COMPLETE
    memory = {"mode": "Disabled"}
    pod = pod_of(tmp_path / "interrupted", CASES[case], checkpoint={"everySteps": 7, "memory": memory})
    parts, state = pod.assemble()
    assert Turns(parts, state).run(STEP) is PAUSED
    parts.checkpoints.close(PATIENT_S)
    parts.epoch_end.handshake.close()
    del parts, state
    pod.trainer_start = 2
    assert pod.train().exit_code == ExitCode.COMPLETE
    assert pod.events("recovery")[0].to_step == 7
    assert pod.losses()[-20:] == undisturbed.losses()[-20:]
    same_bits(pod.newest(), undisturbed.newest())


@pytest.mark.parametrize("kind", ["NonFiniteLoss", "NonFiniteGradient"])
@pytest.mark.parametrize(
    "case", ["map-style, 2 workers", "stream", "stream, 2 workers", "accumulation", "float16, accumulation", "bfloat16"]
)
def test_all_batches_of_a_poisoned_step_are_skipped_and_nothing_else_differs(tmp_path: Path, case: str, kind: str):
    pod = pod_of(tmp_path / "faulty", CASES[case], faultInjection=[{"kind": kind, "step": STEP}])
    assert pod.train().exit_code == ExitCode.COMPLETE
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.from_step, recovery.to_step) == (kind, STEP, 10)
    assert pod.counters().skipped_batches == 1  # a step's batches are one position
    expected = pod_of(tmp_path / "reference", CASES[case])
    assert expected.skipping(STEP - 1).exit_code == ExitCode.COMPLETE
    assert read(pod)[-8:] == read(expected)[-8:]
    assert pod.losses()[-8:] == expected.losses()[-8:]
    same_bits(pod.newest(), expected.newest())


def test_workers_give_what_no_workers_give(tmp_path: Path):
    """The order of a map-style dataset does not depend on who reads it; nor does a resume."""
    here, away = pod_of(tmp_path / "here", {"data": "map"}), pod_of(tmp_path / "away", {"data": "map", "workers": 2})
    for pod in (here, away):
        assert pod.train().exit_code == ExitCode.COMPLETE
    assert here.losses() == away.losses()
    same_bits(here.newest(), away.newest())


def test_total_steps_are_known_when_they_can_be(tmp_path: Path):
    fixed = pod_of(tmp_path / "fixed", {"data": "stream", "steps_per_epoch": 15})
    parts, state = fixed.assemble()
    assert state.total_steps(parts.epochs) == 30
    passes = pod_of(tmp_path / "passes", {"data": "stream"})
    parts, state = passes.assemble()
    assert state.total_steps(parts.epochs) == 0
    turns = Turns(parts, state)
    assert turns.run(10) is PAUSED
    assert parts.heart.total_steps == 0
    assert turns.run(10) is PAUSED
    assert parts.heart.total_steps == 2 * math.ceil(70 / 4)


def test_the_epochs_loss_is_a_mean_over_samples(tmp_path: Path):
    """Of 70 samples in batches of 4 the last batch has two: it weighs half. Groups of three do not change that."""
    for name, config in {"single": {}, "groups": {"accumulation_steps": 3}}.items():
        pod = pod_of(tmp_path / name, {"epochs": 1, "optimizer": "sgd", **config})
        assert pod.train().exit_code == ExitCode.COMPLETE
        losses = [float.fromhex(text) for text in pod.losses()]
        mean = (4 * sum(losses[:17]) + 2 * losses[17]) / 70
        (epoch,) = pod.events("epoch")
        told = {metric.name: metric.value for metric in epoch.metrics}
        assert told["train_loss"] == pytest.approx(mean, rel=1e-12), name
        assert told["train_loss"] != pytest.approx(sum(losses) / 18, rel=1e-6), name
