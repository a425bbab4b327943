"""Every rate is written before the update that uses it, and whatever else is found in its place is put right."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.reasons import RunReason
from esper_leyline.v1.common_pb2 import CircuitBreakerState
from esper_runtime import schedules
from esper_runtime.checkpoint import Wal
from esper_runtime.schedules import Plan, ScheduleError
from esper_runtime.tolaria.entrypoint import UserCodeError
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.groups import GroupError, seed_group, split, unsplit
from esper_runtime.tolaria.learning_rate import MAX_HISTORY, LearningRate
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.optimizers import factory_for
from esper_runtime.tolaria.stability import Calm, Part, Stability, Standing
from esper_runtime.tolaria.update import Update
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from tests.support.notices import Notices

PLAN = Plan(100, 10)


class Bench:
    """A learning rate over a model of two layers, in as many groups as there are dictionaries."""

    def __init__(
        self,
        *groups: dict[str, Any],
        schedule: object = None,
        stability: Stability | None = None,
        plan: Plan = PLAN,
        lr: Any = 0.1,
    ) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        made = [{"params": list(layer.parameters()), **g} for layer, g in zip(self.model, groups, strict=False)]
        for_torch, options = split(made, schedule)
        optimizer = SGD(for_torch or self.model.parameters(), lr=lr)
        self.update = Update(self.model, optimizer, options or unsplit(optimizer, schedule))
        self.metrics, self.notices = Metrics(None), Notices()
        self.rate = LearningRate(
            self.update,
            plan=plan,
            metrics=self.metrics,
            events=self.notices.events,
            stability=stability or Calm(),
        )

    def step(self, step: int, *, scale: float = 1.0) -> list[float]:
        self.rate.apply(step=step, epoch=step // 10, scale=scale)
        return self.live

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.update.optimizer.param_groups

    @property
    def live(self) -> list[float]:
        return [float(group["lr"]) for group in self.groups]


# Schedules of groups


@pytest.mark.row("T12")
def test_the_first_update_has_the_warm_up_rate_and_every_group_its_own():
    bench = Bench(
        {"lr": 0.1, "name": "slow", "schedule": schedules.constant(warmup_steps=10)},
        {"lr": 1.0, "name": "fast"},
        schedule=schedules.linear(t_max=100),
    )
    assert bench.step(0) == pytest.approx([0.01, 1.0])
    assert bench.step(50) == pytest.approx([0.1, 0.5])
    assert all(set(group) & {"name", "schedule", "min_lr", "max_lr"} == set() for group in bench.groups)


@pytest.mark.row("T12")
def test_a_function_is_a_schedule_and_gets_step_and_planned_steps():
    bench = Bench(schedule=lambda step, planned: step / planned)
    assert bench.step(25) == pytest.approx([0.025])


@pytest.mark.row("T12")
@given(st.floats(1e-6, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 200), st.floats(0.01, 1))
def test_rates_stay_within_the_groups_bounds(base: float, least: float, most: float, step: int, scale: float):
    least, most = sorted((least, most))
    bench = Bench(
        {"lr": base, "min_lr": least, "max_lr": most}, {"lr": base}, schedule=schedules.cosine(warmup_steps=9)
    )
    clamped, free = bench.step(step, scale=scale)
    assert clamped == min(max(free, least), most)


@pytest.mark.row("T12")
@given(st.floats(1e-3, 1), st.integers(0, 100))
def test_a_group_does_not_depend_on_its_neighbour(base: float, step: int):
    plateau = schedules.plateau(patience=0)
    one, other = Bench({"lr": 0.3}, {"lr": 1.0}, schedule=plateau), Bench({"lr": 0.3}, {"lr": base}, schedule=plateau)
    other.groups[1]["lr"] = 7.0
    for bench in (one, other):
        bench.rate.observe({"loss": 1.0}, step=10, epoch=0)
    assert one.step(step)[0] == other.step(step)[0]


def test_the_runs_own_scale_multiplies_every_rate_but_no_frozen_one_comes_alive():
    bench = Bench({"lr": 0.1}, {"lr": 0.2, "schedule": schedules.frozen(), "min_lr": 0.05})
    assert bench.step(0, scale=0.5) == pytest.approx([0.05, 0.0])


def test_tensor_rates_are_written_in_place():
    tensor = torch.tensor(0.1)
    bench = Bench(lr=tensor, schedule=schedules.constant(warmup_steps=10))
    assert bench.step(0) == pytest.approx([0.01])
    assert bench.groups[0]["lr"] is tensor
    bench.step(10)
    assert bench.notices.told == []


# Tampering


@pytest.mark.row("T12")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda group: group.update(lr=0.5), "was changed from 0.1 to 0.5"),
        (lambda group: group.update(lr=0.1 * (1 + 2e-6)), "was changed from 0.1 to 0.1"),
        (lambda group: group.update(lr=math.nan), "is nan"),
        (lambda group: group.update(lr=math.inf), "is inf"),
        (lambda group: group.update(lr=0.1 * (1 + 1e-8)), "outside of 0 to 0.1"),
        (lambda group: group.update(lr=torch.tensor(0.7)), "was changed from 0.1 to 0.7"),
    ],
)
def test_foreign_rate_is_noticed_before_the_next_update_and_put_back(change, words: str):
    bench = Bench({"lr": 0.1, "max_lr": 0.1, "name": "body"})
    bench.step(0)
    change(bench.groups[0])
    assert bench.step(1) == [0.1]
    assert type(bench.groups[0]["lr"]) is float
    [(reason, message)] = bench.notices.told
    assert reason == RunReason.LEARNING_RATE_TAMPERED
    assert "'body'" in message
    assert "before step 2" in message
    assert words in message
    assert bench.metrics.value("tolaria.lr_controller.violations_total", group="body") == 1
    assert bench.metrics.value("tolaria.lr_violations_total") == 1
    bench.step(2)
    assert len(bench.notices.told) == 1


@pytest.mark.row("T12")
@pytest.mark.parametrize("change", [lambda lr: lr.fill_(0.5), lambda lr: lr.data.mul_(3)])
def test_foreign_write_into_a_tensor_rate_is_noticed(change):
    bench = Bench(lr=torch.tensor(0.1))
    bench.step(0)
    change(bench.groups[0]["lr"])
    assert bench.step(1) == pytest.approx([0.1])
    assert bench.notices.reasons() == [RunReason.LEARNING_RATE_TAMPERED]


def test_replaced_tensor_rate_gets_its_tensor_back():
    tensor = torch.tensor(0.1)
    bench = Bench(lr=tensor)
    bench.groups[0]["lr"] = torch.tensor(0.2)
    bench.step(0)
    assert bench.groups[0]["lr"] is tensor
    assert bench.notices.reasons() == [RunReason.LEARNING_RATE_TAMPERED]


def test_rounding_is_no_foreign_change():
    bench = Bench()
    bench.step(0)
    bench.groups[0]["lr"] = 0.1 * (1 + 1e-7)
    bench.step(1)
    assert bench.notices.told == []


def test_a_scheduler_that_writes_in_every_step_is_told_ever_more_rarely():
    bench = Bench()
    for step in range(100):
        bench.groups[0]["lr"] = 0.5
        assert bench.step(step) == [0.1]
    assert len(bench.notices.told) == 7  # 1, 2, 4 ... 64
    assert bench.metrics.value("tolaria.lr_violations_total") == 100


@pytest.mark.row("T13")
def test_three_foreign_changes_open_the_breaker_and_make_the_run_conservative(tmp_path: Path):
    notices, metrics = Notices(), Metrics(None)
    facts = Facts(Wal(tmp_path / "wal"), run_seconds=lambda: 0.0)
    standing = Standing(
        facts=facts, events=notices.events, metrics=metrics, run_seconds=lambda: 0.0, monotonic=lambda: 0.0
    )
    bench = Bench(stability=standing)
    for step in range(3):
        assert standing.state_of(Part.LR_INTEGRITY) == CircuitBreakerState.CIRCUIT_BREAKER_STATE_CLOSED
        bench.groups[0]["lr"] = 0.5
        assert bench.step(step) == [0.1]
    assert standing.state_of(Part.LR_INTEGRITY) == CircuitBreakerState.CIRCUIT_BREAKER_STATE_OPEN
    assert standing.conservative
    assert metrics.value("tolaria.breaker.state", name="lr_integrity") == 2
    assert RunReason.BREAKER_OPENED in notices.reasons()


# Groups


@pytest.mark.row("T14")
def test_group_that_somebody_adds_behind_our_back_is_refused():
    bench = Bench({"lr": 0.1})
    bench.step(0)
    bench.update.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})
    with pytest.raises(UserCodeError, match="2 parameter groups, 1 are registered"):
        bench.step(1)


@pytest.mark.row("T14")
def test_optimizer_with_more_groups_than_are_registered_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    _, options = split([{"params": model[0].parameters(), "name": "first"}], None)
    with pytest.raises(GroupError, match="has 2 parameter groups, 1 are registered"):
        Update(model, optimizer, options)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"name": "a"}, {"name": "a"}], "parameter group 'a' is there already"),
        ([{"name": ""}], "name must be a text"),
        ([{"name": "x" * 65}], "name must be a text of 1 to 64"),
        ([{"min_lr": -1}], "parameter group 'group-0': min_lr is -1"),
        ([{"max_lr": math.inf}], "max_lr is inf"),
        ([{"min_lr": 0.2, "max_lr": 0.1}], "min_lr 0.2 is above max_lr 0.1"),
        ([{"schedule": "cosine"}], "parameter group 'group-0': schedule is 'cosine'"),
        ([{"name": "a", "schedule": schedules.cosine(min_rate=0.5)}], "parameter group 'a': schedule.min_rate is 0.5"),
    ],
)
def test_error_of_a_group_names_group_and_field(groups: list[dict[str, Any]], words: str):
    with pytest.raises((GroupError, ScheduleError)) as error:
        Bench(*groups)
    assert words in str(error.value)


@pytest.mark.row("T14")
def test_group_of_a_seed_has_a_tenth_of_the_base_rate_and_its_own_warm_up():
    bench = Bench(lr=0.4)
    bench.model.append(nn.Linear(2, 2))
    group = seed_group("seed-1", bench.update.groups[0], warmup_steps=20, step=30, epoch=3)
    bench.step(29)
    bench.update.add_parameters(list(bench.model[2].parameters()), group)
    assert bench.live == pytest.approx([0.4, 0.0004])
    assert bench.step(30) == pytest.approx([0.4, 0.0004])
    assert bench.step(40) == pytest.approx([0.4, 0.04 * (0.01 + 0.99 * 0.5)])
    assert bench.step(50) == pytest.approx([0.4, 0.04])
    assert bench.notices.told == []
    for epoch in range(5, 18):
        bench.rate.observe({"loss": 1.0}, step=10 * (epoch + 1), epoch=epoch)
    assert bench.step(180) == pytest.approx([0.4, 0.02])  # the adaptive policy: no progress in 11 epochs
    assert bench.metrics.value("tolaria.lr_controller.current_lr", group="seed-1") == pytest.approx(0.04)


@pytest.mark.row("T16")
def test_the_next_rate_after_a_rebuild_is_written_to_the_live_optimizer():
    bench = Bench({"lr": 0.1}, {"lr": 0.2}, schedule=schedules.linear())
    assert bench.step(50) == pytest.approx([0.05, 0.1])
    old = bench.update.optimizer
    bench.update.rebuild(factory_for("adamw", old))
    assert type(bench.update.optimizer) is AdamW
    assert bench.live == pytest.approx([0.05, 0.1])
    assert bench.step(75) == pytest.approx([0.025, 0.05])
    assert [group["lr"] for group in old.param_groups] == pytest.approx([0.05, 0.1])
    assert bench.notices.told == []


# What is wrong with a schedule shows as an error of the user's code


def test_schedule_that_gives_no_number_ends_the_run_with_the_groups_name():
    bench = Bench({"lr": 0.1, "name": "body"}, schedule=lambda step, planned: math.nan)
    with pytest.raises(UserCodeError, match="parameter group 'body': schedule gave nan for step 4"):
        bench.step(4)


def test_plateau_on_a_metric_that_no_epoch_reports_ends_the_run():
    bench = Bench(schedule=schedules.plateau(metric="accurracy"))
    with pytest.raises(UserCodeError, match=r"schedule\.metric is 'accurracy'.*there are accuracy, loss"):
        bench.rate.observe({"loss": 1.0, "accuracy": 0.5}, step=10, epoch=0)
    bench.rate.observe({}, step=10, epoch=0)  # an epoch whose batches were all left out


def test_length_that_nobody_knows_must_be_given():
    with pytest.raises(UserCodeError, match=r"schedule\.t_max is missing"):
        Bench(schedule=schedules.cosine(), plan=Plan(0, 0))
    assert Bench(schedule=schedules.cosine(t_max=10), plan=Plan(0, 0)).step(10) == [0.0]


# State


@pytest.mark.row("T12")
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.data())
def test_replay_after_a_rollback_gives_the_same_rates(losses: list[float], data: st.DataObject):
    schedule = schedules.plateau(patience=0, factor=0.5, threshold=0.0, warmup_steps=15)
    bench = Bench({"lr": 0.3}, {"lr": 0.7, "schedule": schedules.cosine(warmup_steps=7)}, schedule=schedule)
    back = data.draw(st.integers(0, len(losses) - 1))

    def train(begin: int) -> list[str]:
        written = []
        for epoch in range(begin, len(losses)):
            if epoch == back:
                saved.append(json.dumps(bench.rate.capture(), allow_nan=False))
            written += [rate.hex() for step in range(10 * epoch, 10 * epoch + 10) for rate in bench.step(step)]
            bench.rate.observe({"loss": losses[epoch]}, step=10 * epoch + 10, epoch=epoch)
        return written

    saved: list[str] = []
    first = train(0)
    history = list(bench.rate.history)
    bench.groups[0]["lr"] = 5.0  # what a rollback may leave
    bench.rate.restore(json.loads(saved[0]))
    assert train(back) == first[20 * back :]
    assert list(bench.rate.history) == history
    assert bench.notices.told == []


def test_state_saved_without_this_part_starts_anew():
    bench = Bench(schedule=schedules.plateau(patience=0))
    for epoch in range(3):
        bench.rate.observe({"loss": 1.0}, step=10 * epoch + 10, epoch=epoch)
    assert bench.step(30) == pytest.approx([0.025])
    bench.rate.restore({})
    assert bench.live == [0.1]
    assert list(bench.rate.history) == []


def test_history_is_bounded():
    bench = Bench()
    for epoch in range(MAX_HISTORY + 5):
        bench.rate.observe({"loss": 1.0}, step=epoch, epoch=epoch)
    assert len(bench.rate.history) == MAX_HISTORY
    assert bench.rate.history[-1].epoch == MAX_HISTORY + 4


def test_metrics_tell_the_rate_of_every_group_and_whether_there_is_a_schedule():
    bench = Bench({"lr": 0.1, "name": "a"}, {"lr": 0.2, "name": "b"})
    assert bench.metrics.value("tolaria.lr_controller.enabled") == 0
    assert bench.metrics.value("tolaria.lr_controller.current_lr", group="b") == 0.2
    assert Bench(schedule=schedules.frozen()).metrics.value("tolaria.lr_controller.enabled") == 1


def test_whole_numbers_and_options_of_torch_are_left_alone():
    model = nn.Linear(2, 2)
    made, options = split([{"params": model.parameters(), "lr": 1, "weight_decay": 0.3}], None)
    update = Update(model, AdamW(made), options)
    assert update.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert update.learning_rate == 1.0
