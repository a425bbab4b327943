"""What the loop owes to watchers: how often, and what of an epoch becomes which gauge."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from esper_leyline import paths
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.publish import Publisher


class Lines:
    """In the place of the record."""

    def __init__(self) -> None:
        self.trouble = ""
        self.told: list[tuple[str, int, dict[str, Any]]] = []

    def append(self, event: str, *, step: int, **fields: Any) -> None:
        self.told.append((event, step, fields))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def seconds(self) -> float:
        """The run's own: from 0."""
        return self.now - 1000.0


class Desk:
    """A publisher with everything around it."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.clock, self.record, self.degradations = Clock(), Lines(), []
        self.metrics = Metrics(run_dir, monotonic=self.clock)
        self.sums = SimpleNamespace(steps=0, samples=0)
        self.judge = SimpleNamespace(norm=math.nan)
        self.state: Any = SimpleNamespace(step=0, loss=1.0, clock=self.clock, sums=self.sums, judge=self.judge)
        events: Any = SimpleNamespace(degradation=lambda name, **more: self.degradations.append((name, more)))
        self.publisher = Publisher(
            metrics=self.metrics,
            record=self.record,  # type: ignore[arg-type]
            events=events,
            device=torch.device("cpu"),
            monotonic=self.clock,
        )

    def step(self, seconds: float) -> None:
        self.clock.now += seconds
        self.state.step += 1
        self.sums.steps += 1
        self.sums.samples += 32
        self.publisher.after_step(self.state)

    def told(self, event: str) -> list[tuple[int, dict[str, Any]]]:
        return [(step, fields) for name, step, fields in self.record.told if name == event]


def test_losses_are_sampled_once_a_second_at_most():
    desk = Desk()
    for _ in range(1000):
        desk.step(0.01)
    steps = [step for step, _ in desk.told("tolaria.progress")]
    assert 9 <= len(steps) <= 11
    assert all(later - earlier >= 100 for earlier, later in pairwise(steps))


def test_a_run_of_two_weeks_has_a_few_thousand_samples():
    desk = Desk()
    for _ in range(14 * 24 * 360):
        desk.step(10.0)
    assert 1000 < len(desk.told("tolaria.progress")) < 6000


def test_a_loss_that_is_not_finite_is_no_sample():
    desk = Desk()
    desk.state.loss = float("nan")
    desk.step(1.0)
    assert desk.told("tolaria.progress") == []


def test_an_epoch_sets_its_gauges_before_and_after_the_boundary():
    desk = Desk()
    for _ in range(10):
        desk.step(0.5)
    desk.publisher.epoch_ends(desk.state)
    assert desk.metrics.value("tolaria.train.step_ms") == pytest.approx(500.0)
    assert desk.metrics.value("tolaria.train.samples_per_s") == pytest.approx(64.0)
    desk.clock.now += 2.0  # validation, boundary
    measured = {"train_loss": 0.5, "validation_loss": 0.25, "validation_accuracy": float("nan")}
    desk.publisher.epoch_ended(desk.state, measured)
    values = desk.metrics.snapshot()
    assert values["tolaria.training.latency_ms"] == pytest.approx(7000.0)
    assert values["tolaria.epoch_duration_seconds"] == pytest.approx(7.0)
    assert values["tolaria.training.loss"] == values["tolaria.current_loss"] == 0.5
    assert values["tolaria.validation.loss"] == 0.25
    assert "tolaria.validation.accuracy" not in values, "what is not finite is not known"
    assert values["tolaria.epochs.total"] == values["tolaria.epochs_completed_total"] == 1
    ((step, fields),) = desk.told("tolaria.metrics")
    assert (step, fields["values"]) == (10, values)


def test_a_rate_is_not_told_of_an_epoch_of_which_another_process_trained_a_part():
    desk = Desk()
    desk.sums.steps, desk.sums.samples = 5, 160  # restored
    for _ in range(5):
        desk.step(1.0)
    desk.publisher.epoch_ends(desk.state)
    assert desk.metrics.value("tolaria.train.step_ms") == pytest.approx(1000.0)
    assert desk.metrics.value("tolaria.train.samples_per_s") is None


def test_trouble_of_the_record_is_told_once_and_so_is_its_end():
    desk = Desk()
    desk.record.trouble = "record.jsonl: No space left on device"
    for _ in range(5):
        desk.step(1.0)
    desk.record.trouble = ""
    for _ in range(5):
        desk.step(1.0)
    assert [(name, more["degraded"], more["reason"]) for name, more in desk.degradations] == [
        ("record", True, "RecordIncomplete"),
        ("record", False, "RecordIncomplete"),
    ]
    assert "No space left" in desk.degradations[0][1]["message"]


def test_a_metrics_file_that_cannot_be_written_is_logged_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    desk = Desk(tmp_path)
    (tmp_path / paths.TRAINER_METRICS).mkdir()
    for _ in range(5):
        desk.step(1.5)
    assert len(caplog.records) == 1
    (tmp_path / paths.TRAINER_METRICS).rmdir()
    desk.step(1.5)
    assert "esper_tolaria_memory_usage_gb" in (tmp_path / paths.TRAINER_METRICS).read_text()


def test_the_norm_of_the_gradient_is_told_every_second_and_at_the_end_of_an_epoch() -> None:
    world = Desk()
    world.publisher.epoch_ends(world.state)
    assert world.metrics.value("tolaria.grad.norm_l2") is None
    world.judge.norm = 2.5
    world.publisher.after_step(world.state)
    assert world.metrics.value("tolaria.grad.norm_l2") == 2.5
    world.judge.norm = 3.5
    world.publisher.epoch_ends(world.state)
    assert world.metrics.value("tolaria.grad.norm_l2") == 3.5
