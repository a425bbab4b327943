"""NaN and infinity in loss, gradient, weight and moment at random steps (fault row 12).

Nothing poisoned may become a target of rollback or reach the end, and the run must end with the bits of one from
which the batches of the bad steps were left out by construction.
"""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint import LoadedGeneration
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.state import TrainState

from tests.support.trainers import PAUSED, Pod, Turns, close, same_bits

EPOCHS = 2
STEPS = 32
POISONS = (math.nan, math.inf, -math.inf)
PLACES = ("loss", "gradient", "weight", "moment")


class NonFinite:
    name = "nonfinite"
    goal = 1_000

    def __init__(self) -> None:
        self._expected: dict[tuple[str, tuple[int, ...]], LoadedGeneration] = {}

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        place, poison = dice.choice(PLACES), dice.choice(POISONS)
        optimizer = dice.choice(("adamw", "sgd"))
        every = dice.choice((1, 3, 5))
        step = dice.randrange(4, STEPS - 2)
        pod = configured(directory / "poisoned", optimizer, every)
        parts, state = pod.assemble()
        try:
            turns = Turns(parts, state)
            assert turns.run(step) is PAUSED
            poison_at(place, poison, parts, state)
            outcome = turns.run(10 * STEPS)
            what = f"{place} {poison} at step {step}, {optimizer}, a snapshot every {every} steps"
            assert outcome.exit_code == ExitCode.COMPLETE, f"{what}: {outcome}"
            assert sound(state), f"{what}: the end is poisoned"
            assert pod.counters().rollbacks >= 1, f"{what}: no rollback"
            left_out = sorted(state.loader.number(position) for position in state.loader.skipped)
        finally:
            close(parts)
        same_bits(pod.newest(), self._without(optimizer, tuple(left_out), directory))
        return Counter({"faults": 1, f"{place} {poison}": 1})

    def _without(self, optimizer: str, numbers: tuple[int, ...], directory: Path) -> LoadedGeneration:
        """The end of a run from which these batches were left out."""
        key = (optimizer, numbers)
        if key not in self._expected:
            pod = configured(directory / "without", optimizer, 5)
            assert pod.skipping(*numbers).exit_code == ExitCode.COMPLETE
            self._expected[key] = pod.newest()
        return self._expected[key]


def configured(root: Path, optimizer: str, every: int) -> Pod:
    return Pod(root).configure(
        config={"epochs": EPOCHS, "optimizer": optimizer, "losses": ""},
        checkpoint={"everySteps": 1000, "memory": {"everySteps": every}},
        rollback={"maxRollbacks": 3},
    )


def poison_at(place: str, poison: float, parts: Parts, state: TrainState) -> None:
    """Before the next step: once, as a cosmic ray or a bad kernel would."""
    match place:
        case "loss" | "gradient":
            _poison_batch(place, poison, parts)
        case "weight":
            with torch.no_grad():
                next(state.model.parameters()).view(-1)[3] = poison
        case _:
            _, moments = state.update.live_state()
            largest = max(moments.values(), key=lambda moment: moment.numel())
            largest.view(-1)[5] = poison


def _poison_batch(place: str, poison: float, parts: Parts) -> None:
    faults: Any = parts.step._faults
    name = "on_loss" if place == "loss" else "on_gradient"
    original = getattr(faults, name)

    def once(step: int, subject: Any) -> Any:
        setattr(faults, name, original)
        if place == "loss":
            return subject * poison
        gradient = next(gradient for gradient in subject.gradients() if gradient.numel())
        gradient.view(-1)[0] = poison
        return None

    setattr(faults, name, once)


def sound(state: TrainState) -> bool:
    tensors, _, _ = state.live()
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values() if tensor.is_floating_point())
