"""Decides whether a step is good, before the optimizer may apply it.

A loss or gradient that is not finite is bad at once. Losses and gradient norms that have left their band (losses.py,
gradients.py) are suspect: such a step is applied, but nothing after it is kept as good, until they return to it or are
bad. Trouble began with the first of the suspect steps that lead up to a bad one.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Health

from esper_runtime.tolaria.gradients import NormStatistics
from esper_runtime.tolaria.losses import EXPLOSION_FACTOR, LossStatistics


class Call(StrEnum):
    GOOD = "good"
    SUSPECT = "suspect"
    """Applied, but the state after it is not to be trusted yet."""
    DISCARD = "discard"
    """Not applied; training goes on."""
    BAD = "bad"
    """Not applied; `action` says what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """About one step, or about the state after it."""

    call: Call
    reason: RunReason | None = None
    message: str = ""
    action: str = ""
    """Rollback or Halt, of a bad step."""
    first_suspect: int = 0
    """The step with which the trouble began; rollback goes to before it."""


GOOD = Verdict(call=Call.GOOD)
LEFT_OUT = Verdict(call=Call.DISCARD)
"""Of a step that is replayed and was not applied the first time either."""
_LAYOUT = -2.0
"""Below zero, where the first layout had a count."""


class Judge:
    """One per run. Its memory is part of the state that a rollback restores."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._losses = LossStatistics(health.loss_spike_window_steps)
        self._norms = NormStatistics()
        self._began = 0
        """The first of the suspect steps since the last good one; 0 when there is none."""
        self.norm = math.nan
        """L2, of the last gradient that was finite."""

    def configure(self, health: Health) -> None:
        """New limits; what is known stays."""
        if health.loss_spike_window_steps != self._health.loss_spike_window_steps:
            self._losses.resize(health.loss_spike_window_steps)
        self._health = health

    @property
    def suspicious(self) -> bool:
        """The last step was: states since the first such step are not good."""
        return self._began > 0

    @property
    def may_discard(self) -> bool:
        """A step may be left out while training goes on from the state before it."""
        return self._health.non_finite_action == "Ignore"

    def check(self, step: int, loss: float, squared_norm: float, all_finite: Callable[[], bool]) -> Verdict:
        """`squared_norm` is that of the gradient before clipping. `all_finite` is asked only when it is not finite (it
        may merely overflow).
        """
        if not math.isfinite(loss):
            return self._not_finite(step, RunReason.NON_FINITE_LOSS, f"the loss of step {step} is {loss}")
        if not math.isfinite(squared_norm) and not all_finite():
            message = f"the gradient of step {step} has values that are not finite"
            return self._not_finite(step, RunReason.NON_FINITE_GRADIENT, message)
        self.norm = norm = math.sqrt(squared_norm)
        gradient = self._gradient(step, loss, norm)
        spike = self._spike(step, loss)
        if gradient is GOOD and spike is GOOD:
            self._began = 0
            return GOOD
        if gradient is GOOD or spike.call is Call.BAD:
            return spike
        return gradient if gradient.call is Call.BAD or spike is GOOD else spike

    def unsound(self, step: int, message: str) -> Verdict:
        """The state after `step`, which was applied, has values that are not finite; `message` names them.

        Good, where such values are to be ignored: there is nothing left to discard.
        """
        action = self._health.non_finite_action
        if action == "Ignore":
            return Verdict(call=Call.GOOD, reason=RunReason.NON_FINITE_WEIGHT, message=message)
        return self._bad(RunReason.NON_FINITE_WEIGHT, message, action, step)

    def _not_finite(self, step: int, reason: RunReason, message: str) -> Verdict:
        action = self._health.non_finite_action
        if action == "Ignore":
            return Verdict(call=Call.DISCARD, reason=reason, message=message)
        return self._bad(reason, message, action, step)

    def _bad(self, reason: RunReason, message: str, action: str, step: int) -> Verdict:
        first = self._began or step
        return Verdict(call=Call.BAD, reason=reason, message=message, action=action, first_suspect=first)

    def _suspect(self, reason: RunReason, message: str, step: int) -> Verdict:
        self._began = self._began or step
        return Verdict(call=Call.SUSPECT, reason=reason, message=message, first_suspect=self._began)

    def _spike(self, step: int, loss: float) -> Verdict:
        health, losses = self._health, self._losses
        threshold = health.loss_spike_threshold
        z = 0.0 if health.loss_spike_action == "Ignore" else losses.unusual(loss, threshold)
        if z == 0.0:
            losses.absorb(loss)
            return GOOD
        losses.suspect(loss, z)
        message = f"loss {loss:.6g} at step {step}: robust z-score {z:.1f}, above {threshold:g}"
        if losses.is_explosion(loss, z, threshold):
            message += f", and more than {EXPLOSION_FACTOR:g} times the highest average so far"
        elif not losses.is_trouble(threshold, health.loss_spike_consecutive_steps):
            return self._suspect(RunReason.LOSS_SPIKE, message, step)
        elif len(losses.streak) > 1:
            message += f"; {len(losses.streak)} in a row"
        return self._bad(RunReason.LOSS_SPIKE, message, health.loss_spike_action, step)

    def _gradient(self, step: int, loss: float, norm: float) -> Verdict:
        health, norms = self._health, self._norms
        factor = health.gradient_norm_factor
        unusual = health.gradient_norm_action != "Ignore" and norms.unusual(norm, factor)
        if not unusual or self._losses.is_low(loss):
            norms.absorb(norm, factor)
            return GOOD
        norms.suspect(norm)
        message = f"gradient norm {norm:.6g} at step {step}: more than {factor:g} times its average {norms.mean:.6g}"
        if len(norms.streak) < health.gradient_norm_consecutive_steps:
            return self._suspect(RunReason.GRADIENT_EXPLOSION, message, step)
        if len(norms.streak) > 1:
            message += f"; {len(norms.streak)} in a row"
        return self._bad(RunReason.GRADIENT_EXPLOSION, message, health.gradient_norm_action, step)

    def capture(self) -> bytes:
        """float64: the layout, the first suspect step, how long the losses' part is, that part, that of the norms."""
        losses = self._losses.capture()
        return array("d", [_LAYOUT, self._began, len(losses), *losses, *self._norms.capture()]).tobytes()

    def restore(self, state: bytes) -> None:
        flat = array("d")
        flat.frombytes(state)
        if flat[0] != _LAYOUT:
            self._restore_first_layout(flat)
            return
        self._began = int(flat[1])
        end = 3 + int(flat[2])
        self._losses.restore(flat[3:end])
        self._norms.restore(flat[end:])

    def _restore_first_layout(self, flat: Sequence[float]) -> None:
        """Of checkpoints before there were bands: the window's length, that of an open streak, the window."""
        count = int(flat[0])
        self._began = 0
        self._losses.restore([count, 0, count, 0.0, 0.0, 0.0, *flat[2 : 2 + count]])
        self._norms = NormStatistics()


def judge_validation(health: Health, *, name: str, mode: str, value: float, best: float, best_step: int) -> Verdict:
    """Compares an epoch's validation metric with the best so far, which was that of `best_step`.

    `mode` is retention.mode: Min where less is better. Bad when the value is worse by more than `maxDrop` of the best
    value's size, or is no number. It is not known which step did it: all since the best one are suspect.
    """
    if health.validation_action == "Ignore":
        return GOOD
    sign = 1.0 if mode == "Min" else -1.0
    worse_by = sign * (value - best)
    if worse_by <= health.validation_max_drop * abs(best):
        return GOOD
    message = (
        f"{name} is {value:.6g} and was {best:.6g} at step {best_step}: "
        f"worse by more than {health.validation_max_drop:g} of it"
    )
    return Verdict(
        call=Call.BAD,
        reason=RunReason.VALIDATION_REGRESSION,
        message=message,
        action=health.validation_action,
        first_suspect=best_step + 1,
    )
