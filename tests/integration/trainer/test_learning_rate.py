"""Learning rates and optimizers in the real trainer: through restarts, rollbacks, foreign hands and rebuilds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.exitcodes import ExitCode
from esper_leyline.phases import RestoreOutcome
from esper_leyline.reasons import RunReason
from esper_runtime.tolaria.loop import Parts, train
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.rebuild import Rebuilds
from esper_runtime.tolaria.state import TrainState

from tests.support.trainers import Pod, Turns, same_bits
from tests.support.waiting import PATIENT_S

STEPS_PER_EPOCH = 16


def pod(root: Path, **config: Any) -> Pod:
    return Pod(root).configure(entrypoint="scheduled:build", config=config)


def close(parts: Parts) -> None:
    parts.step.close()
    parts.checkpoints.close(PATIENT_S)
    parts.epoch_end.handshake.close()


@pytest.mark.row("T12")
def test_restart_goes_on_with_the_rates_of_an_uninterrupted_run(tmp_path: Path):
    """With a plateau schedule that has reduced already, in the middle of an epoch."""
    whole, halved = pod(tmp_path / "whole"), pod(tmp_path / "halved")
    assert whole.train().exit_code is ExitCode.COMPLETE
    parts, state = halved.assemble()
    Turns(parts, state).run(45)
    first = state.update.groups[0]
    assert first.seen.reductions > 0
    close(parts)
    halved.trainer_start = 2
    parts, state = halved.assemble()
    assert state.update.groups[0].seen == first.seen
    assert state.step == 45
    assert train(parts, state).exit_code is ExitCode.COMPLETE
    close(parts)
    same_bits(halved.newest(), whole.newest())


@pytest.mark.row("T12")
def test_rollback_puts_rates_and_what_plateaus_remember_back(tmp_path: Path):
    run = pod(tmp_path)
    parts, state = run.assemble()
    turns = Turns(parts, state)
    seen: dict[int, list[str]] = {}

    def note(begin: int, end: int) -> None:
        for step in range(begin, end):
            turns.run(1)
            assert state.step == step + 1
            rates = [float(group["lr"]).hex() for group in state.update.optimizer.param_groups]
            assert seen.setdefault(step, rates) == rates

    note(0, 36)
    outcome, step = parts.memory.restore_good(state, before_step=31)
    assert outcome is RestoreOutcome.OK
    assert step == 30
    assert seen[31][0] != seen[32][0]  # a reduction, after an epoch that is closed a second time
    note(step, 40)
    close(parts)


@pytest.mark.row("T12")
@pytest.mark.row("T13")
def test_foreign_rates_change_no_bit_of_the_training_and_open_the_breaker(tmp_path: Path):
    clean, tampered = pod(tmp_path / "clean"), pod(tmp_path / "tampered", tamper=True)
    assert clean.train().exit_code is ExitCode.COMPLETE
    assert tampered.train().exit_code is ExitCode.COMPLETE
    assert tampered.losses() == clean.losses()
    for stem, tensors in clean.newest().tensors.items():
        if stem != "aux":
            assert all(torch.equal(tensor, tampered.newest().tensors[stem][n]) for n, tensor in tensors.items())
    told = [notice.reason for notice in tampered.events("notice")]
    assert told.count(RunReason.LEARNING_RATE_TAMPERED) == 8  # 2 groups, 64 steps: the 1st, 2nd, 4th ... 128th
    assert RunReason.BREAKER_OPENED in told
    assert RunReason.LEARNING_RATE_TAMPERED not in [notice.reason for notice in clean.events("notice")]
    assert any(d.reason == RunReason.CONSERVATIVE_MODE and d.degraded for d in tampered.events("degradation"))


def test_metric_that_no_epoch_reports_ends_the_run_without_a_restart(tmp_path: Path):
    run = pod(tmp_path, metric="f1")
    process = run.spawn()
    _, errors = process.communicate(timeout=50)
    assert process.returncode == ExitCode.USER_CODE, errors
    assert "schedule.metric is 'f1'" in run.events("failure")[-1].message


# At boundaries


class AtBoundary:
    """Does something at the end of one epoch, when it is closed."""

    def __init__(self, parts: Parts, epoch: int, act: Callable[[TrainState], None]) -> None:
        self._real: Any = parts.epoch_end
        self._epoch = epoch
        self._act = act

    def close(self, state: TrainState) -> Outcome | None:
        outcome: Outcome | None = self._real.close(state)
        if state.epoch == self._epoch:
            self._act(state)
        return outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def acting(run: Pod, epoch: int, act: Callable[[Rebuilds, TrainState], None]) -> tuple[Parts, TrainState]:
    parts, state = run.assemble()
    rebuilds = Rebuilds(memory=parts.memory, metrics=parts.epoch_end.registry, events=parts.epoch_end.events)
    boundary: Any = AtBoundary(parts, epoch, lambda state: act(rebuilds, state))
    return dataclasses.replace(parts, epoch_end=boundary), state


def as_adamw(rebuilds: Rebuilds, state: TrainState) -> None:
    rebuilds.rebuild_for(state, "adamw")


@pytest.mark.row("T15")
@pytest.mark.row("T16")
@pytest.mark.parametrize("source", ["memory", "checkpoint"])
def test_rebuilt_optimizer_survives_a_restart_and_follows_its_schedules(tmp_path: Path, source: str):
    whole, halved = pod(tmp_path / "whole"), pod(tmp_path / "halved")
    parts, state = acting(whole, 2, as_adamw)
    assert train(parts, state).exit_code is ExitCode.COMPLETE
    close(parts)
    assert RunReason.OPTIMIZER_REBUILT in [notice.reason for notice in whole.events("notice")]
    parts, state = acting(halved, 2, as_adamw)
    Turns(parts, state).run(45)
    before = [float(group["lr"]) for group in state.update.optimizer.param_groups]
    Turns(parts, state).run(1)
    assert before != [float(group["lr"]) for group in state.update.optimizer.param_groups]
    assert before[1] != 0.02
    if source == "checkpoint":
        parts.checkpoints.save_now(state)
    close(parts)
    if source == "checkpoint":
        for slot in (halved.root / "shm").iterdir():
            slot.unlink()
    halved.trainer_start = 2
    parts, state = halved.assemble()
    assert type(state.update.optimizer) is torch.optim.AdamW
    assert train(parts, state).exit_code is ExitCode.COMPLETE
    close(parts)
    same_bits(halved.newest(), whole.newest())


@pytest.mark.row("T14")
@pytest.mark.parametrize("removes", [False, True], ids=["add", "add and remove"])
def test_snapshots_and_rollback_work_after_parameters_came_and_went(tmp_path: Path, removes: bool):
    run = pod(tmp_path, without_head=True)

    def change(rebuilds: Rebuilds, state: TrainState) -> None:
        head: Any = state.model.get_submodule("last")
        for parameter in head.parameters():
            parameter.requires_grad = True
        rebuilds.add_parameters(state, list(head.parameters()), name="late", warmup_steps=8)
        if removes:
            rebuilds.remove_parameters(state, ["first.weight", "first.bias"])

    parts, state = acting(run, 1, change)
    turns = Turns(parts, state)
    turns.run(16)
    layout = state.layout
    turns.run(1)
    assert parts.memory.snapshots is not None
    assert [held.step for held in parts.memory.snapshots.held()] == [16], "older ones fit no more"
    turns.run(19)
    assert state.layout != layout
    bound = {id(tensor) for arena in (*state.update.arenas, *state.buffer_arenas) for tensor in arena.tensors}
    assert {id(tensor) for tensor in (*state.model.parameters(), *state.model.buffers())} == bound
    names = [name for name, _ in state.update.parameters()]
    assert ("first.weight" in names) is not removes
    assert "last.weight" in names
    late = state.update.groups[-1]
    assert (late.name, late.base_rate, late.from_step) == ("late", pytest.approx(0.005), 16)

    first = copies(state)
    turns.run(8)
    after = copies(state)
    outcome, step = parts.memory.restore_good(state, before_step=36)
    assert outcome is RestoreOutcome.OK
    assert step == 35
    turns.run(1)
    assert_same(copies(state), first)
    turns.run(8)
    assert_same(copies(state), after)
    close(parts)


def copies(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.live()[0].items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
