"""Parameter groups as the learning rate knows them: a name, a base rate, a schedule and bounds for each.

The user's keys "name", "schedule", "min_lr" and "max_lr" are taken out of the groups before torch sees them.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from esper_runtime.schedules import Constant, Frozen, Plan, Plateau, Schedule, Seen, as_schedule

KEYS = ("name", "schedule", "min_lr", "max_lr")
SEED_SHARE = 0.1
"""Base rate of a group that is added while training, as a share of the first group's."""
SEED_WARMUP_FACTOR = 0.01
MAX_NAME = 64


class GroupError(ValueError):
    """A parameter group cannot be registered; the message names the group and the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user said of one group, beside what torch knows."""

    name: str
    schedule: Schedule = field(default_factory=Constant)
    min_rate: float = 0.0
    max_rate: float = sys.float_info.max

    def __post_init__(self) -> None:
        where = f"parameter group {self.name!r}"
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_NAME:
            raise GroupError(f"{where}: name must be a text of 1 to {MAX_NAME} characters")
        for key, value in (("min_lr", self.min_rate), ("max_lr", self.max_rate)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise GroupError(f"{where}: {key} is {value!r}; give a finite number of at least 0")
        if self.min_rate > self.max_rate:
            raise GroupError(f"{where}: min_lr {self.min_rate:g} is above max_lr {self.max_rate:g}")


@dataclass(kw_only=True, slots=True)
class Group:
    """One registered group of the optimizer. Schedules of groups that came later count from when they came."""

    options: Options
    base_rate: float
    written: float
    """What the group's rate has to be now."""
    tensor: Tensor | None = None
    """Where it is written, when the optimizer's rate is a tensor."""
    tensor_version: int = 0
    """Of the tensor after the last write."""
    from_step: int = 0
    from_epoch: int = 0
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        where = f"parameter group {self.name!r}"
        if not math.isfinite(self.base_rate) or self.base_rate < 0:
            raise GroupError(f"{where}: lr is {self.base_rate!r}; give a finite number of at least 0")
        try:
            self.options.schedule.check(self.base_rate)
        except ValueError as error:
            raise GroupError(f"{where}: schedule.{error}") from error

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def bounds(self) -> tuple[float, float]:
        options = self.options
        return (0.0, 0.0) if isinstance(options.schedule, Frozen) else (options.min_rate, options.max_rate)

    def hold(self, rate: object) -> None:
        """Takes up the rate of the optimizer's group, which equals `written`."""
        self.tensor = rate if isinstance(rate, Tensor) else None
        self.tensor_version = 0 if self.tensor is None else self.tensor._version

    def rate(self, step: int, epoch: int, scale: float, plan: Plan) -> float:
        """clamp(base * warm-up * decay * scale) of the update that makes step `step` + 1."""
        options, start = self.options, self.from_step
        if start:
            plan = Plan(max(1, plan.steps - start), plan.steps_per_epoch)
        found = options.schedule.rate(self.base_rate, step - start, epoch - self.from_epoch, plan, self.seen.reductions)
        rate = found * scale
        if options.min_rate <= rate <= options.max_rate:
            return rate
        return self._clamped(rate, step)

    def _clamped(self, rate: float, step: int) -> float:
        if not math.isfinite(rate):
            raise GroupError(
                f"parameter group {self.name!r}: schedule gave {rate!r} for step {step}; it must be finite"
            )
        least, most = self.bounds
        return min(max(rate, least), most)

    def observe(self, metrics: dict[str, float], step: int) -> None:
        """Tells a plateau schedule about the epoch that ends. GroupError when its metric is not among them."""
        schedule = self.options.schedule
        if not isinstance(schedule, Plateau):
            return
        if schedule.metric not in metrics:
            raise GroupError(
                f"parameter group {self.name!r}: schedule.metric is {schedule.metric!r}, which no epoch reports; "
                f"there are {', '.join(sorted(metrics))}"
            )
        self.seen = schedule.observed(self.seen, metrics[schedule.metric], step=step - self.from_step)


def split(groups: Iterable[dict[str, Any]], default: object) -> tuple[list[dict[str, Any]], list[Options]]:
    """(what torch gets, what is registered) of the user's groups; `default` is the schedule of those without one."""
    for_torch: list[dict[str, Any]] = []
    found: list[Options] = []
    for index, group in enumerate(groups):
        name = group.get("name", f"group-{index}")
        for_torch.append({key: value for key, value in group.items() if key not in KEYS})
        found.append(
            Options(
                name=name,
                schedule=as_schedule(group.get("schedule", default), field=f"parameter group {name!r}: schedule"),
                min_rate=group.get("min_lr", 0.0),
                max_rate=group.get("max_lr", sys.float_info.max),
            )
        )
    return for_torch, found


def unsplit(optimizer: Optimizer, default: object) -> list[Options]:
    """Options of an optimizer that made its groups itself: only the schedule for all of them is known."""
    schedule = as_schedule(default, field="Workload.schedule")
    count = len(optimizer.param_groups)
    return [Options(name="all" if count == 1 else f"group-{index}", schedule=schedule) for index in range(count)]


def register(optimizer: Optimizer, options: Sequence[Options]) -> list[Group]:
    """One Group for each of the optimizer's. GroupError when their numbers differ, or two have the same name."""
    groups = optimizer.param_groups
    if len(groups) != len(options):
        raise GroupError(
            f"the optimizer has {len(groups)} parameter groups, {len(options)} are registered: a group without a name "
            "and a schedule is refused; give Workload.parameter_groups all of them, and keep their order"
        )
    registered: list[Group] = []
    for group, chosen in zip(groups, options, strict=True):
        if "lr" not in group:
            raise GroupError(f"parameter group {chosen.name!r} has no lr: Tolaria needs one to set")
        require_new(chosen.name, registered)
        base = float(group["lr"])
        registered.append(Group(options=chosen, base_rate=base, written=base))
        registered[-1].hold(group["lr"])
    return registered


def require_new(name: str, groups: Sequence[Group]) -> None:
    if any(group.name == name for group in groups):
        raise GroupError(f"parameter group {name!r} is there already: names must differ")


def seed_group(
    name: str, primary: Group, *, warmup_steps: int, step: int, epoch: int, schedule: Schedule | None = None
) -> Group:
    """For parameters that come while training: a tenth of the first group's base rate, warmed up from a hundredth."""
    if schedule is None:
        schedule = Plateau(warmup_steps=warmup_steps, warmup_factor=SEED_WARMUP_FACTOR)
    base = SEED_SHARE * primary.base_rate
    written = schedule.rate(base, 0, 0, Plan(1, 1))
    return Group(
        options=Options(name=name, schedule=schedule),
        base_rate=base,
        written=written,
        from_step=step,
        from_epoch=epoch,
    )
