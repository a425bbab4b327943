"""Loss curves recorded from real runs (tests/bench/record_curves.py), and where trouble begins in them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).resolve().parents[1] / "golden/curves/curves.npz"
BAND_STEPS = 50
"""Losses before a step that make up the band it is compared with."""
LIMIT_STEPS = 5
"""Within so many steps of its beginning trouble has to be seen."""
HOLD_STEPS = 30
"""Losses in a row that must lie above the band for it to be left."""


class Label(StrEnum):
    HEALTHY = "healthy"
    PLATEAU = "plateau"
    """Does not get better any more, and is not ill."""
    BENIGN_SPIKE = "benign_spike"
    """Healthy but for single bad batches."""
    BAD_BATCHES = "bad_batches"
    """Five or more bad batches in a row."""
    DIVERGENCE = "divergence"

    @property
    def calm(self) -> bool:
        """No alarm is due."""
        return self in (Label.HEALTHY, Label.PLATEAU, Label.BENIGN_SPIKE)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Steps count from 1, so `losses[0]` is that of step 1. The last value may be NaN or infinite."""

    name: str
    label: Label
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    trouble: int
    """Step at which it begins; 0 in a calm run."""
    cause: int
    """Step of what was done to the run (a raised rate, a bad batch); 0 when it was ill from the start."""
    held_out: bool
    """Not looked at while the judge was tuned."""

    def false_alarm(self, alarm: int | None) -> bool:
        """Whether an alarm at this step is one about nothing: in a calm run, or before anything was done to it."""
        return alarm is not None and (self.label.calm or alarm < (self.cause or self.trouble))

    def seen_in_time(self, alarm: int | None) -> bool:
        """Of a run with trouble."""
        return alarm is not None and not self.false_alarm(alarm) and alarm - self.trouble <= LIMIT_STEPS


Detector = Callable[[int, float, float], bool]
"""(step, loss, gradient norm) -> alarm. Has a memory: one per curve."""


def first_alarm(curve: Curve, detect: Detector) -> int | None:
    """The step of it."""
    for step, (loss, norm) in enumerate(zip(curve.losses, curve.norms, strict=True), 1):
        if detect(step, loss, norm):
            return step
    return None


def left_its_band(losses: tuple[float, ...]) -> int:
    """The first step from which on 30 losses (or all that follow) lie above each of the 50 before that step.

    A loss that is not finite lies above. 0 when there is no such step.
    """
    plain = [loss if math.isfinite(loss) else math.inf for loss in losses]
    for first in range(1, len(plain)):
        if min(plain[first : first + HOLD_STEPS]) > max(plain[max(0, first - BAND_STEPS) : first]):
            return first + 1
    return 0


def load() -> list[Curve]:
    """All of them, in the order in which they were recorded. Every second one of a label is held out."""
    with np.load(FILE, allow_pickle=False) as stored:
        recipes: dict[str, dict[str, Any]] = json.loads(stored["recipes"].tobytes())
        curves = []
        seen = dict.fromkeys(Label, 0)
        for name, recipe in recipes.items():
            label = Label(recipe["label"])
            curves.append(_curve(name, label, recipe, stored[name], held_out=bool(seen[label] % 2)))
            seen[label] += 1
        return curves


def _curve(name: str, label: Label, recipe: dict[str, Any], rows: Any, *, held_out: bool) -> Curve:
    losses, norms = (tuple(float(value) for value in row) for row in rows)
    trouble = cause = 0
    if label is Label.BAD_BATCHES:
        trouble = cause = recipe["garbage"][0]
    elif label is Label.DIVERGENCE:
        trouble, cause = left_its_band(losses), recipe["raise_at"]
    return Curve(name=name, label=label, losses=losses, norms=norms, trouble=trouble, cause=cause, held_out=held_out)
