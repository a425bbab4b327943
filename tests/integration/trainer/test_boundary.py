"""The boundary of a real trainer: its budget, what a breach leads to, what Tamiyo is told, how a run halts itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.reasons import RunReason
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandOptimizerAdjustment, CommandType
from esper_leyline.v1.common_pb2 import OptimizerFamily
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.tolaria.breaker import CLOSED, OPEN
from esper_runtime.tolaria.commands import Obeyed
from esper_runtime.tolaria.handshake import BoundaryResult, Silence, Timings
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.packet import Trend
from esper_runtime.tolaria.stability import Part

from tests.support.standing import Clock
from tests.support.trainers import PAUSED, Pod, Turns
from tests.support.waiting import PATIENT_S

SLOW_MS = 25.0
BATCHES = 16
BOTH = frozenset({"kasmina", "tamiyo"})


class Sidecars:
    """In the place of the handshake: answers as told and notes what it was asked."""

    def __init__(self) -> None:
        self.packets: list[SystemStatePacket] = []
        self.command: AdaptationCommand | None = None
        self.heard = BOTH
        self.silent: tuple[Silence, ...] = ()
        self.before_answer: Callable[[], None] = lambda: None
        self.awaiting = False
        self.socket = 1

    def exchange(self, packet: SystemStatePacket) -> BoundaryResult:
        self.packets.append(packet)
        self.before_answer()
        return self._result(self.heard, self.silent, self.command)

    def collect(self) -> BoundaryResult:
        return self._result(frozenset(), (), None)

    def _result(
        self, heard: frozenset[str], silent: tuple[Silence, ...], command: AdaptationCommand | None
    ) -> BoundaryResult:
        return BoundaryResult(
            command=command,
            late=False,
            answered=bool(heard),
            rejections=(),
            degradations=(),
            heard=heard,
            silent=silent,
            timings=Timings(open_ms=0.5, evaluate_ms=2.5, submit_ms=0.5, total_ms=3.5)
            if heard
            else Timings(total_ms=0),
        )

    def signs_of_life(self) -> dict[str, tuple[int, int]]:
        return {"kasmina": (self.socket, 0), "tamiyo": (self.socket, 0)}

    def close(self) -> None:
        return

    def die(self) -> None:
        """Tamiyo is gone; Kasmina is not."""
        self.heard = frozenset({"kasmina"})
        self.silent = (Silence(component="tamiyo", timed_out=False, message="tamiyo does not answer: refused"),)

    def come_back(self) -> None:
        self.heard, self.silent = BOTH, ()


class Trainer:
    """On a clock that stands still unless a test lets it pass, with sidecars that answer."""

    def __init__(self, root: Path, *, epochs: int = 60, **parts: Any) -> None:
        self.pod = Pod(root).configure(config={"epochs": epochs, "samples": BATCHES * 4, "batch_size": 4}, **parts)
        self.parts, self.state = self.pod.assemble()
        self.clock = Clock()
        self.end = self.parts.epoch_end
        self.end.clock_ns = self.clock.ns
        self.sidecars = Sidecars()
        self.end.consult.handshake.close()
        self.end.consult.handshake = self.sidecars  # type: ignore[assignment]
        self.standing = self.end.standing
        for breaker in self.standing._breakers.values():
            breaker._monotonic = self.clock
        self.standing._mode._monotonic = self.clock
        self.standing._mode._counted_at = self.clock.now
        self.standing._levels._seconds = self.clock
        self.turns = Turns(self.parts, self.state)

    def epochs(self, number: int = 1) -> Outcome:
        """Up to the first step after so many boundaries."""
        return self.turns.run((self.state.step // BATCHES + number) * BATCHES + 1 - self.state.step)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.end.registry.value(name, **labels)

    def notices(self, reason: str) -> list[str]:
        return [notice.message for notice in self.pod.events("notice") if notice.reason == reason]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def slow_down(trainer: Trainer, part: str, ms: float = SLOW_MS) -> None:
    """Lets time pass inside one part of every boundary from now on."""
    end: Any = trainer.end
    places = {
        "assembly": (end.packets, "assemble"),
        "tamiyo": (end.consult, "ask"),
        "apply": (end.commands, "obey"),
        "guard": (end.consult, "account"),
    }
    owner, name = places[part]
    real = getattr(owner, name)

    def slow(*arguments: Any) -> Any:
        trainer.clock.pass_s(ms / 1e3)
        return real(*arguments)

    setattr(owner, name, slow)
    trainer.sidecars.command = AdaptationCommand(
        version=1, command_id="c", command_type=CommandType.COMMAND_TYPE_NO_OPERATION
    )


@pytest.mark.row("T01")
@pytest.mark.parametrize("part", ["assembly", "tamiyo", "apply", "guard"])
def test_25_ms_in_any_part_are_a_breach_of_that_part(trainer: Trainer, part: str):
    slow_down(trainer, part)
    assert trainer.epochs() is PAUSED
    assert trainer.metric("tolaria.boundary.breaches_total", part=part) == 1
    others = {"assembly", "tamiyo", "apply", "guard"} - {part}
    assert [trainer.metric("tolaria.boundary.breaches_total", part=other) for other in others] == [None] * 3
    assert trainer.metric("tolaria.epoch_hook.latency_ms") == pytest.approx(SLOW_MS)
    assert trainer.end.times is not None
    assert trainer.end.times.parts == pytest.approx({part: SLOW_MS, **dict.fromkeys(others, 0.0)})
    (message,) = trainer.notices("BoundaryBudgetExceeded")
    assert message.startswith(f"{part}: the boundary took 25.0 ms of 18: ")
    assert f"{part} 25.0 of " in message
    assert trainer.standing._breakers[Part.BOUNDARY_TIMING].failures == 1
    assert trainer.standing.level == 1
    rendered = trainer.end.registry.render()
    assert f'esper_tolaria_boundary_{part}_ms_bucket{{le="25"}} 1' in rendered
    assert f'esper_tolaria_boundary_{part}_ms_bucket{{le="18"}} 0' in rendered


@pytest.mark.row("T01")
@pytest.mark.parametrize(("ms", "breach"), [(17.9, False), (18.0, False), (18.1, True)])
def test_the_whole_counts_and_its_limit_is_18_ms(trainer: Trainer, ms: float, breach: bool):
    """A part over its own budget is no breach as long as the whole is within."""
    slow_down(trainer, "guard", ms)
    trainer.epochs()
    assert (trainer.metric("tolaria.boundary.breaches_total", part="guard") == 1) == breach
    assert bool(trainer.notices("BoundaryBudgetExceeded")) == breach
    assert trainer.standing.level == int(breach)


@pytest.mark.row("T01")
def test_the_guilty_part_is_the_one_that_is_over_by_most(trainer: Trainer):
    slow_down(trainer, "tamiyo", 14.0)
    slow_down(trainer, "assembly", 8.0)
    trainer.epochs()
    assert trainer.metric("tolaria.boundary.breaches_total", part="assembly") == 1
    assert trainer.metric("tolaria.boundary.breaches_total", part="tamiyo") is None


@pytest.mark.row("T01")
def test_what_a_boundary_leads_to_is_timed_beside_it(trainer: Trainer):
    save = trainer.end.checkpoints.submit

    def slow_save(*arguments: Any) -> None:
        trainer.clock.pass_s(0.5)
        save(*arguments)

    trainer.end.checkpoints.submit = slow_save  # type: ignore[method-assign]
    trainer.sidecars.command = AdaptationCommand(
        version=1, command_id="c", command_type=CommandType.COMMAND_TYPE_ROLLBACK
    )
    roll_back = trainer.parts.rollbacks.roll_back

    def slow_rollback(*arguments: Any) -> Any:
        trainer.clock.pass_s(1.5)
        return roll_back(*arguments)

    trainer.parts.rollbacks.roll_back = slow_rollback  # type: ignore[method-assign]
    assert trainer.turns.run(BATCHES) is PAUSED
    assert trainer.end.close(trainer.state) is None
    assert trainer.state.step < BATCHES
    assert trainer.end.times is not None
    assert trainer.end.times.total == 0.0
    assert trainer.end.beside_ms["checkpoint"] == pytest.approx(500.0)
    assert trainer.end.beside_ms["rollback"] == pytest.approx(1500.0)
    assert trainer.notices("BoundaryBudgetExceeded") == []


@pytest.mark.row("T02")
def test_three_breaches_open_the_breaker_in_the_same_boundary_and_tamiyo_is_left_alone(trainer: Trainer):
    trainer.sidecars.before_answer = lambda: trainer.clock.pass_s(SLOW_MS / 1e3)
    for failures in (1, 2):
        trainer.epochs()
        assert trainer.standing.state_of(Part.BOUNDARY_TIMING) == CLOSED, failures
        assert not trainer.standing.conservative
    trainer.epochs()
    assert trainer.standing.state_of(Part.BOUNDARY_TIMING) == OPEN
    assert trainer.standing.conservative
    assert trainer.standing.level == 3
    assert trainer.metric("tolaria.boundary.breaches_total", part="tamiyo") == 3
    trainer.epochs(5)
    assert len(trainer.sidecars.packets) == 3
    assert trainer.metric("tolaria.boundary.breaches_total", part="tamiyo") == 3
    trainer.sidecars.before_answer = lambda: None
    trainer.clock.pass_s(30.1)
    trainer.epochs()
    assert len(trainer.sidecars.packets) == 4
    assert trainer.standing.state_of(Part.BOUNDARY_TIMING) == CLOSED


@pytest.mark.row("T02")
def test_while_the_mode_lasts_snapshots_checkpoints_and_training_go_on(tmp_path: Path):
    trainer = Trainer(tmp_path, checkpoint={"everySteps": 10, "memory": {"everySteps": 5}})
    for _ in range(3):
        trainer.standing.failed(Part.BOUNDARY_TIMING, "slow")
    trainer.sidecars.command = AdaptationCommand(
        version=1,
        command_id="c",
        command_type=CommandType.COMMAND_TYPE_OPTIMIZER,
        optimizer_adjustment=CommandOptimizerAdjustment(optimizer_id="sgd"),
    )
    optimizer = type(trainer.state.update.optimizer)
    trainer.clock.pass_s(30.0)
    assert trainer.epochs(2) is PAUSED
    trainer.parts.checkpoints.wait()
    assert trainer.standing.conservative
    assert type(trainer.state.update.optimizer) is optimizer
    assert any("conservative mode" in message for message in trainer.notices("CommandRejected"))
    assert trainer.pod.saved_step() >= 30
    assert trainer.parts.memory.snapshots is not None


@pytest.mark.row("T03")
def test_a_dead_tamiyo_is_asked_once_per_window_for_fifty_epochs_and_found_again_when_it_is_back(trainer: Trainer):
    trainer.sidecars.die()
    trainer.epochs(3)
    assert trainer.standing.state_of(Part.TAMIYO) == OPEN
    assert len(trainer.sidecars.packets) == 3
    asked_at = []
    for _ in range(47):
        trainer.clock.pass_s(10.0)
        before = len(trainer.sidecars.packets)
        assert trainer.epochs() is PAUSED
        if len(trainer.sidecars.packets) > before:
            asked_at.append(trainer.clock.now - 1000.0)
        assert trainer.standing.state_of(Part.TAMIYO) == OPEN
    assert asked_at == [30.0, 90.0, 210.0, 450.0]  # windows of 30, 60, 120 and 240 s
    assert trainer.standing.level == 3
    trainer.sidecars.come_back()
    trainer.sidecars.socket += 1  # a new process has made its socket
    trainer.epochs(2)
    assert trainer.standing.state_of(Part.TAMIYO) == CLOSED
    assert len(trainer.sidecars.packets) == 9


@pytest.mark.row("T03")
def test_a_tamiyo_that_thaws_without_a_new_socket_is_found_when_the_window_is_over(trainer: Trainer):
    trainer.sidecars.die()
    trainer.epochs(3)
    trainer.sidecars.come_back()
    trainer.epochs(3)
    assert trainer.standing.state_of(Part.TAMIYO) == OPEN
    trainer.clock.pass_s(30.0)
    trainer.epochs(2)
    assert trainer.standing.state_of(Part.TAMIYO) == CLOSED


@pytest.mark.row("T03")
def test_a_probe_of_tamiyo_that_kasmina_prevented_is_not_used_up(trainer: Trainer):
    trainer.sidecars.die()
    trainer.epochs(3)
    trainer.clock.pass_s(30.0)
    trainer.sidecars.heard = frozenset()
    trainer.sidecars.silent = (Silence(component="kasmina", timed_out=True, message="no answer"),)
    trainer.epochs()
    assert trainer.standing.ready(Part.TAMIYO)
    assert trainer.metric("tolaria.timeout.kasmina_total") == 1
    trainer.sidecars.come_back()
    trainer.epochs()
    assert trainer.standing.state_of(Part.TAMIYO) == CLOSED


@pytest.mark.row("K09")
@pytest.mark.row("T26")
def test_three_failed_boundaries_halt_the_run_with_its_state_saved(trainer: Trainer):
    trainer.sidecars.command = AdaptationCommand(version=1, command_id="c")
    undone: list[int] = []

    def fail(*_: Any) -> Obeyed:
        def undo() -> None:
            undone.append(trainer.state.step)

        return Obeyed(afterwards=undo, failure="apply_error")

    trainer.end.commands.obey = fail  # type: ignore[method-assign]
    outcome = trainer.turns.run(1000)
    assert (outcome.exit_code, outcome.reason) == (75, "BoundaryFailed")
    assert outcome.saved_step == 3 * BATCHES == trainer.state.step
    assert "3 failed boundaries without a healthy one between them: apply_error, apply_error, apply_error" in (
        outcome.message
    )
    assert undone == [16, 32, 48]
    assert trainer.pod.saved_step() == 48
    assert trainer.pod.moves()[-1] == ("HALTING", "HALTED", "BoundaryFailed")
    assert trainer.metric("tolaria.emergency.halts_total") == 1
    assert trainer.standing.level == 4


@pytest.mark.row("T26")
def test_a_halt_that_was_decided_before_holds_before_the_first_step(tmp_path: Path):
    first = Trainer(tmp_path)
    first.epochs()
    first.standing.halted(RunReason.RESTORE_FAILED, "nothing verifies")
    first.standing._facts._wal.close()
    first.parts.checkpoints.close(PATIENT_S)
    first.pod.trainer_start = 2
    parts, state = first.pod.assemble()
    step = state.step
    outcome = Turns(parts, state).run(1000)
    assert (outcome.exit_code, outcome.reason, state.step) == (75, "Halted", step)
    parts.epoch_end.consult.handshake.close()


# What Tamiyo is told


@pytest.mark.row("T04")
def test_a_packet_says_what_was_measured_and_nothing_else(trainer: Trainer):
    trainer.sidecars.before_answer = lambda: trainer.clock.pass_s(0.005)
    trainer.epochs(2)
    first, second = trainer.sidecars.packets
    epochs = trainer.pod.events("epoch")
    assert (first.current_epoch, first.global_step) == (1, 16)
    assert (second.current_epoch, second.global_step) == (2, 32)
    assert second.experiment_name == "tests/tiny"
    assert second.source_subsystem == "tolaria"
    assert second.hardware_context.device_type == "cpu"
    assert not second.hardware_context.HasField("utilization_percent")
    assert not second.hardware_context.HasField("temperature_celsius")
    named = {metric.name: metric.value for metric in epochs[1].metrics}
    assert second.validation_loss == pytest.approx(named["validation_loss"])
    assert second.validation_accuracy == pytest.approx(named["validation_accuracy"])
    assert second.training_loss == pytest.approx(named["train_loss"])
    assert second.validation_loss != second.training_loss
    metrics = second.metrics_struct
    assert metrics.epochs_total == 60
    assert metrics.optimizer_lr == pytest.approx(0.01)
    assert metrics.optimizer_family == OptimizerFamily.OPTIMIZER_FAMILY_ADAMW
    assert metrics.loss_delta == pytest.approx(second.training_loss - first.training_loss, abs=1e-6)
    mean = (0.2 * 0.8 * first.training_loss + 0.2 * second.training_loss) / 0.36
    assert metrics.loss_ewma == pytest.approx(mean, rel=1e-5)
    unknown = ("optimizer_momentum", "grad_conflict_rate", "gpu_mem_used_gb", "gpu_util_percent", "cpu_util_percent")
    for name in (*unknown, "kasmina_finalize_ms", "h2d_copy_ms", "isolation_violations"):
        assert not metrics.HasField(name), name


@pytest.mark.row("T04")
def test_times_in_a_packet_are_those_of_the_boundary_before(trainer: Trainer):
    trainer.sidecars.before_answer = lambda: trainer.clock.pass_s(0.005)
    trainer.epochs(2)
    first, second = (packet.metrics_struct for packet in trainer.sidecars.packets)
    for name in ("hook_latency_ms", "tamiyo_latency_ms", "kasmina_apply_ms", "loss_delta"):
        assert not first.HasField(name), name
    assert first.loss_volatility == 0.0
    assert second.hook_latency_ms == pytest.approx(5.0)
    assert second.tamiyo_latency_ms == pytest.approx(2.5)
    assert second.kasmina_apply_ms == 0.0


@pytest.mark.row("T04")
def test_a_rollback_forgets_the_trend(trainer: Trainer):
    trainer.epochs(2)
    trainer.end.packets.restore(trainer.end.packets.capture())
    trainer.epochs()
    assert not trainer.sidecars.packets[-1].metrics_struct.HasField("loss_delta")


def test_the_trend_begins_with_its_first_value_and_follows():
    trend = Trend()
    assert (trend.mean, trend.deviation, trend.delta) == (None, None, None)
    trend.add(float("nan"))
    assert trend.mean is None
    trend.add(4.0)
    assert (trend.mean, trend.deviation, trend.delta) == (pytest.approx(4.0), pytest.approx(0.0, abs=1e-6), None)
    for _ in range(100):
        trend.add(1.0)
    assert trend.mean == pytest.approx(1.0)
    assert trend.delta == 0.0
