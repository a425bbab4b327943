"""Steps that accumulate, scale and clip, against a plain PyTorch loop that does the same, bit for bit."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from esper_runtime.tolaria import rng
from esper_runtime.tolaria.amp import Scaler
from esper_runtime.tolaria.data import Loader
from esper_runtime.tolaria.judge import Call
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.state import TrainState
from torch import Tensor

from tests.support.trainers import CODE, PAUSED, Pod, Turns

sys.path.insert(0, str(CODE))
featured = pytest.importorskip("featured")

STEPS = 12
SEED = 3
CPU = torch.device("cpu")
HUGE_SCALE = 2.0**40


@dataclass
class Outcome:
    losses: list[float]
    parameters: list[Tensor]
    scaler: dict[str, Any] | None


def plain(config: dict[str, Any], *, init_scale: float = 2.0**16) -> Outcome:
    """What anybody would write: n backward passes of loss / n, then the optimizer, or the scaler's step."""
    rng.seed_everything(SEED)
    workload = featured.build(config)
    model, count = workload.model.train(), workload.accumulation_steps
    optimizer = workload.optimizer(model.parameters())
    loader = Loader(workload.train, batch_size=workload.batch_size, seed=workload.seed, device=CPU)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(workload.precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=dtype is torch.float16)
    losses = []
    while len(losses) < STEPS:
        batches = [batch for _ in range(count) if (batch := loader.take()) is not None]
        if not batches:
            loader.next_epoch()
            continue
        optimizer.zero_grad()
        found = []
        for batch in batches:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = workload.loss(model, batch)
            scaler.scale(loss / len(batches)).backward()
            found.append(loss.item())
        scaler.step(optimizer)
        scaler.update()
        losses.append(sum(found) / len(found))
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    return Outcome(losses, parameters, scaler.state_dict() or None)


def assembled(root: Path, config: dict[str, Any], **parts: Any) -> tuple[Parts, TrainState]:
    return (
        Pod(root)
        .configure(entrypoint="featured:build", config={"losses": "", "epochs": 4, **config}, **parts)
        .assemble()
    )


def trained(parts: Parts, state: TrainState) -> Outcome:
    turns, losses = Turns(parts, state), []
    for _ in range(STEPS):
        assert turns.run(1) is PAUSED
        losses.append(state.loss)
    scaler = state.extras.get("scaler")
    parameters = [parameter.detach().clone() for parameter in state.model.parameters()]
    return Outcome(losses, parameters, scaler.capture() if scaler is not None else None)


def same(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses
    for ours, theirs in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(ours, theirs)
    assert one.scaler == other.scaler


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "per-tensor"])
@pytest.mark.row("T37")
def test_equals_a_plain_loop_bit_for_bit(tmp_path: Path, optimizer: str, accumulation_steps: int, precision: str):
    """Over an epoch's end, where a group of four has two left: their gradient is the mean of two."""
    config = {
        "optimizer": optimizer,
        "accumulation_steps": accumulation_steps,
        "precision": precision,
        "samples": 70 if accumulation_steps > 1 else 30,
        "seed": SEED,
    }
    parts, state = assembled(tmp_path, config)
    assert (state.update.path == "flat") == (optimizer != "per-tensor")
    same(trained(parts, state), plain(config))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_an_overflow_of_the_scale_is_left_out_and_is_no_anomaly(tmp_path: Path, accumulation_steps: int):
    config = {"precision": "float16", "accumulation_steps": accumulation_steps, "samples": 130, "seed": SEED}
    parts, state = assembled(tmp_path, config)
    scaler = state.extras["scaler"]
    assert isinstance(scaler, Scaler)
    scaler.restore({**scaler.capture(), "scale": HUGE_SCALE})
    outcome = trained(parts, state)
    expected = plain(config, init_scale=HUGE_SCALE)
    same(outcome, expected)
    assert expected.scaler is not None
    skipped = parts.step._metrics.value("tolaria.amp.skipped_steps_total")
    assert skipped is not None
    assert skipped >= 1
    assert expected.scaler["scale"] == HUGE_SCALE / 2**skipped
    assert state.step == STEPS


def test_an_overflow_that_no_scale_explains_is_an_anomaly(tmp_path: Path):
    parts, state = assembled(tmp_path, {"precision": "float16"}, health={"nonFiniteAction": "Ignore"})
    scaler = state.extras["scaler"]
    scaler.restore({**scaler.capture(), "scale": 1.0})  # type: ignore[attr-defined]
    batch = state.loader.take()
    state.model.first.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = parts.step.run(batch, state)
    assert result.verdict.call is Call.DISCARD
    assert result.verdict.reason == "NonFiniteGradient"
    assert scaler.capture()["scale"] == 1.0


def test_a_refused_step_leaves_the_scale_alone(tmp_path: Path):
    """A loss that is not finite is the judge's business; the next step scales as before."""
    parts, state = assembled(
        tmp_path,
        {"precision": "float16"},
        health={"nonFiniteAction": "Ignore"},
        faultInjection=[{"kind": "NonFiniteLoss", "step": 2}],
    )
    scaler = state.extras["scaler"]
    before = scaler.capture()["scale"]
    assert Turns(parts, state).run(4) is PAUSED
    assert scaler.capture()["scale"] == before
    assert scaler.capture()["_growth_tracker"] == 3


def test_an_optimizer_that_evaluates_again_cannot_be_scaled(tmp_path: Path):
    with pytest.raises(Exception, match=r"float16.*LBFGS.*bfloat16"):
        assembled(tmp_path, {"precision": "float16", "optimizer": "lbfgs"})


@pytest.mark.row("T11")
@pytest.mark.parametrize("optimizer", ["sgd", "per-tensor"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_in_one_of_the_gradients_keeps_the_step_from_all_weights(
    tmp_path: Path, value: float, optimizer: str
):
    parts, state = assembled(tmp_path, {"optimizer": optimizer})
    parameters = list(state.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        copy = gradient.clone()
        copy.view(-1)[-1] = value
        return copy

    parameters[-1].register_hook(spoiled)
    verdict = parts.step.run(state.loader.take(), state).verdict
    assert (verdict.call, verdict.reason) == (Call.BAD, "NonFiniteGradient")
    assert all(torch.equal(kept, parameter) for kept, parameter in zip(before, parameters, strict=True))


@pytest.mark.row("T11")
@pytest.mark.parametrize("optimizer", ["sgd", "per-tensor"])
def test_a_gradient_above_the_bound_is_scaled_to_it_and_one_below_is_not_touched(tmp_path: Path, optimizer: str):
    parts, state = assembled(tmp_path / "free", {"optimizer": optimizer})
    norms, before = [], state.update.apply

    def seen(closure: Any) -> None:
        norms.append(state.update.squared_norm() ** 0.5)
        before(closure)

    state.update.apply = seen  # type: ignore[method-assign]
    Turns(parts, state).run(6)
    free = [*norms]
    bound = sorted(free)[2]
    norms.clear()
    parts, state = assembled(tmp_path / "bound", {"optimizer": optimizer, "clip": bound})
    before = state.update.apply
    state.update.apply = seen  # type: ignore[method-assign]
    Turns(parts, state).run(6)
    assert norms[0] == pytest.approx(min(free[0], bound), rel=1e-5)
    assert max(norms) <= bound * (1 + 1e-5)
    assert max(free) > bound * 1.01
    clipped = parts.step._metrics.value("tolaria.grad.clipped_total") or 0
    assert 1 <= clipped <= 6
