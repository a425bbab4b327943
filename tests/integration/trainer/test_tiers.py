"""The two tiers of rollback on the real trainer: exact, escalating, on time or said to be late, never half done."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy
import pytest
import torch
from esper_leyline.events import RunEvent
from esper_leyline.reasons import RunReason
from esper_leyline.v1 import common_pb2
from esper_leyline.v1.telemetry_pb2 import TelemetryLevel
from esper_runtime.checkpoint.errors import AbandonedError
from esper_runtime.tolaria import rng
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.restore import TornStateError
from esper_runtime.tolaria.rollback import Trouble
from esper_runtime.tolaria.state import TrainState

from tests.support.trainers import PAUSED, Pod, Turns, same_bits
from tests.support.waiting import until_sync

EVERY = 5
CALM = {"lossSpike": {"action": "Ignore"}, "gradientNorm": {"action": "Ignore"}}
CRITICAL = TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
FAST, FULL = common_pb2.ROLLBACK_TIER_FAST, common_pb2.ROLLBACK_TIER_FULL


def trained(pod: Pod, steps: int) -> tuple[Parts, TrainState, Turns]:
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    assert turns.run(steps) is PAUSED
    return parts, state, turns


def trouble(state: TrainState, *, first_suspect: int) -> Trouble:
    return Trouble(
        cause=RunReason.NON_FINITE_LOSS,
        message="a test",
        at_step=state.step + 1,
        first_suspect=first_suspect,
        poisoned=(),
        began_ns=0,
        detected_ns=0,
    )


def everything(state: TrainState) -> dict[str, Any]:
    """Every bit that a rollback has to bring back. Run seconds only ever grow."""
    tensors, blobs, meta = state.live()
    facts = {key: value for key, value in meta.items() if key != "seconds"}
    bits = {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return {**bits, **blobs, "facts": json.dumps(facts, sort_keys=True)}


def corrupt(parts: Parts, *steps: int) -> None:
    """Flips a bit of the tensors in the snapshots of these steps."""
    snapshots = parts.memory.snapshots
    assert snapshots is not None
    for held in snapshots.held():
        if held.step in steps:
            slot = snapshots._slots[held.slot]
            slot._bytes[slot._words[8] + 100] ^= 4


def missed_deadlines(pod: Pod) -> list[int]:
    """Levels of the events that weatherlight passes on as such."""
    return [event.level for event in pod.events() if event.name == RunEvent.ROLLBACK_DEADLINE]


def finish(pod: Pod, turns: Turns) -> None:
    assert turns.run(10_000).exit_code == 0


# Exact


@pytest.mark.row("T18", "T19")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rare_head", [False, True], ids=["flat", "per-tensor"])
def test_twice_to_the_same_snapshot_is_equal_in_every_bit(tmp_path: Path, optimizer: str, rare_head: bool):
    pod = Pod(tmp_path).configure(
        config={"optimizer": optimizer, "rare_head": rare_head}, rollback={"maxRollbacks": 100}
    )
    parts, state, turns = trained(pod, 20)
    want = everything(state)
    for steps in (1, 3, 4):
        assert turns.run(steps) is PAUSED
        numpy.random.standard_normal()
        assert everything(state) != want
        assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=21)) is None
        assert everything(state) == want
    assert (state.update.path == "per-tensor") is rare_head
    assert [recovery.tier for recovery in pod.events("recovery")] == [FAST] * 3


@pytest.mark.row("T18")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_losses_after_a_rollback_are_those_of_an_undisturbed_run(tmp_path: Path, optimizer: str):
    pod = Pod(tmp_path / "rolled").configure(config={"optimizer": optimizer, "epochs": 3})
    parts, state, turns = trained(pod, 23)
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=21)) is None
    assert turns.run(20) is PAUSED
    plain = Pod(tmp_path / "plain").configure(config={"optimizer": optimizer, "epochs": 3})
    trained(plain, 40)
    assert pod.losses()[-20:] == plain.losses()[-20:]


@pytest.mark.row("T23")
@pytest.mark.parametrize(("cadence", "steps"), [(2, [0, 2, 4]), (1, [0, 1, 2, 3, 4, 5]), (5, [0, 5]), (7, [0])])
def test_snapshots_are_taken_at_their_cadence(tmp_path: Path, cadence: int, steps: list[int]):
    pod = Pod(tmp_path).configure(checkpoint={"memory": {"everySteps": cadence, "snapshots": 8}})
    parts, _, _ = trained(pod, 5)
    assert parts.memory.snapshots is not None
    assert sorted(held.step for held in parts.memory.snapshots.held()) == steps


# Escalating


@pytest.mark.row("T19")
def test_a_corrupt_snapshot_gives_way_to_an_older_one(tmp_path: Path):
    parts, state, _ = trained(pod := Pod(tmp_path).configure(), 22)
    corrupt(parts, 20)
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=22)) is None
    assert state.step == 15
    assert pod.events("recovery")[0].tier == FAST


@pytest.mark.row("T19", "T20")
def test_when_all_snapshots_are_corrupt_the_volume_serves(tmp_path: Path):
    checkpoint = {"memory": {"everySteps": EVERY}, "everySteps": 8}
    pod = Pod(tmp_path / "rolled").configure(config={"epochs": 3}, checkpoint=checkpoint)
    parts, state, turns = trained(pod, 22)
    parts.checkpoints.wait()
    corrupt(parts, 0, 5, 10, 15, 20)
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=22)) is None
    recovery = pod.events("recovery")[0]
    assert (recovery.to_step, recovery.tier) == (16, FULL)
    assert pod.counters().restores_failed_integrity == 1
    assert [n.message[:43] for n in pod.events("notice") if n.reason == "RestoreFailed"] == [
        "Fast tier of rollback: integrity_failed aft"
    ]
    finish(pod, turns)
    plain = Pod(tmp_path / "plain").configure(config={"epochs": 3}, checkpoint=checkpoint)
    assert plain.train().exit_code == 0
    same_bits(pod.newest(), plain.newest())


# On time


@pytest.mark.row("T19", "T22", "K07")
def test_a_late_fast_rollback_is_kept_and_counted(tmp_path: Path):
    parts, state, _ = trained(pod := Pod(tmp_path).configure(rollback={"fastDeadlineMilliseconds": 0}), 22)
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=22)) is None
    assert state.step == 20
    assert pod.counters().restores_over_deadline == 1
    assert pod.events("transition")[-1].message == "back at step 20, later than it should be"
    assert missed_deadlines(pod) == [CRITICAL]


@pytest.mark.row("T20", "T22", "T26")
@pytest.mark.parametrize(("on_exhausted", "code"), [("Halt", 75), ("Fail", 73)])
def test_a_full_tier_over_its_deadline_ends_the_run_with_the_model_unchanged(
    tmp_path: Path, on_exhausted: str, code: int, monkeypatch: pytest.MonkeyPatch
):
    pod = Pod(tmp_path).configure(
        checkpoint={"memory": {"mode": "Disabled"}, "everySteps": 8},
        rollback={"fullDeadlineSeconds": 0, "onExhausted": on_exhausted},
    )
    parts, state, _ = trained(pod, 22)
    before = everything(state)
    told_to_stop = Event()

    def endless(*, before_step: int, stop: Callable[[], bool]) -> None:
        until_sync(stop, what="the deadline")
        told_to_stop.set()
        raise AbandonedError("nobody waits")

    monkeypatch.setattr(parts.checkpoints.store, "load_newest", endless)
    outcome = parts.rollbacks.roll_back(state, trouble(state, first_suspect=22))
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (code, "RestoreFailed", None)
    assert "Full tier: deadline_exceeded" in outcome.message
    assert told_to_stop.wait(30)
    assert everything(state) == before
    assert pod.counters().restores_over_deadline == 1
    assert pod.counters().rollbacks == 0
    assert missed_deadlines(pod) == [CRITICAL]


# Never half done


def test_a_copy_that_breaks_off_is_replaced_by_the_next_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts, state, turns = trained(pod := Pod(tmp_path / "rolled").configure(), 22)
    real, calls = rng.restore, []

    def fragile(states: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no")
        real(states)

    monkeypatch.setattr(rng, "restore", fragile)
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=22)) is None
    assert state.step == 15
    finish(pod, turns)
    plain = Pod(tmp_path / "plain").configure()
    assert plain.train().exit_code == 0
    same_bits(pod.newest(), plain.newest())


def test_a_copy_that_breaks_off_and_is_not_replaced_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts, state, _ = trained(pod := Pod(tmp_path).configure(), 22)

    def fragile(_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(rng, "restore", fragile)
    with pytest.raises(TornStateError):
        parts.rollbacks.roll_back(state, trouble(state, first_suspect=22))
    assert pod.counters().restores_failed_apply >= 1
    monkeypatch.undo()
    pod.trainer_start = 2
    _, again = pod.assemble()
    assert again.step == 20


def test_a_start_from_corrupt_memory_is_as_fresh_as_one_without(tmp_path: Path):
    """Nothing of a snapshot that does not verify may reach the model that training then starts with."""
    pod = Pod(tmp_path / "corrupt").configure(checkpoint={"memory": {"everySteps": EVERY}, "everySteps": 1000})
    parts, _, _ = trained(pod, 12)
    corrupt(parts, 0, 5, 10)
    pod.trainer_start = 2
    _, state = pod.assemble()
    _, fresh = Pod(tmp_path / "fresh").configure().assemble()
    assert everything(state) == everything(fresh)


# Poison that no loss shows


def poison_moment(state: TrainState) -> None:
    """An infinite second moment: its parameter never moves again, and no loss ever tells."""
    _, moments = state.update.live_state()
    next(moment for name, moment in moments.items() if name.endswith("exp_avg_sq")).view(-1)[5] = math.inf


@pytest.mark.row("T11", "T19")
def test_an_infinite_moment_is_found_by_the_next_snapshot_and_undone(tmp_path: Path):
    pod = Pod(tmp_path / "poisoned").configure(config={"epochs": 3})
    _, state, turns = trained(pod, 21)
    poison_moment(state)
    finish(pod, turns)
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.from_step, recovery.to_step) == ("NonFiniteWeight", 25, 20)
    assert pod.counters().skipped_batches == 5
    notice = next(n for n in pod.events("notice") if n.reason == "NonFiniteWeight")
    assert notice.message.startswith("after step 25 not all of exp_avg_sq of ")
    plain = Pod(tmp_path / "plain").configure(config={"epochs": 3})
    assert plain.skipping(*range(20, 25)).exit_code == 0
    same_bits(pod.newest(), plain.newest())


def test_an_infinite_moment_after_the_last_snapshot_is_found_at_the_end(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 2})
    parts, state, turns = trained(pod, 31)
    poison_moment(state)
    finish(pod, turns)
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.from_step, recovery.to_step) == ("NonFiniteWeight", 32, 30)
    assert parts.memory.check(state) is None


def test_ignored_it_costs_snapshots_only_and_is_said_once(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 3}, health={"nonFiniteAction": "Ignore"})
    parts, state, turns = trained(pod, 21)
    poison_moment(state)
    assert turns.run(20) is PAUSED
    assert parts.memory.snapshots is not None
    assert max(held.step for held in parts.memory.snapshots.held()) == 20
    assert [n.reason for n in pod.events("notice")].count("NonFiniteWeight") == 1
    assert not pod.events("recovery")


def test_halt_on_it_keeps_the_last_sound_state(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"epochs": 3}, health={"nonFiniteAction": "Halt"})
    _, state, turns = trained(pod, 21)
    poison_moment(state)
    outcome = turns.run(100)
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (75, "NonFiniteWeight", 20)


@pytest.mark.row("T11")
def test_a_buffer_that_is_infinite_from_the_start_is_meant_so(tmp_path: Path):
    pod = Pod(tmp_path).configure(config={"masked": True})
    parts, state, turns = trained(pod, 12)
    assert parts.memory.snapshots is not None
    assert parts.memory.snapshots.held()[0].step == 10
    with torch.no_grad():
        state.model.get_buffer("norm.running_mean")[3] = math.nan
    assert turns.run(10) is PAUSED
    recovery = pod.events("recovery")[0]
    assert (recovery.cause, recovery.to_step) == ("NonFiniteWeight", 10)
    assert bool(state.model.get_buffer("mask").isinf().any())


# Without room


def test_without_room_training_goes_on_without_snapshots_and_says_so(tmp_path: Path):
    pod = Pod(tmp_path).configure(checkpoint={"memory": {"everySteps": EVERY, "maxBytes": 100_000}, "everySteps": 8})
    assert pod.train().exit_code == 0
    degradation = pod.events("degradation")[0]
    assert (degradation.component, degradation.reason) == ("snapshot", "SnapshotsDisabled")
    assert "do not fit" in degradation.message
    assert not list((tmp_path / "shm").iterdir())


# Fast


@pytest.mark.row("T19")
@pytest.mark.timeout(300)
def test_a_thousand_rollbacks_of_ten_megabytes_take_less_than_half_a_second_each(tmp_path: Path):
    """The CPU's part of the row: parameters, buffers and two moments, everything counted that a rollback does."""
    pod = Pod(tmp_path).configure(config={"width": 52_000}, rollback={"maxRollbacks": 10**6}, health=CALM)
    parts, state, _ = trained(pod, 6)
    assert sum(tensor.nbytes for tensor in state.restore_targets().values()) > 9e6
    assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=6)) is None
    want = everything(state)
    took: list[float] = []
    for number in range(1000):
        next(state.model.parameters()).data.fill_(math.nan)
        began = parts.rollbacks._monotonic()
        assert parts.rollbacks.roll_back(state, trouble(state, first_suspect=6)) is None
        took.append(parts.rollbacks._monotonic() - began)
        assert number % 100 or everything(state) == want
    assert sorted(took)[989] <= 0.5
