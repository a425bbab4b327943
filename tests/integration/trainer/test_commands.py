"""Every kind of command either has its effect on a real trainer or is refused in words; nothing happens twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from esper_leyline.v1.command_pb2 import (
    AdaptationCommand,
    CommandCircuitBreaker,
    CommandEmergency,
    CommandOptimizerAdjustment,
    CommandType,
    DecisionMetadata,
    RiskMetadata,
    RollbackRequest,
)
from esper_leyline.v1.common_pb2 import RollbackTier
from esper_runtime.tolaria.breaker import CLOSED, OPEN
from esper_runtime.tolaria.commands import HARD_APPLY_S, Obeyed, Rebuild, Refused, _Before
from esper_runtime.tolaria.optimizers import OptimizerRebuildError
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.stability import Part
from esper_runtime.tolaria.state import TrainState

from tests.support.standing import Clock
from tests.support.trainers import PAUSED, Pod, Turns

pytestmark = pytest.mark.row("T06")

OPTIMIZER = CommandType.COMMAND_TYPE_OPTIMIZER
ROLLBACK = CommandType.COMMAND_TYPE_ROLLBACK
BREAKER = CommandType.COMMAND_TYPE_CIRCUIT_BREAKER
EMERGENCY = CommandType.COMMAND_TYPE_EMERGENCY


class Trainer:
    """Has trained `steps` steps of 16 per epoch and hears commands."""

    def __init__(self, root: Path, *, steps: int = 20, rebuild: Rebuild | None = None, **parts: Any) -> None:
        self.pod = Pod(root).configure(config={"epochs": 4}, **parts)
        self.parts, self.state = self.pod.assemble()
        self.turns = Turns(self.parts, self.state)
        assert self.turns.run(steps) is PAUSED
        self.commands = self.parts.epoch_end.commands
        self.standing = self.parts.epoch_end.standing
        # As in a run with sidecars: they are not the subject here.
        for part in (Part.TAMIYO, Part.KASMINA):
            self.standing.force(part, CLOSED, "there are none")
        self.commands._rebuild = rebuild
        self.number = 0

    def calm(self) -> None:
        """Out of conservative mode, whatever the boundaries before have led to."""
        self.standing._mode.entries.clear()

    def obey(self, command_type: int, **fields: Any) -> Outcome | None:
        """Obeys, and does what is left to do afterwards."""
        obeyed = self.hear(command_type, **fields)
        return None if obeyed.afterwards is None else obeyed.afterwards()

    def hear(self, command_type: int, **fields: Any) -> Obeyed:
        self.number += 1
        fields = {"command_id": f"command-{self.number}", "rationale": "the test says so", **fields}
        return self.commands.obey(AdaptationCommand(version=1, command_type=command_type, **fields), self.state)

    def handled(self, kind: str, result: str) -> float:
        metrics = self.parts.epoch_end.registry
        return metrics.value("tolaria.command.handled_total", type=kind, result=result) or 0.0

    def notices(self, reason: str) -> list[str]:
        return [notice.message for notice in self.pod.events("notice") if notice.reason == reason]

    def bits(self) -> list[bytes]:
        tensors, _, _ = self.state.live()
        return [tensor.detach().clone().numpy().tobytes() for tensor in tensors.values()]

    def refused(self, kind: str, words: str, *, count: int = 1) -> None:
        """It was, in these words, and nothing else."""
        messages = self.notices("CommandRejected")
        assert len(messages) == count
        assert words in messages[-1]
        assert (self.handled(kind, "refused"), self.handled(kind, "applied")) == (count, 0)
        assert self.pod.counters().rejected_commands == count


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def test_nothing_is_explicitly_nothing(trainer: Trainer):
    before = trainer.bits()
    assert trainer.obey(CommandType.COMMAND_TYPE_NO_OPERATION) is None
    assert trainer.bits() == before
    assert trainer.notices("CommandApplied") == trainer.notices("CommandRejected") == []


@pytest.mark.parametrize(
    ("command_type", "kind", "words"),
    [
        (CommandType.COMMAND_TYPE_SEED, "SEED", "SEED is not supported"),
        (CommandType.COMMAND_TYPE_STRUCTURAL_PRUNING, "STRUCTURAL_PRUNING", "STRUCTURAL_PRUNING is not supported"),
        (CommandType.COMMAND_TYPE_UNSPECIFIED, "UNSPECIFIED", "UNSPECIFIED is not supported"),
        (99, "OTHER", "OTHER is not supported"),
        (CommandType.COMMAND_TYPE_PAUSE, "PAUSE", "spec.emergencyStop: Freeze"),
    ],
)
def test_what_cannot_be_done_is_refused(trainer: Trainer, command_type: int, kind: str, words: str):
    before = trainer.bits()
    assert trainer.obey(command_type, target_seed_id="seed-1") is None
    trainer.refused(kind, words)
    assert trainer.bits() == before


def test_the_learning_rate_is_scaled_once_however_often_the_command_comes(trainer: Trainer):
    adjustment = CommandOptimizerAdjustment(learning_rate_scale=0.5)
    for _ in range(3):
        trainer.obey(OPTIMIZER, optimizer_adjustment=adjustment, command_id="the same")
    assert trainer.state.learning_rate_scale == 0.5
    assert trainer.notices("CommandApplied") == ["command of Tamiyo applied: OPTIMIZER, the test says so"]
    assert (trainer.handled("OPTIMIZER", "applied"), trainer.handled("OPTIMIZER", "duplicate")) == (1, 2)
    trainer.obey(OPTIMIZER, optimizer_adjustment=adjustment)
    assert trainer.state.learning_rate_scale == 0.25


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_a_scale_out_of_bounds_is_refused(trainer: Trainer, scale: float):
    trainer.obey(OPTIMIZER, optimizer_adjustment=CommandOptimizerAdjustment(learning_rate_scale=scale))
    trainer.refused("OPTIMIZER", "it must be above 0 and at most 1")
    assert trainer.state.learning_rate_scale == 1.0


def test_an_adjustment_of_nothing_is_refused(trainer: Trainer):
    trainer.obey(OPTIMIZER, optimizer_adjustment=CommandOptimizerAdjustment())
    trainer.refused("OPTIMIZER", "neither a learning_rate_scale nor an optimizer_id")


# Rebuilding


def spoiled(then: Callable[[], None]) -> Rebuild:
    """A rebuild that changes weights and learning rate before it comes to its end."""

    def rebuild(state: TrainState, optimizer_id: str) -> None:
        for arena in state.update.arenas:
            arena.buffer.detach().fill_(7.0)
        state.learning_rate_scale = 0.125
        then()

    return rebuild


REBUILD = {"optimizer_adjustment": CommandOptimizerAdjustment(optimizer_id="adam", learning_rate_scale=0.5)}


def test_a_rebuild_is_done_and_told(tmp_path: Path):
    asked: list[str] = []
    trainer = Trainer(tmp_path, rebuild=lambda state, optimizer_id: asked.append(optimizer_id))
    trainer.calm()
    assert trainer.hear(OPTIMIZER, **REBUILD) == Obeyed()
    assert asked == ["adam"]
    assert trainer.state.learning_rate_scale == 0.5
    assert trainer.handled("OPTIMIZER", "applied") == 1


@pytest.mark.row("T02")
def test_in_conservative_mode_no_optimizer_is_rebuilt(tmp_path: Path):
    asked: list[str] = []
    trainer = Trainer(tmp_path, rebuild=lambda state, optimizer_id: asked.append(optimizer_id))
    trainer.calm()
    trainer.standing.failed(Part.TAMIYO, "no answer")
    trainer.obey(OPTIMIZER, **REBUILD)
    trainer.refused("OPTIMIZER", "no optimizer is rebuilt in conservative mode: tamiyo: no answer")
    assert asked == []
    assert trainer.state.learning_rate_scale == 1.0


def test_a_rebuild_that_raises_is_undone_bit_for_bit(tmp_path: Path):
    def fail() -> None:
        raise ArithmeticError("no such optimizer")

    trainer = Trainer(tmp_path, rebuild=spoiled(fail))
    trainer.calm()
    before, scale = trainer.bits(), trainer.state.learning_rate_scale
    obeyed = trainer.hear(OPTIMIZER, **REBUILD)
    assert obeyed.failure == "apply_error"
    assert trainer.bits() != before
    assert obeyed.afterwards is not None
    assert obeyed.afterwards() is None
    assert trainer.bits() == before
    assert trainer.notices("BoundaryFailed") == ["a command was undone: ArithmeticError: no such optimizer"]
    assert trainer.handled("OPTIMIZER", "applied") == 0
    assert trainer.turns.run(10) is PAUSED
    assert scale == 1.0


def test_a_rebuild_that_takes_too_long_is_undone(tmp_path: Path):
    clock = Clock()
    trainer = Trainer(tmp_path, rebuild=spoiled(lambda: clock.pass_s(HARD_APPLY_S + 0.5)))
    trainer.calm()
    trainer.commands._monotonic = clock
    before = trainer.bits()
    obeyed = trainer.hear(OPTIMIZER, **REBUILD)
    assert obeyed.failure == "apply_overrun"
    assert obeyed.afterwards is not None
    obeyed.afterwards()
    assert trainer.bits() == before
    assert trainer.notices("BoundaryFailed") == ["a command was undone: it took 2.5 s; at most 2"]


@pytest.mark.parametrize("error", [Refused("not now"), OptimizerRebuildError("does not fit")])
def test_a_rebuild_that_changed_nothing_is_refused(tmp_path: Path, error: Exception):
    def rebuild(state: TrainState, optimizer_id: str) -> None:
        raise error

    trainer = Trainer(tmp_path, rebuild=rebuild)
    for _ in range(3):
        trainer.calm()
        trainer.obey(OPTIMIZER, **REBUILD)
    trainer.refused("OPTIMIZER", str(error), count=3)
    skipped = isinstance(error, Refused)
    assert trainer.standing.state_of(Part.OPTIMIZER_REBUILD) == (CLOSED if skipped else OPEN)
    trainer.calm()
    trainer.obey(OPTIMIZER, **REBUILD)
    trainer.refused("OPTIMIZER", "not now" if skipped else "the breaker optimizer_rebuild is open", count=4)


# Going back


def test_a_rollback_from_memory(trainer: Trainer):
    assert trainer.state.step == 20
    obeyed = trainer.hear(ROLLBACK, rollback=RollbackRequest(tier=RollbackTier.ROLLBACK_TIER_FAST, reason="go back"))
    assert trainer.state.step == 20  # nothing of it is the boundary's time
    assert obeyed.afterwards is not None
    assert obeyed.afterwards() is None
    assert trainer.state.step == 15
    recovery = trainer.pod.events("recovery")[0]
    assert (recovery.cause, recovery.tier) == ("TamiyoRequest", RollbackTier.ROLLBACK_TIER_FAST)
    assert trainer.handled("ROLLBACK", "applied") == 1


def test_a_rollback_from_the_volume(tmp_path: Path):
    trainer = Trainer(tmp_path, steps=17, checkpoint={"everySteps": 6, "memory": {"everySteps": 1}})
    for steps in (1, 5):  # the disk is not busy when step 18 is due
        trainer.parts.checkpoints.wait()
        assert trainer.turns.run(steps) is PAUSED
    trainer.parts.checkpoints.wait()
    assert trainer.obey(ROLLBACK, rollback=RollbackRequest(tier=RollbackTier.ROLLBACK_TIER_FULL)) is None
    assert trainer.state.step == 18
    assert trainer.pod.events("recovery")[0].tier == RollbackTier.ROLLBACK_TIER_FULL
    assert trainer.parts.rollbacks.config.target == "BeforeAnomaly"


def test_a_rollback_to_an_epoch_that_is_kept_and_to_one_that_is_not(tmp_path: Path):
    trainer = Trainer(tmp_path, steps=40)
    trainer.parts.checkpoints.wait()
    assert trainer.obey(ROLLBACK, rollback=RollbackRequest(target_epoch=7)) is None
    trainer.refused("ROLLBACK", "there is no checkpoint to go back to from epoch 7")
    assert trainer.state.step == 40
    assert trainer.obey(ROLLBACK, rollback=RollbackRequest(target_epoch=1)) is None
    assert (trainer.state.step, trainer.state.epoch) == (16, 1)
    assert trainer.handled("ROLLBACK", "applied") == 1


def test_the_end_of_an_epoch_is_told_from_what_was_saved_within_the_next(tmp_path: Path):
    trainer = Trainer(tmp_path, steps=16, checkpoint={"everySteps": 6, "retention": {"keepLatest": 50}})
    for steps in (5, 15):
        trainer.parts.checkpoints.wait()
        assert trainer.turns.run(steps) is PAUSED
    trainer.parts.checkpoints.wait()
    assert trainer.obey(ROLLBACK, rollback=RollbackRequest(target_epoch=1)) is None
    assert trainer.state.step == 16


# Breakers, levels, mode


def test_a_named_breaker_is_forced(trainer: Trainer):
    order = CommandCircuitBreaker(name="checkpoint", desired_state=OPEN, rationale="the volume is being moved")
    assert trainer.obey(BREAKER, circuit_breaker=order) is None
    assert trainer.standing.state_of(Part.CHECKPOINT) == OPEN
    assert trainer.standing.level == 3
    assert "forced by Tamiyo: the volume is being moved" in trainer.notices("BreakerOpened")[-1]
    assert trainer.handled("CIRCUIT_BREAKER", "applied") == 1


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (CommandCircuitBreaker(desired_state=OPEN, rationale="checkpoint"), "there is no breaker ''; there are tamiyo"),
        (CommandCircuitBreaker(name="x" * 100, desired_state=OPEN), f"there is no breaker '{'x' * 64}'; there are"),
        (CommandCircuitBreaker(name="checkpoint"), "0 is no state of a breaker"),
        (CommandCircuitBreaker(name="checkpoint", desired_state=9), "9 is no state of a breaker"),  # type: ignore[arg-type]
    ],
)
def test_a_breaker_or_state_that_is_none_is_refused(trainer: Trainer, order: CommandCircuitBreaker, words: str):
    trainer.obey(BREAKER, circuit_breaker=order)
    trainer.refused("CIRCUIT_BREAKER", words)
    assert trainer.standing.state_of(Part.CHECKPOINT) == CLOSED


@pytest.mark.row("K09")
@pytest.mark.row("T24")
def test_a_level_is_raised_and_four_halts_the_run_with_its_state_saved(trainer: Trainer):
    trainer.obey(EMERGENCY, emergency=CommandEmergency(level=3, reason="strange losses"))
    assert trainer.standing.level == 3
    assert trainer.turns.run(20) is PAUSED
    trainer.obey(EMERGENCY, emergency=CommandEmergency(level=4, reason="stop"))
    step = trainer.state.step
    outcome = trainer.parts.epoch_end.halted(trainer.state)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (75, "TamiyoRequest", step)
    assert trainer.pod.moves()[-2:] == [
        ("RUNNING", "HALTING", "TamiyoRequest"),
        ("HALTING", "HALTED", "TamiyoRequest"),
    ]


@pytest.mark.row("T24")
@pytest.mark.parametrize(
    ("order", "words"),
    [
        (CommandEmergency(level=0, reason="nothing"), "emergency level 0; it must be from 1 to 4"),
        (CommandEmergency(level=17, reason="much"), "emergency level 17; it must be from 1 to 4"),  # type: ignore[arg-type]
        (CommandEmergency(level=4, reason="x" * 257), "257 bytes; give 1 to 256"),
        (CommandEmergency(level=4), "0 bytes; give 1 to 256"),
        (CommandEmergency(level=2, reason="less"), "already 3; only health lowers it"),
    ],
)
def test_a_level_that_is_none_or_not_higher_is_refused(trainer: Trainer, order: CommandEmergency, words: str):
    trainer.standing.order_level(3, "as a start")
    trainer.obey(EMERGENCY, emergency=order)
    trainer.refused("EMERGENCY", words)
    assert trainer.standing.level == 3
    assert trainer.parts.epoch_end.halted(trainer.state) is None


@pytest.mark.row("T02")
def test_tamiyos_mode_is_the_trainers_until_it_says_otherwise(trainer: Trainer):
    trainer.calm()
    careful = DecisionMetadata(risk=RiskMetadata(conservative_mode=True))
    trainer.obey(CommandType.COMMAND_TYPE_NO_OPERATION, metadata=careful)
    assert trainer.standing.conservative
    trainer.obey(CommandType.COMMAND_TYPE_NO_OPERATION, metadata=careful)
    trainer.obey(CommandType.COMMAND_TYPE_NO_OPERATION)
    assert not trainer.standing.conservative
    told = [(d.degraded, d.reason) for d in trainer.pod.events("degradation") if d.component == "tamiyo"]
    assert told == [(True, "ConservativeMode"), (False, "ConservativeMode")]


def test_the_state_is_put_back_on_the_very_tensors(trainer: Trainer):
    before = _Before(trainer.state)
    memory = [arena.buffer.data_ptr() for arena in trainer.state.update.arenas]
    bits = trainer.bits()
    assert trainer.turns.run(5) is PAUSED
    assert trainer.bits() != bits
    before.put_back()
    assert trainer.bits() == bits
    assert [arena.buffer.data_ptr() for arena in trainer.state.update.arenas] == memory
