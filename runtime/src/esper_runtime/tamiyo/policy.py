"""The rules: what the facts of one epoch boundary, after those before it, call for.

`advance` folds one boundary into a bounded memory. It reads no clock and draws no random number, so equal histories
give equal decisions. In order of precedence:

1. Training loss not finite, or exploded: ROLLBACK, conservative mode.
2. Validation worse than the best so far for `patience` boundaries in a row: conservative mode, learning rate scaled
   down, at most once per `dwell` boundaries and `max_scalings` times in all.
3. Otherwise explicitly nothing. Conservative mode ends after `recovery` healthy boundaries in a row.

The mode has hysteresis twice over, so that it does not flicker: a streak is needed to enter and another to leave it,
and healthy is nearer to the best than not worse. What counts as worse follows the noise of the validation itself.
"""

import math
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from esper_leyline.v1.command_pb2 import RiskReason

POLICY_VERSION: Final = "rules-1"

_BEND_OF_SIGMA: Final = 1.652
"""Median of |second difference| of independent normal values in standard deviations: 0.6745 times the root of 6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Thresholds. Counts are of epoch boundaries."""

    patience: int = 3
    relative_delta: float = 0.1
    """Worse means: above the best by more than this share of it ..."""
    absolute_delta: float = 0.005
    """... and by more than this, so that noise around zero is none ..."""
    noise_factor: float = 5.0
    """... and by more than this many standard deviations of what validation does from one boundary to the next."""
    release: float = 0.6
    """Healthy means: above the best by no more than this share of that distance. What lies between is neither."""
    learning_rate_scale: float = 0.5
    dwell: int = 5
    max_scalings: int = 4
    recovery: int = 3
    explosion_factor: float = 10.0
    """Exploded means: above every earlier loss, and above the recent median by this many times its size."""
    window: int = 8
    """Training losses that the median is taken of; validation values that the noise is taken of."""
    min_window: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one boundary says. None is unknown."""

    step: int
    training_loss: float | None = None
    validation: float | None = None
    """Lower is better."""
    metric: str = "validation loss"
    """What `validation` is, for people; values of another metric are not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """All that is kept between boundaries; its size does not grow with the run."""

    boundary: int = 0
    step: int = -1
    losses: tuple[float, ...] = ()
    worst_loss: float = -math.inf
    metric: str = ""
    best: float | None = None
    recent: tuple[float, ...] = ()
    """Newest validation values that were not worse: what is in doubt does not judge itself."""
    worse: int = 0
    """Boundaries in a row with a validation regression."""
    healthy: int = 0
    """Boundaries in a row with nothing wrong."""
    risk: RiskReason = RiskReason.RISK_REASON_UNSPECIFIED
    """Why the mode is conservative; unspecified when it is not."""
    scalings: int = 0
    scaled_at: int | None = None
    rolled_back_at: int | None = None

    @property
    def conservative(self) -> bool:
        return self.risk != RiskReason.RISK_REASON_UNSPECIFIED


class Action(StrEnum):
    NO_OPERATION = "NoOperation"
    SCALE_LEARNING_RATE = "ScaleLearningRate"
    ROLLBACK = "Rollback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    action: Action
    risk: RiskReason
    """RiskReason of conservative mode, unspecified outside of it."""
    conservative: bool
    rationale: str
    """One sentence for people."""
    learning_rate_scale: float | None = None


def advance(memory: Memory, facts: Facts, config: PolicyConfig) -> tuple[Memory, Decision]:
    """The memory after this boundary, and what it calls for."""
    memory = _arrived(memory, facts)
    diverged = _divergence(memory, facts, config)
    memory, finding = _judged(memory, facts, config, sound=not diverged)
    memory = _moded(memory, config, diverged=bool(diverged))
    if diverged and _rollback_due(memory, facts, config):
        memory = replace(memory, rolled_back_at=memory.boundary)
        return memory, _decision(memory, Action.ROLLBACK, f"{diverged}: roll back")
    if not diverged and _scaling_due(memory, config):
        memory = replace(memory, scalings=memory.scalings + 1, scaled_at=memory.boundary)
        rationale = f"{finding}: learning rate times {config.learning_rate_scale:g}"
        return memory, _decision(memory, Action.SCALE_LEARNING_RATE, rationale, config.learning_rate_scale)
    return memory, _decision(memory, Action.NO_OPERATION, diverged or finding)


