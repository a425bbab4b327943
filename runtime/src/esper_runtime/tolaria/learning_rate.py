"""The only writer of learning rates. Before every update it looks whether somebody else has written one, and writes.

What it finds changed it puts right, counts, and tells; training goes on with the right rate. Its breaker is kept by
esper_runtime.tolaria.stability, for which an epoch without a word from here is one that went well.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from esper_leyline.reasons import RunReason

from esper_runtime.schedules import Constant, Cosine, Frozen, Linear, Plan, Seen
from esper_runtime.tolaria.entrypoint import UserCodeError
from esper_runtime.tolaria.groups import Group, GroupError
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Part, Stability
from esper_runtime.tolaria.telemetry import Events
from esper_runtime.tolaria.update import Update

MAX_HISTORY = 1000
ABSOLUTE, RELATIVE = 1e-12, 1e-6
_STEADY = (Constant, Frozen)
"""Schedules that change nothing after their warm-up."""


class Mark(NamedTuple):
    """The rates at the end of one epoch, in the order of the groups."""

    epoch: int
    step: int
    rates: tuple[float, ...]


class LearningRate:
    """Of one trainer. Its state is what plateau schedules remember, and where later groups begin."""

    def __init__(self, update: Update, *, plan: Plan, metrics: Metrics, events: Events, stability: Stability) -> None:
        self._update = update
        self._plan = plan
        self._metrics = metrics
        self._events = events
        self._stability = stability
        self._found = 0
        """Foreign changes so far."""
        self._changes = 0
        """Of the update's groups, when they were looked at last."""
        self._steady_from = math.inf
        self._steady_scale: float | None = None
        """With this scale every rate stays what it is."""
        self.history: deque[Mark] = deque(maxlen=MAX_HISTORY)
        for registered, group in zip(update.groups, update.optimizer.param_groups, strict=True):
            _require_length(registered, plan)
            _write(registered, group, registered.written)
        self._tell_metrics()

    # Every step

    def apply(self, *, step: int, epoch: int, scale: float) -> None:
        """Call right before the optimizer's step. `step` updates were made or left out so far, epochs count from 0.

        `scale` is the run's own factor. UserCodeError when a schedule cannot be used any more.
        """
        update = self._update
        groups, live = update.groups, update.optimizer.param_groups
        if len(groups) != len(live):
            raise UserCodeError(
                RunReason.USER_CODE_ERROR,
                f"the optimizer has {len(live)} parameter groups, {len(groups)} are registered: "
                "a group without a name and a schedule is refused",
            )
        for registered, group in zip(groups, live, strict=True):
            found = group["lr"]
            if found != registered.written if type(found) is float else _may_differ(found, registered):
                self._judge(registered, group, step)
        if update.changes != self._changes:
            self._look_ahead()
        if scale != self._steady_scale:
            self._write_all(step, epoch, scale)

    def _look_ahead(self) -> None:
        """After a change of groups: from which step on nothing changes any more."""
        groups = self._update.groups
        steady = all(type(group.options.schedule) in _STEADY for group in groups)
        ends = [group.from_step + group.options.schedule.warmup_steps for group in groups]
        self._steady_from = max(ends) if steady else math.inf
        self._steady_scale = None
        self._changes = self._update.changes

    def _write_all(self, step: int, epoch: int, scale: float) -> None:
        update, plan = self._update, self._plan
        try:
            for registered, group in zip(update.groups, update.optimizer.param_groups, strict=True):
                rate = registered.rate(step, epoch, scale, plan)
                if rate != registered.written:
                    _write(registered, group, rate)
        except GroupError as error:
            raise UserCodeError(RunReason.USER_CODE_ERROR, str(error)) from error
        if step >= self._steady_from:
            self._steady_scale = scale

    def _judge(self, registered: Group, group: dict[str, Any], step: int) -> None:
        """The rate is not exactly what was written: rounded by a tensor's type, or changed by somebody."""
        found, wanted = float(group["lr"]), registered.written
        wrong = why_wrong(found, registered)
        if not wrong:
            return
        _write(registered, group, wanted)
        self._found += 1
        self._metrics.add("tolaria.lr_controller.violations_total", group=registered.name)
        self._metrics.add("tolaria.lr_violations_total")
        message = f"learning rate of parameter group {registered.name!r} {wrong} before step {step + 1}; put back"
        self._stability.failed(Part.LR_INTEGRITY, message)
        if self._found.bit_count() == 1:  # 1, 2, 4, 8 ...: it may go on in every step
            counted = f"{message} ({self._found} so far; only Tolaria sets learning rates: use Workload.schedule)"
            self._events.notice(RunReason.LEARNING_RATE_TAMPERED, counted, warning=True)

    # Every epoch

    def observe(self, metrics: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Call once when an epoch ends, before anything is saved. UserCodeError when a plateau's metric is missing."""
        if metrics:
            try:
                for group in self._update.groups:
                    group.observe(dict(metrics), step)
            except GroupError as error:
                raise UserCodeError(RunReason.USER_CODE_ERROR, str(error)) from error
        self.history.append(Mark(epoch, step, tuple(group.written for group in self._update.groups)))
        self._tell_metrics()

    def _tell_metrics(self) -> None:
        groups = self._update.groups
        enabled = any(group.options.schedule != Constant() for group in groups)
        self._metrics.set("tolaria.lr_controller.enabled", float(enabled))
        for group in groups:
            self._metrics.set("tolaria.lr_controller.current_lr", group.written, group=group.name)

    # State: tolaria.state.Extra

    def capture(self) -> dict[str, Any]:
        return {
            "step": self.history[-1].step if self.history else 0,
            "groups": {
                group.name: {
                    "base": group.base_rate,
                    "written": group.written,
                    "from": [group.from_step, group.from_epoch],
                    "seen": list(group.seen),
                }
                for group in self._update.groups
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Base rates stay those of the workload, except of groups that came while training."""
        while self.history and self.history[-1].step > saved.get("step", 0):
            self.history.pop()
        self._changes = 0  # groups may begin elsewhere
        found = saved.get("groups", {})
        for registered, group in zip(self._update.groups, self._update.optimizer.param_groups, strict=True):
            facts = found.get(registered.name)
            registered.seen = Seen() if facts is None else Seen(*facts["seen"])
            if facts is not None and facts["from"][0]:
                registered.from_step, registered.from_epoch = facts["from"]
                registered.base_rate = facts["base"]
            _write(registered, group, registered.base_rate if facts is None else facts["written"])


def _require_length(group: Group, plan: Plan) -> None:
    schedule = group.options.schedule
    if plan.steps <= 0 and isinstance(schedule, (Linear, Cosine)) and schedule.t_max is None:
        raise UserCodeError(
            RunReason.USER_CODE_ERROR,
            f"parameter group {group.name!r}: schedule.t_max is missing, and nobody knows how long an epoch is",
        )


def why_wrong(found: float, registered: Group) -> str:
    """Empty when the rate is the written one, up to rounding, and within its bounds."""
    least, most = registered.bounds
    if not math.isfinite(found):
        return f"is {found!r}"
    if abs(found - registered.written) > max(ABSOLUTE, RELATIVE * max(abs(found), abs(registered.written))):
        return f"was changed from {registered.written:g} to {found:g}"
    if not least <= found <= most:
        return f"is {found!r}, outside of {least:g} to {most:g}"
    return ""


def _may_differ(found: Any, registered: Group) -> bool:
    """Of a rate that is no float. A device is not waited for: there the tensor's own count of changes must do."""
    tensor = registered.tensor
    if tensor is None or found is not tensor:
        return True
    if tensor.device.type != "cpu":
        return tensor._version != registered.tensor_version
    return bool(tensor != registered.written)


def _write(registered: Group, group: dict[str, Any], rate: float) -> None:
    tensor = registered.tensor
    if tensor is None:
        group["lr"] = rate
    else:
        with torch.no_grad():
            tensor.fill_(rate)
        group["lr"] = tensor
        registered.tensor_version = tensor._version
    registered.written = rate
