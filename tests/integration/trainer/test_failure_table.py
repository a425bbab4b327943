"""Which failure triggers what, through the real trainer: one test per cell of trigger x action."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_leyline.reasons import RunReason
from esper_leyline.v1.common_pb2 import ROLLBACK_TIER_FULL
from esper_runtime.checkpoint import manifest as manifests
from esper_runtime.checkpoint.catalog import directories
from esper_runtime.checkpoint.files import Disk
from esper_runtime.checkpoint.generation import read
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.rollback import Trouble
from esper_runtime.tolaria.state import TrainState

from tests.support.trainers import PAUSED, UID, Pod, Turns, same_bits
from tests.support.waiting import PATIENT_S

STEP = 33
EPOCHS = 4
HALTED = 75


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """What is done to the run, and what the runtime has to make of it."""

    name: str
    poison: dict[str, Any]
    setting: str
    """Path of the action in `health`."""
    reason: str
    seen_at: int = STEP
    """Step of the verdict."""
    batches: int = 1
    """Left out for good by a rollback."""
    ignored: str = "goes on"
    """What Ignore means: discarded (the step is not applied), or it goes on."""
    health: dict[str, Any] = field(default_factory=dict)

    def configure(self, pod: Pod, action: str) -> Pod:
        health: dict[str, Any] = {key: dict(value) for key, value in self.health.items()}
        *section, key = self.setting.split(".")
        (health.setdefault(section[0], {}) if section else health)[key] = action
        config = {"epochs": EPOCHS, "poisons": [{"at": STEP, **self.poison}]}
        return pod.configure(entrypoint="ill:build", config=config, health=health)


NOT_FINITE = "nonFiniteAction"
SPIKE = {"lossSpike": {"action": "Ignore"}}
NO_NORM = {"gradientNorm": {"action": "Ignore"}}
TRIGGERS = [
    *(
        Trigger(
            name=f"{what}-{value}",
            poison={"what": what, "value": value},
            setting=NOT_FINITE,
            reason=reason,
            ignored="discarded",
        )
        for what, reason in (("loss", "NonFiniteLoss"), ("gradient", "NonFiniteGradient"))
        for value in ("nan", "inf")
    ),
    Trigger(
        name="spike",
        poison={"what": "factor", "value": "10", "times": 3},
        setting="lossSpike.action",
        reason="LossSpike",
        seen_at=STEP + 2,
        batches=3,
        health=NO_NORM,
    ),
    Trigger(
        name="explosion",
        poison={"what": "factor", "value": "1e4"},
        setting="lossSpike.action",
        reason="LossSpike",
        health={"lossSpike": {"windowSteps": 50}, **NO_NORM},
    ),
    Trigger(
        name="norm",
        poison={"what": "norm", "value": "30", "times": 3},
        setting="gradientNorm.action",
        reason="GradientExplosion",
        seen_at=STEP + 2,
        batches=3,
        health=SPIKE,
    ),
]


@pytest.fixture(params=TRIGGERS, ids=[trigger.name for trigger in TRIGGERS])
def trigger(request: pytest.FixtureRequest) -> Trigger:
    return request.param


def reference(tmp_path: Path, trigger: Trigger) -> Pod:
    """The same run without the poison, and without the batches that a rollback leaves out."""
    pod = trigger.configure(Pod(tmp_path / "reference"), "Rollback")
    pod.document["config"]["poisons"] = []
    pod.write_config()
    first = STEP - 1
    assert pod.skipping(*range(first, first + trigger.batches)).exit_code == 0
    return pod


@pytest.mark.row("T48")
@pytest.mark.row("T11")
def test_rollback_goes_to_before_the_trouble_and_leaves_its_batches_out(tmp_path: Path, trigger: Trigger):
    pod = trigger.configure(Pod(tmp_path / "pod"), "Rollback")
    assert pod.train().exit_code == 0
    (recovery,) = pod.events("recovery")
    assert (recovery.cause, recovery.from_step, recovery.to_step) == (trigger.reason, trigger.seen_at, 30)
    assert (pod.counters().rollbacks, pod.counters().skipped_batches) == (1, trigger.batches)
    same_bits(pod.newest(), reference(tmp_path, trigger).newest())


def test_halt_ends_the_run_with_the_last_good_state_saved(tmp_path: Path, trigger: Trigger):
    pod = trigger.configure(Pod(tmp_path), "Halt")
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (HALTED, trigger.reason, 30)
    assert not pod.events("recovery")
    assert finite(pod)


def test_ignore_goes_on(tmp_path: Path, trigger: Trigger):
    pod = trigger.configure(Pod(tmp_path), "Ignore")
    assert pod.train().exit_code == 0
    assert not pod.events("recovery")
    discarded = trigger.ignored == "discarded"
    assert pod.counters().skipped_batches == (1 if discarded else 0)
    assert (trigger.reason in {notice.reason for notice in pod.events("notice")}) is discarded
    assert finite(pod)


# A state that is not finite

STATES = [
    pytest.param({"what": "weight", "value": "nan"}, "last.bias", id="weight-nan"),
    pytest.param({"what": "weight", "value": "inf"}, "last.bias", id="weight-inf"),
    pytest.param({"what": "moment", "value": "nan"}, "exp_avg_sq", id="moment-nan"),
    pytest.param({"what": "moment", "value": "inf"}, "exp_avg_sq", id="moment-inf"),
]
SNAPSHOT_STEP = 35


def sick(pod: Pod, poison: dict[str, Any], action: str) -> Pod:
    config = {"epochs": EPOCHS, "poisons": [{"at": SNAPSHOT_STEP, **poison}]}
    return pod.configure(entrypoint="ill:build", config=config, health={"nonFiniteAction": action})


@pytest.mark.row("T11")
@pytest.mark.parametrize(("poison", "named"), STATES)
def test_state_that_is_not_finite_is_rolled_back_before_it_is_published(
    tmp_path: Path, poison: dict[str, Any], named: str
):
    pod = sick(Pod(tmp_path), poison, "Rollback")
    assert pod.train().exit_code == 0
    (recovery,) = pod.events("recovery")
    assert (recovery.cause, recovery.to_step) == ("NonFiniteWeight", 30)
    assert any(n.reason == "NonFiniteWeight" and named in n.message for n in pod.events("notice"))
    assert finite(pod)


@pytest.mark.parametrize(("poison", "named"), STATES)
def test_state_that_is_not_finite_halts_the_run_where_asked(tmp_path: Path, poison: dict[str, Any], named: str):
    pod = sick(Pod(tmp_path), poison, "Halt")
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (HALTED, "NonFiniteWeight", 30)
    assert finite(pod)


@pytest.mark.parametrize(("poison", "named"), STATES)
def test_ignored_state_that_is_not_finite_is_never_published(tmp_path: Path, poison: dict[str, Any], named: str):
    """Every later step is discarded or goes on from it, and what is kept stays as it was before."""
    pod = sick(Pod(tmp_path), poison, "Ignore")
    pod.train()
    assert not pod.events("recovery")
    assert finite(pod)


def finite(pod: Pod) -> bool:
    """Whether every checkpoint on the volume that anything would go back to holds finite numbers; there is one."""
    found = directories(pod.root / "checkpoints" / UID)
    good = 0
    for attempt, directory in found:
        manifest = manifests.read(directory, run_uid=UID, attempt=attempt, where=directory.name)
        if manifest.suspect:
            continue
        good += 1
        tensors, _ = read(directory, manifest, directory.name, Disk())
        stems = [tensors[stem] for stem in ("model", "optimizer")]
        if not all(bool(torch.isfinite(tensor).all()) for stem in stems for tensor in stem.values()):
            return False
    return good > 0


def close(parts: Parts) -> None:
    parts.checkpoints.close(PATIENT_S)
    parts.epoch_end.handshake.close()
    parts.publisher.close(PATIENT_S)


# Memory


def held_is_finite(parts: Parts) -> bool:
    snapshots = parts.memory.snapshots
    assert snapshots is not None
    for held in snapshots.held():
        content = snapshots.restore(held, {})
        assert content is not None
        if not all(bool(torch.isfinite(tensor).all()) for tensor in content.tensors.values()):
            return False
    return True


@pytest.mark.row("T11")
@pytest.mark.parametrize("action", ["Rollback", "Ignore"])
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", ["loss", "gradient", "weight", "moment"])
def test_no_snapshot_ever_holds_what_is_not_finite(tmp_path: Path, what: str, value: str, action: str):
    pod = sick(Pod(tmp_path), {"what": what, "value": value}, action)
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    try:
        turns.run(SNAPSHOT_STEP - 2)
        outcome = PAUSED
        while outcome is PAUSED:
            assert held_is_finite(parts)
            outcome = turns.run(1)
        assert held_is_finite(parts)
    finally:
        close(parts)
    assert finite(pod)


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_checkpoint_of_a_state_that_is_not_finite_is_no_target(tmp_path: Path, what: str):
    """Saved at a step at which no snapshot is taken, so nobody has looked yet when training hands it over."""
    pod = Pod(tmp_path).configure(
        entrypoint="ill:build",
        config={"epochs": EPOCHS, "poisons": [{"what": what, "value": "inf", "at": 36}]},
        checkpoint={"everySteps": 36, "memory": {"everySteps": 5}},
    )
    parts, state = pod.assemble()
    turns = Turns(parts, state)
    try:
        for steps in (35, 1):
            turns.run(steps)
            parts.checkpoints.wait()
        run_dir = pod.root / "checkpoints" / UID
        suspect = {}
        for attempt, directory in directories(run_dir):
            manifest = manifests.read(directory, run_uid=UID, attempt=attempt, where=directory.name)
            suspect[manifest.step] = manifest.suspect
        assert suspect == {16: False, 32: False, 36: True}
        _, loaded = parts.checkpoints.load_newest()
        assert loaded is not None
        assert loaded.step == 32
    finally:
        close(parts)


def bits(state: TrainState) -> dict[str, bytes]:
    """All but the clock and the breakers, which no rollback sets back."""
    kept = state.generation({})
    tensors = {f"{stem}/{name}": t for stem, found in kept.tensors.items() for name, t in found.items()}
    facts = {key: value for key, value in kept.state.items() if key not in ("seconds", "extras")}
    facts["extras"] = {key: value for key, value in kept.state["extras"].items() if key != "stability"}
    return {**{name: t.numpy().tobytes() for name, t in tensors.items()}, "facts": repr(facts).encode()}


@pytest.mark.row("T11")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_rollbacks_to_the_same_snapshot_give_the_same_bits(tmp_path: Path, optimizer: str):
    pod = Pod(tmp_path).configure(config={"epochs": EPOCHS, "optimizer": optimizer}, rollback={"skipBatches": "None"})
    parts, state = pod.assemble()
    turns = Turns(parts, state)

    def roll_back() -> dict[str, bytes]:
        trouble = Trouble(
            cause=RunReason.NON_FINITE_LOSS,
            message="",
            at_step=state.step,
            first_suspect=SNAPSHOT_STEP - 2,
            poisoned=(state.loader.current,),
            began_ns=0,
            detected_ns=0,
        )
        assert parts.rollbacks.roll_back(state, trouble) is None
        assert state.step == 30
        return bits(state)

    try:
        turns.run(30)
        there = bits(state)
        turns.run(3)
        first = roll_back()
        assert first == there
        turns.run(4)
        assert bits(state) != first
        assert roll_back() == first
    finally:
        close(parts)


# Validation


def regressing(pod: Pod, action: str, **parts: Any) -> Pod:
    """Its third epoch is trained on losses of the wrong sign, and so ends worse than the second."""
    config = {"epochs": EPOCHS, "poisons": [{"what": "factor", "value": "-5", "at": 33, "times": 16}]}
    health = {**SPIKE, **NO_NORM, "validation": {"action": action, "maxDrop": "0.1"}}
    return pod.configure(entrypoint="ill:build", config=config, health=health, **parts)


@pytest.mark.row("T20")
def test_epoch_that_ends_worse_leads_back_to_the_best_one(tmp_path: Path):
    """From the volume, although memory has newer states; and the third epoch, now healthy, is made again."""
    pod = regressing(Pod(tmp_path / "pod"), "Rollback")
    assert pod.train().exit_code == 0
    (recovery,) = pod.events("recovery")
    assert (recovery.cause, recovery.from_step, recovery.to_step) == ("ValidationRegression", 48, 32)
    assert recovery.tier == ROLLBACK_TIER_FULL
    assert pod.counters().skipped_batches == 0
    assert [epoch.step for epoch in pod.events("epoch")] == [16, 32, 48, 48, 64]
    healthy = regressing(Pod(tmp_path / "healthy"), "Rollback")
    healthy.document["config"]["poisons"] = []
    healthy.write_config()
    assert healthy.train().exit_code == 0
    assert not healthy.events("recovery")
    same_bits(pod.newest(), healthy.newest())


def test_epoch_that_ends_worse_halts_the_run_where_asked(tmp_path: Path):
    pod = regressing(Pod(tmp_path), "Halt")
    outcome = pod.train()
    assert (outcome.exit_code, outcome.reason, outcome.saved_step) == (HALTED, "ValidationRegression", 30)


def test_ignored_epoch_that_ends_worse_goes_on(tmp_path: Path):
    pod = regressing(Pod(tmp_path), "Ignore")
    assert pod.train().exit_code == 0
    assert not pod.events("recovery")
    assert [epoch.step for epoch in pod.events("epoch")] == [16, 32, 48, 64]