def _arrived(memory: Memory, facts: Facts) -> Memory:
    """Counts the boundary. Streaks end where training went back: they were about a state that is gone."""
    went_back = facts.step <= memory.step
    if memory.metric and facts.validation is not None and facts.metric != memory.metric:
        memory = replace(memory, best=None, recent=(), worse=0)
    return replace(
        memory,
        boundary=memory.boundary + 1,
        step=facts.step,
        metric=facts.metric if facts.validation is not None else memory.metric,
        worse=0 if went_back else memory.worse,
        healthy=0 if went_back else memory.healthy,
    )


def _divergence(memory: Memory, facts: Facts, config: PolicyConfig) -> str:
    """What is wrong with the training loss; empty when nothing is."""
    loss = facts.training_loss
    if loss is None:
        return ""
    if not math.isfinite(loss):
        return f"training loss is {loss}"
    if len(memory.losses) < config.min_window:
        return ""
    median = statistics.median(memory.losses)
    if loss > memory.worst_loss and loss > median + config.explosion_factor * abs(median):
        return f"training loss {loss:.4g} exploded from a median of {median:.4g}"
    return ""


def _judged(memory: Memory, facts: Facts, config: PolicyConfig, *, sound: bool) -> tuple[Memory, str]:
    """Takes the boundary's losses into the memory, and says in words what they mean."""
    if sound and facts.training_loss is not None:
        memory = replace(
            memory,
            losses=(*memory.losses, facts.training_loss)[-config.window :],
            worst_loss=max(memory.worst_loss, facts.training_loss),
        )
    healthy = memory.healthy + 1 if sound else 0
    value, best = facts.validation, memory.best
    if value is None:
        return replace(memory, healthy=healthy), "no validation result to judge by"
    sound_too = (*memory.recent, value)[-config.window :]
    if math.isfinite(value) and (best is None or value < best):
        memory = replace(memory, best=value, recent=sound_too, worse=0, healthy=healthy)
        return memory, f"{facts.metric} {value:.4g} is the best so far"
    if best is None:
        return replace(memory, worse=memory.worse + 1, healthy=0), f"{facts.metric} is {value}"
    margin = _margin(memory, best, config)
    if value <= best + margin:
        healthy = healthy if value <= best + config.release * margin else 0
        memory = replace(memory, recent=sound_too, worse=0, healthy=healthy)
        return memory, f"{facts.metric} {value:.4g} is near the best of {best:.4g}"
    worse = memory.worse + 1
    finding = f"{facts.metric} {value:.4g} is worse than the best of {best:.4g}, {worse} in a row"
    return replace(memory, worse=worse, healthy=0), finding


def _margin(memory: Memory, best: float, config: PolicyConfig) -> float:
    """How far above the best a value may be. A loss that jumps about a level is far above its own minimum most of the
    time, and that is no regression: so the noise counts, as the standard deviation around any trend."""
    before = memory.recent
    triples = zip(before[:-2], before[1:-1], before[2:], strict=True)
    bends = [abs(third - 2 * second + first) for first, second, third in triples]
    noise = statistics.median(bends) / _BEND_OF_SIGMA if len(bends) >= config.min_window else 0.0
    return max(config.relative_delta * abs(best), config.absolute_delta, config.noise_factor * noise)


def _moded(memory: Memory, config: PolicyConfig, *, diverged: bool) -> Memory:
    """Enters or leaves conservative mode. A mode keeps the reason it was entered for."""
    if not memory.conservative:
        if diverged:
            return replace(memory, risk=RiskReason.RISK_REASON_LOSS_SPIKE)
        if memory.worse >= config.patience:
            return replace(memory, risk=RiskReason.RISK_REASON_VALIDATION_REGRESSION)
    elif memory.healthy >= config.recovery:
        return replace(memory, risk=RiskReason.RISK_REASON_UNSPECIFIED)
    return memory


def _rollback_due(memory: Memory, facts: Facts, config: PolicyConfig) -> bool:
    """A state that is not finite cannot train on, so for it there is no dwell."""
    finite = facts.training_loss is not None and math.isfinite(facts.training_loss)
    return not finite or _dwelt(memory, memory.rolled_back_at, config)


def _scaling_due(memory: Memory, config: PolicyConfig) -> bool:
    return (
        memory.worse >= config.patience
        and memory.scalings < config.max_scalings
        and _dwelt(memory, memory.scaled_at, config)
    )


def _dwelt(memory: Memory, last: int | None, config: PolicyConfig) -> bool:
    return last is None or memory.boundary - last >= config.dwell


def _decision(memory: Memory, action: Action, rationale: str, scale: float | None = None) -> Decision:
    return Decision(
        action=action,
        risk=memory.risk,
        conservative=memory.conservative,
        rationale=rationale,
        learning_rate_scale=scale,
    )
