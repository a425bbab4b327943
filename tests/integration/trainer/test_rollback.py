"""Rollback inside the process: what comes after it equals, bit for bit, a run that never saw the poisoned batch."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers import PAUSED, Pod, Turns, close, same_bits

STEP = 23
BATCHES = 16
"""Per epoch of the tiny workload."""


def reference(tmp_path: Path, skipped: list[int], config: dict[str, Any], **parts: object) -> Pod:
    """An undisturbed run that leaves the batches with these numbers out from the start."""
    pod = Pod(tmp_path / "reference").configure(config=config, **parts)
    assert pod.skipping(*skipped).exit_code == 0
    return pod


@pytest.mark.parametrize("kind", ["NonFiniteLoss", "NonFiniteGradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lbfgs"])
def test_the_end_after_a_rollback_equals_that_of_a_run_without_the_poisoned_batch(
    tmp_path: Path, kind: str, optimizer: str
):
    if optimizer == "lbfgs" and kind == "NonFiniteGradient":
        pytest.skip("one is enough: LBFGS evaluates several times per step")
    fault = {"kind": kind, "step": STEP}
    pod = Pod(tmp_path / "faulty").configure(config={"optimizer": optimizer, "epochs": 3}, faultInjection=[fault])
    assert pod.train().exit_code == 0
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.from_step, recovery.to_step) == (kind, STEP, 20)
    assert recovery.verified
    expected = reference(tmp_path, [STEP - 1], {"optimizer": optimizer, "epochs": 3})
    assert pod.losses()[-20:] == expected.losses()[-20:]
    assert pod.losses() != expected.losses()
    same_bits(pod.newest(), expected.newest())


def test_rollback_shows_as_two_transitions_with_recovery_between(tmp_path: Path):
    pod = Pod(tmp_path).configure(faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}])
    began = time.monotonic()
    pod.train()
    took_ms = (time.monotonic() - began) * 1000
    assert pod.moves() == [
        ("STARTING", "RUNNING", "Training"),
        ("RUNNING", "ROLLING_BACK", "NonFiniteLoss"),
        ("ROLLING_BACK", "RUNNING", "RolledBack"),
        ("RUNNING", "SUCCEEDED", "Complete"),
    ]
    recovery = pod.events("recovery")[0]
    assert recovery.detect_ms >= 0
    assert recovery.recover_ms > 0
    assert recovery.detect_ms + recovery.recover_ms < took_ms
    assert (pod.counters().rollbacks, pod.counters().skipped_batches) == (1, 1)


def test_spike_is_found_after_three_steps_and_all_its_batches_are_skipped(tmp_path: Path):
    pod = Pod(tmp_path / "faulty").configure(
        config={"epochs": 4},
        faultInjection=[{"kind": "LossSpike", "step": 33}],
        health={"lossSpike": {"windowSteps": 80}},
    )
    assert pod.train().exit_code == 0
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.from_step, recovery.to_step) == ("LossSpike", 35, 30)
    assert pod.counters().skipped_batches == 3
    same_bits(
        pod.newest(),
        reference(tmp_path, [32, 33, 34], {"epochs": 4}, health={"lossSpike": {"windowSteps": 80}}).newest(),
    )


def test_candidate_snapshot_of_a_spiking_state_is_no_target(tmp_path: Path):
    """The snapshot of step 30 is only a candidate when step 31 spikes: step 25 is the target."""
    pod = Pod(tmp_path).configure(config={"epochs": 4}, faultInjection=[{"kind": "LossSpike", "step": 31}])
    pod.train()
    assert pod.events("recovery")[0].to_step == 25


@pytest.mark.row("T46")
def test_learning_rate_is_scaled_for_good(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}], rollback={"learningRateScale": "0.5"}
    )
    pod.train()
    assert [n.message for n in pod.events("notice") if n.reason == "LearningRateScaled"] == [
        "learning rate times 0.5 after a rollback: now 0.5 of its schedule"
    ]
    pod.attempt = 2
    _, state = pod.assemble()
    assert state.learning_rate_scale == 0.5


@pytest.mark.parametrize(("on_exhausted", "code", "end"), [("Halt", 75, "HALTED"), ("Fail", 73, "STOPPING")])
@pytest.mark.row("T46")
def test_exhausted_budget_ends_the_run_with_the_good_state_saved(
    tmp_path: Path, on_exhausted: str, code: int, end: str
):
    faults = [{"kind": "NonFiniteLoss", "step": step} for step in (STEP, STEP + 1)]
    pod = Pod(tmp_path).configure(faultInjection=faults, rollback={"maxRollbacks": 1, "onExhausted": on_exhausted})
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (code, "RollbacksExhausted", 20)
    assert pod.moves()[-1][1] == end
    assert pod.counters().rollbacks == 1


@pytest.mark.row("T46")
def test_budget_is_not_reset_by_a_restart(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}], rollback={"maxRollbacks": 1}, config={"epochs": 2}
    )
    assert pod.train().exit_code == 0
    pod.attempt = 2
    pod.configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": 40}], rollback={"maxRollbacks": 1}, config={"epochs": 3}
    )
    assert pod.train().reason == "RollbacksExhausted"


@pytest.mark.row("T46")
def test_a_rollback_counts_for_its_window_only(tmp_path: Path):
    faults = [{"kind": "NonFiniteLoss", "step": step} for step in (STEP, STEP + 5)]
    pod = Pod(tmp_path).configure(faultInjection=faults, rollback={"maxRollbacks": 1, "windowSeconds": 3600})
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    while not pod.events("recovery"):
        assert turns.run(1) is PAUSED
    state.clock.at_least(state.clock.seconds() + 3600)
    assert turns.run(100).exit_code == 0
    close(parts)
    assert pod.counters().rollbacks == 2


@pytest.mark.row("T46")
def test_batches_of_an_anomaly_are_used_again_where_asked(tmp_path: Path):
    pod = Pod(tmp_path / "faulty").configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}], rollback={"skipBatches": "None"}
    )
    assert pod.train().exit_code == 0
    assert (pod.counters().rollbacks, pod.counters().skipped_batches) == (1, 0)
    same_bits(pod.newest(), reference(tmp_path, [], {}).newest())


@pytest.mark.row("T46")
def test_ignored_anomaly_is_not_applied_and_training_goes_on(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        faultInjection=[{"kind": "NonFiniteGradient", "step": STEP}], health={"nonFiniteAction": "Ignore"}
    )
    assert pod.train().exit_code == 0
    assert not pod.events("recovery")
    assert pod.counters().skipped_batches == 1
    assert all(loss != "nan" for loss in pod.losses())


@pytest.mark.parametrize("kind", ["NonFiniteLoss", "NonFiniteGradient"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_that_was_left_out_is_left_out_again_when_it_is_replayed(tmp_path: Path, kind: str, precision: str):
    """The batch is sound, the fault was of the moment. Its random numbers are drawn all the same, its step counts."""

    def configured(name: str, *faults: dict[str, object]) -> Pod:
        return Pod(tmp_path / name).configure(
            config={"precision": precision},
            faultInjection=[{"kind": kind, "step": STEP}, *faults],
            health={"nonFiniteAction": "Ignore"},
        )

    undisturbed, killed = configured("undisturbed"), configured("killed", {"kind": "KillTrainer", "step": STEP + 2})
    assert undisturbed.train().exit_code == 0
    process = killed.spawn()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed.trainer_start = 2
    assert killed.train().exit_code == 0
    recovery = killed.events("recovery")[0]
    assert recovery.to_step < STEP, "the step is replayed"
    same_bits(killed.newest(), undisturbed.newest())
    assert [pod.counters().skipped_batches for pod in (undisturbed, killed)] == [1, 1]
    assert [notice.reason for notice in killed.events("notice")].count(kind) == 1


@pytest.mark.row("T46")
def test_halt_on_anomaly_keeps_the_good_state(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}], health={"nonFiniteAction": "Halt"}
    )
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (75, "NonFiniteLoss", 20)


def test_halt_on_anomaly_keeps_what_the_volume_has_where_that_is_newer(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}],
        health={"nonFiniteAction": "Halt"},
        checkpoint={"everySteps": 7, "memory": {"everySteps": 10}},
    )
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    for steps in (20, 1, 1):  # the disk is not busy when step 21 is due
        assert turns.run(steps) is PAUSED
        parts.checkpoints.wait()
    assert turns.run(10).saved_step == 21, "and step 22 has shown that it is good"
    close(parts)
    assert pod.newest().step == 21


@pytest.mark.parametrize("target", ["LatestVerified", "Best"])
@pytest.mark.row("T46")
def test_rollback_to_a_checkpoint_of_the_volume(tmp_path: Path, target: str):
    """Memory has a newer state than the volume, and the volume a newer one than the best."""
    pod = Pod(tmp_path / "faulty").configure(
        config={"epochs": 3},
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}],
        rollback={"target": target},
        checkpoint={"everySteps": 19, "memory": {"everySteps": 5}},
    )
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    for steps in (BATCHES, 1, 2):  # the disk is not busy when steps 16 and 19 are due
        assert turns.run(steps) is PAUSED
        parts.checkpoints.wait()
    assert turns.run(100).exit_code == 0
    close(parts)
    recovery = pod.events("recovery")[0]
    assert recovery.to_step == (19 if target == "LatestVerified" else BATCHES)
    same_bits(pod.newest(), reference(tmp_path, [STEP - 1], {"epochs": 3}).newest())


@pytest.mark.row("T46")
def test_without_memory_snapshots_the_volume_serves(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        checkpoint={"memory": {"mode": "Disabled"}, "everySteps": 8},
        faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}],
    )
    assert pod.train().exit_code == 0
    assert pod.events("recovery")[0].to_step == BATCHES
    assert not list((tmp_path / "shm").iterdir())


def test_nothing_to_go_back_to_counts_as_exhausted(tmp_path: Path):
    pod = Pod(tmp_path).configure(
        checkpoint={"memory": {"mode": "Disabled"}}, faultInjection=[{"kind": "NonFiniteLoss", "step": 3}]
    )
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason) == (75, "RollbacksExhausted")
    assert "nothing to roll back to" in outcome.message


@pytest.mark.parametrize(
    ("steps", "health", "made"),
    [
        ((), {}, 32),
        ((STEP,), {}, 31),
        ((STEP, STEP + 5), {}, 30),
        ((STEP,), {"nonFiniteAction": "Ignore"}, 32),  # such a step counts, although nothing was applied
    ],
)
def test_a_finished_run_has_made_all_its_steps(tmp_path: Path, steps: tuple[int, ...], health: object, made: int):
    faults = [{"kind": "NonFiniteLoss", "step": step} for step in steps]
    pod = Pod(tmp_path).configure(faultInjection=faults, health=health)
    assert pod.train().exit_code == 0
    beat = pod.heartbeat()
    assert beat is not None
    assert (beat.step, beat.total_steps) == (made, made)
    last = pod.events("epoch")[-1]
    assert (last.step, last.total_steps) == (made, made)


def test_progress_counts_a_skipped_batch_no_more_from_the_rollback_on(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 3}, faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}])
    pod.train()
    assert [(epoch.step, epoch.total_steps) for epoch in pod.events("epoch")] == [(16, 48), (31, 47), (47, 47)]


def test_a_batch_skipped_in_an_earlier_attempt_is_no_step_of_this_one(tmp_path: Path):
    pod = Pod(tmp_path).configure(faultInjection=[{"kind": "NonFiniteLoss", "step": STEP}])
    assert pod.train().exit_code == 0
    pod.attempt = 2
    pod.configure(config={"epochs": 3})
    assert pod.train().exit_code == 0
    beat = pod.heartbeat()
    assert beat is not None
    assert (beat.step, beat.total_steps) == (47, 47)
