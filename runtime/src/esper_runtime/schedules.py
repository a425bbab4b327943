"""Learning-rate schedules for `Workload.schedule` and for the key "schedule" of a parameter group.

A schedule is a value. The rate it gives is a pure function of that value, the base rate, the step, the epoch and, for
`plateau`, of metrics that were recorded; so training replays after a rollback with the same rates. Nothing is changed
here: Tolaria writes the rates. This module imports no torch.

Every schedule begins with its warm-up: from `warmup_factor` of the base rate in step 0, with nothing added, to the
whole of it in step `warmup_steps`. What follows counts from there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, NamedTuple

Function = Callable[[int, int], float]
"""(step from 0, planned steps) -> factor on the base rate."""
WARMUPS: Final = ("linear", "exponential")


class ScheduleError(ValueError):
    """A schedule cannot be used; the message begins with the name of the field."""


class Plan(NamedTuple):
    """What is known of the training's length when it starts."""

    steps: int
    steps_per_epoch: int


class Seen(NamedTuple):
    """What a plateau schedule remembers of the metrics it was told."""

    best: float | None = None
    bad_epochs: int = 0
    """In a row, without a better value."""
    cooldown: int = 0
    """Epochs that still do not count."""
    reductions: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The base rate itself after the warm-up. Others say what they make of it."""

    warmup_steps: int = 0
    warmup_factor: float = 0.1
    warmup: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        _whole("warmup_steps", self.warmup_steps, least=0)
        _between("warmup_factor", self.warmup_factor, 0.0, 1.0)
        if self.warmup not in WARMUPS:
            raise ScheduleError(f"warmup is {self.warmup!r}; give one of {', '.join(map(repr, WARMUPS))}")
        if self.warmup == "exponential" and self.warmup_factor == 0:
            raise ScheduleError(
                "warmup_factor is 0, from which nothing grows exponentially; give more, or warmup='linear'"
            )

    def rate(self, base: float, step: int, epoch: int, plan: Plan, reductions: int = 0) -> float:
        """Of the update that makes step `step` + 1; steps and epochs count from 0."""
        warmup = self.warmup_steps
        if step >= warmup:
            return self.decayed(base, step - warmup, epoch, plan, reductions)
        return base * self.warm(step)

    def warm(self, step: int) -> float:
        """Factor of a step of the warm-up."""
        done = step / self.warmup_steps
        if self.warmup == "linear":
            return self.warmup_factor + (1.0 - self.warmup_factor) * done
        return float(self.warmup_factor ** (1.0 - done))

    def decayed(self, base: float, step: int, epoch: int, plan: Plan, reductions: int) -> float:
        """The rate `step` steps after the warm-up."""
        return base

    def check(self, base: float) -> None:
        """ScheduleError when the schedule does not fit this base rate."""

    def rest(self, plan: Plan) -> int:
        """Planned steps after the warm-up."""
        return max(1, plan.steps - self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant(Schedule):
    """The base rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen(Schedule):
    """Rate 0, whatever else is said: bounds, warm-up, scale."""

    def rate(self, base: float, step: int, epoch: int, plan: Plan, reductions: int = 0) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Schedule):
    """Straight down to `min_rate`, `t_max` steps after the warm-up; without it, where the planned steps end."""

    min_rate: float = 0.0
    t_max: int | None = None

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        _between("min_rate", self.min_rate, 0.0, math.inf)
        _whole("t_max", self.t_max, least=1, optional=True)

    def check(self, base: float) -> None:
        _least_of(self.min_rate, base)

    def decayed(self, base: float, step: int, epoch: int, plan: Plan, reductions: int) -> float:
        length = self.t_max or self.rest(plan)
        left = max(0.0, 1.0 - step / length)
        return min(base, self.min_rate + (base - self.min_rate) * left)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(Schedule):
    """Half a cosine down to `min_rate`, `t_max` steps after the warm-up; without it, where the planned steps end.

    With `restarts` it starts again at the base rate so many times, and `t_max` is the length of one descent. After the
    last one the rate stays at `min_rate`.
    """

    min_rate: float = 0.0
    t_max: int | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        _between("min_rate", self.min_rate, 0.0, math.inf)
        _whole("t_max", self.t_max, least=1, optional=True)
        _whole("restarts", self.restarts, least=0)

    def check(self, base: float) -> None:
        _least_of(self.min_rate, base)

    def decayed(self, base: float, step: int, epoch: int, plan: Plan, reductions: int) -> float:
        cycles = self.restarts + 1
        length = self.t_max or max(1, (plan.steps - self.warmup_steps) // cycles)
        if step >= length * cycles:
            return self.min_rate
        left = 0.5 * (1.0 + math.cos(math.pi * (step % length) / length))
        return min(base, self.min_rate + (base - self.min_rate) * left)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step(Schedule):
    """Times `gamma` after every so many epochs or steps, counted from the epoch or step in which the warm-up ends."""

    every_epochs: int | None = None
    every_steps: int | None = None
    gamma: float = 0.5

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        _whole("every_epochs", self.every_epochs, least=1, optional=True)
        _whole("every_steps", self.every_steps, least=1, optional=True)
        if (self.every_epochs is None) == (self.every_steps is None):
            raise ScheduleError("every_epochs, every_steps: give one of them")
        _between("gamma", self.gamma, 0.0, 1.0)

    def decayed(self, base: float, step: int, epoch: int, plan: Plan, reductions: int) -> float:
        if self.every_steps is not None:
            return float(base * self.gamma ** (step // self.every_steps))
        assert self.every_epochs is not None
        warm_epochs = self.warmup_steps // max(1, plan.steps_per_epoch)
        return float(base * self.gamma ** (max(0, epoch - warm_epochs) // self.every_epochs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plateau(Schedule):
    """Times `factor` whenever `metric` has not become better for more than `patience` epochs.

    Better is by more than `threshold` of the best value so far. After a reduction, `cooldown` epochs do not count.
    `metric` is any name that an epoch reports; "loss" is that of the validation data, or of training without any.
    """

    factor: float = 0.5
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    mode: Literal["min", "max"] = "min"
    metric: str = "loss"

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        _between("factor", self.factor, 0.0, 1.0)
        _whole("patience", self.patience, least=0)
        _between("threshold", self.threshold, 0.0, math.inf)
        _whole("cooldown", self.cooldown, least=0)
        if self.mode not in ("min", "max"):
            raise ScheduleError(f"mode is {self.mode!r}; give 'min' or 'max'")
        if not isinstance(self.metric, str) or not self.metric:
            raise ScheduleError(f"metric is {self.metric!r}; give the name of a metric, such as 'loss'")

    def decayed(self, base: float, step: int, epoch: int, plan: Plan, reductions: int) -> float:
        return float(base * self.factor**reductions)

    def observed(self, seen: Seen, value: float, *, step: int) -> Seen:
        """What is remembered after one more epoch; `step` steps are done. The warm-up is not judged."""
        better = math.isfinite(value) and (seen.best is None or self._is_better(value, seen.best))
        best = value if better else seen.best
        if step < self.warmup_steps:
            return seen._replace(best=best)
        if better:
            return Seen(best, 0, max(0, seen.cooldown - 1), seen.reductions)
        if seen.cooldown:
            return Seen(best, 0, seen.cooldown - 1, seen.reductions)
        if seen.bad_epochs < self.patience:
            return Seen(best, seen.bad_epochs + 1, 0, seen.reductions)
        return Seen(best, 0, self.cooldown, seen.reductions + 1)

    def _is_better(self, value: float, best: float) -> bool:
        margin = self.threshold * abs(best)
        return value < best - margin if self.mode == "min" else value > best + margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Custom(Schedule):
    """A function of the user's, given in place of a schedule. It may warm up by itself."""

    function: Function

    def rate(self, base: float, step: int, epoch: int, plan: Plan, reductions: int = 0) -> float:
        return base * self.function(step, plan.steps)


constant, linear, cosine, step, plateau, frozen = Constant, Linear, Cosine, Step, Plateau, Frozen

POLICIES: Final[dict[str, type[Schedule]]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
    "plateau": plateau,
    "frozen": frozen,
}


def read(config: Mapping[str, Any]) -> Schedule:
    """A schedule from configuration, such as {"policy": "cosine", "warmup_steps": 100}.

    ScheduleError for an unknown policy, an option that it does not have, and a value that it cannot use.
    """
    policy = config.get("policy")
    make = POLICIES.get(policy) if isinstance(policy, str) else None
    if make is None:
        raise ScheduleError(f"policy is {policy!r}; give one of {', '.join(POLICIES)}")
    known = [field.name for field in fields(make)]
    options = {name: value for name, value in config.items() if name != "policy"}
    for name in options:
        if name not in known:
            raise ScheduleError(f"{name} is unknown to {policy}; it knows {', '.join(known) or 'no options'}")
    return make(**options)


def as_schedule(value: object, *, field: str) -> Schedule:
    """A schedule, or a function in its place; None is `constant()`. ScheduleError for anything else."""
    if value is None:
        return Constant()
    if isinstance(value, Schedule):
        return value
    if callable(value):
        return Custom(function=value)
    raise ScheduleError(f"{field} is {value!r}; give one of esper_runtime.schedules, or a function of (step, planned)")


def _whole(field: str, value: object, *, least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{field} is {value!r}; give an integer of at least {least}")


def _between(field: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):  # type: ignore[operator,arg-type]
        limit = f"of at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise ScheduleError(f"{field} is {value!r}; give a number {limit}")


def _least_of(min_rate: float, base: float) -> None:
    if min_rate > base:
        raise ScheduleError(f"min_rate is {min_rate:g}, above the base rate {base:g} that it comes down from")
